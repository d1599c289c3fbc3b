"""What only a GPU can show, in one command of at most ten minutes; `--cpu` runs the half that a CPU can.

    python tests/gpu/run.py --output DIRECTORY          # all parts on the first GPU
    python tests/gpu/run.py --cpu                       # small sizes, gloo
    python tests/gpu/run.py --part zero --part resume   # some of them

Every part is a process of its own with a limit of its own. The results are in `README.md` beside this file, between its
markers, and as JSON in the output directory, both written anew as each part ends; so what was found is kept when the
command is stopped. Exit code 1 when a part did not pass. Needs the packages of the launcher; `bundle.sh` collects those
that a bare machine lacks.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
# Before the launcher or a library of it is imported, here and in the parts.
sys.path[:0] = [str(HERE), str(ROOT)]

from parts import PARTS, Report  # noqa: E402
from results import PartResult, Results, Row  # noqa: E402
from training import FAILURES, Bench, note_failure  # noqa: E402
from workload import CPU, GPU, make_workload  # noqa: E402

_PACKAGES = ("torch", "transformers", "deepspeed", "ray", "pyarrow", "peft", "accelerate", "numpy")
_STOP_S = 5.0


def main() -> int:
    """Run the parts that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="the half that needs no GPU")
    parser.add_argument("--part", action="append", choices=list(PARTS), help="this part alone; may be repeated")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "gpu", help="where the results go")
    parser.add_argument("--minutes", type=float, default=None, help="for all parts; 9.5 on a GPU, no limit on a CPU")
    parser.add_argument("--lanes", type=int, default=None, help="parts at once that are not timed; 4 on a GPU, else 1")
    parser.add_argument("--in-process", metavar="PART", help=argparse.SUPPRESS)
    options = parser.parse_args()
    # Models, checkpoints and logs stay out of the output, which may have to travel.
    bench = Bench((ROOT / "runs" / "gpu-work" / ("cpu" if options.cpu else "gpu")).resolve(), gpu=not options.cpu)
    if options.in_process:
        return run_here(bench, options.in_process)
    return Checks(bench, options).run()


def run_here(bench: Bench, name: str) -> int:
    """Run a part in this process; its rows go to a file, one JSON object a line."""
    if name == "prepare":
        make_workload(bench.folder, GPU if bench.gpu else CPU)
        print(json.dumps(describe(bench)))
        return 0
    with (bench.folder / f"{name}.jsonl").open("a", encoding="utf-8") as file:

        def write(what: str, figure: str, passed: bool | None) -> None:
            file.write(json.dumps({"what": what, "figure": figure, "passed": passed}) + "\n")
            file.flush()
            print(f"{name}: {what}: {figure}{'' if passed is not False else '  FAILED'}", flush=True)

        PARTS[name].run(Report(bench, write))
    return 0


def describe(bench: Bench) -> dict[str, str]:
    """Return device, versions and date."""
    import platform
    from importlib import metadata

    import torch

    found = {"device": platform.processor() or platform.machine()}
    if bench.gpu:
        properties = torch.cuda.get_device_properties(0)
        found = {"device": f"{properties.name} ({properties.total_memory / 2**30:.0f} GiB)"}
        found |= {"CUDA": str(torch.version.cuda), "NCCL": ".".join(map(str, torch.cuda.nccl.version()))}
    else:
        found["device"] = f"{os.cpu_count()} cores ({found['device']})"
    found["Python"] = platform.python_version()
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "missing"
    return {**found, "date": time.strftime("%Y-%m-%d")}


class Checks:
    """One call of the command.

    Args:
        bench: Where and on what device it runs.
        options: Command line.
    """

    def __init__(self, bench: Bench, options: argparse.Namespace) -> None:
        self._bench, self._output = bench, options.output.resolve()
        minutes = options.minutes or (9.5 if bench.gpu else float("inf"))
        self._ends = time.monotonic() + 60 * minutes
        self._names = [name for name in PARTS if not options.part or name in options.part]
        self._lanes = options.lanes or (4 if bench.gpu else 1)
        self._results = Results("gpu" if bench.gpu else "cpu", {})
        self._lock = Lock()

    def run(self) -> int:
        """Run all parts and return the exit code."""
        done = self._call("prepare", limit_s=120)
        if done.returncode != 0:
            print(f"error: models and data could not be made: {done.stdout[-2000:]}", file=sys.stderr)
            return 2
        (self._bench.folder / FAILURES).unlink(missing_ok=True)
        self._results.machine = json.loads(done.stdout.strip().splitlines()[-1])
        if len(self._names) < len(PARTS):
            self._results.keep_others(self._output)
        for group in self._groups():
            # A timed part is a group of its own, so that nothing runs beside it.
            with ThreadPoolExecutor(self._lanes) as lanes:
                list(lanes.map(self._run_part, group))
        print(self._results.table())
        return 0 if all(self._results.parts[name].state == "ok" for name in self._names) else 1

    def _groups(self) -> list[list[str]]:
        """Return the parts in order, neighbours that are not timed together."""
        groups: list[list[str]] = []
        for name in self._names:
            if PARTS[name].alone or not groups or PARTS[groups[-1][0]].alone:
                groups.append([])
            groups[-1].append(name)
        return groups

    def _run_part(self, name: str) -> None:
        part, left_s = PARTS[name], self._ends - time.monotonic()
        limit_s = min(part.gpu_s if self._bench.gpu else part.cpu_s, left_s)
        if left_s < 20:
            self._add(name, PartResult("not run", 0.0, "no time was left"))
            return
        rows = self._bench.folder / f"{name}.jsonl"
        rows.unlink(missing_ok=True)
        begun = time.monotonic()
        done = self._call(name, limit_s)
        result = PartResult("ok", time.monotonic() - begun)
        if rows.is_file():
            result.rows = [Row(**json.loads(line)) for line in rows.read_text(encoding="utf-8").splitlines()]
        if done.returncode == _Done.STOPPED:
            result.state, result.why = "stopped", f"at its limit of {limit_s:.0f} s"
        elif done.returncode != 0:
            result.state, result.why = "failed", " ".join(done.stdout.split())[-300:]
        elif any(row.passed is False for row in result.rows):
            result.state = "failed"
        if result.state in ("stopped", "failed") and done.returncode != 0:
            note_failure(self._bench.folder, name, done.stdout)
        self._add(name, result)

    def _add(self, name: str, result: PartResult) -> None:
        with self._lock:
            found = {**self._results.parts, name: result}
            self._results.parts = {name: found[name] for name in PARTS if name in found}
            self._results.write(self._output)
            failures = self._bench.folder / FAILURES
            if failures.is_file():
                shutil.copy(failures, self._output)
        print(f"== {name}: {result.state} in {result.seconds:.0f} s {result.why}", flush=True)

    def _call(self, name: str, limit_s: float) -> "_Done":
        """Run a part in a process group of its own, and stop the whole group at the limit."""
        log = self._bench.folder / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, str(Path(__file__)), "--in-process", name, *([] if self._bench.gpu else ["--cpu"])]
        with log.open("w+", encoding="utf-8") as file:
            process = subprocess.Popen(
                command, env=self._environment(), stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
            code: int
            try:
                code = process.wait(limit_s)
            except subprocess.TimeoutExpired:
                code = _Done.STOPPED
                _stop(process)
            file.seek(0)
            return _Done(code, file.read())

    def _environment(self) -> dict[str, str]:
        paths = [str(ROOT), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        if not self._bench.gpu:
            environment |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
        return environment


class _Done:
    """What came of a process.

    Args:
        returncode: Exit code, or `STOPPED`.
        stdout: What it printed.
    """

    STOPPED = -1000

    def __init__(self, returncode: int, stdout: str) -> None:
        self.returncode, self.stdout = returncode, stdout


def _stop(process: "subprocess.Popen[Any]") -> None:
    """Stop a process and all of its group; Ray's own processes end when their driver is gone."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(_STOP_S)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


if __name__ == "__main__":
    sys.exit(main())
