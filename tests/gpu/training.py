"""One job of the GPU checks: a job file, `launcher train`, and what the run left in its directory.

Only the command line, the job file and the records of a run directory are used, so that what is checked is what a user
runs.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from workload import SMALL, TEXTS

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


FAILURES = "failures.txt"
"""In the folder of the checks: the ends of the outputs of runs that failed, and tracebacks of parts."""


class TrainingFailed(Exception):
    """A run that ended with an error; the message is the end of what it printed."""


@dataclass(frozen=True)
class Bench:
    """Where and on what device the checks run.

    Args:
        folder: Directory of models, data and runs.
        gpu: Whether jobs train on a GPU.
    """

    folder: Path
    gpu: bool

    def job(self, name: str, model: str | Path = SMALL, /, **sections: Mapping[str, Any]) -> dict[str, Any]:
        """Return a job: one worker, fp32, 12 steps of 16 texts, unless `sections` say otherwise."""
        base: dict[str, Any] = {
            "name": name,
            "task": {"type": "causal-lm", "text": "text", "max_length": 1024 if self.gpu else 64},
            "model": {"name": str(self.folder / model)},
            "data": {"train": str(self.folder / TEXTS), "window_steps": 4},
            "train": {"max_steps": 12, "batch_size": 16, "learning_rate": 1e-3, "log_every_steps": 1},
            "checkpoint": {"every_minutes": None},
            "fault_tolerance": {"max_failures": 0},
            "parallel": {},
            "cluster": {"workers": 1, "gpus_per_worker": 1 if self.gpu else 0, "data_workers": 4 if self.gpu else 1},
            "output": {"storage": str(self.folder / "runs")},
        }
        for section, values in sections.items():
            base[section] = {**base.get(section, {}), **values}
        return base


@dataclass(frozen=True)
class Trained:
    """What a run left.

    Args:
        directory: Run directory.
        seconds: Wall time of the command.
        steps: Records of its steps, by step, as dictionaries.
        times: Records of where the time went, in order.
        output: What the command printed.
    """

    directory: Path
    seconds: float
    steps: dict[int, dict[str, Any]]
    times: list[dict[str, Any]]
    output: str

    @property
    def losses(self) -> list[float]:
        """Loss of each step, in order."""
        return [self.steps[step]["loss"] for step in sorted(self.steps)]

    def samples_per_s(self, warm: int) -> float:
        """Return samples per second from the end of step `warm`, at which the log was flushed, to the last."""
        last = max(self.steps)
        seconds = self.steps[last]["elapsed_s"] - self.steps[warm]["elapsed_s"]
        return sum(line["samples"] for step, line in self.steps.items() if step > warm) / seconds

    def data_wait(self) -> float:
        """Return the share of rank 0's training time spent waiting for data, the first record left out."""
        counted = [line for line in self.times if line["steps"]][1:]
        return sum(line["data_s"][0] for line in counted) / max(1e-9, sum(line["seconds"] for line in counted))

    def memory(self) -> tuple[int | None, int | None]:
        """Return the predicted and the used bytes of rank 0; None where one is not known."""
        files = sorted(self.directory.glob("workers/memory-*.json"))
        record = json.loads(files[0].read_text(encoding="utf-8")) if files else {}
        return record.get("predicted_bytes"), record.get("used_bytes")


def train(
    job: Mapping[str, Any],
    options: tuple[str, ...] = (),
    environment: Mapping[str, str] | None = None,
    entry: tuple[str, ...] = ("-m", "launcher"),
    exit_codes: tuple[int, ...] = (0,),
    resume: bool = False,
) -> Trained:
    """Run `launcher train` on a job and read what it left.

    Args:
        job: Job file's content.
        options: Further options of the command.
        environment: Further environment variables.
        entry: How Python starts the command.
        exit_codes: Exit codes that are no failure.
        resume: Whether to continue the run that is there, instead of removing what an earlier call left.

    Raises:
        TrainingFailed: The command ended otherwise.
    """
    storage = Path(job["output"]["storage"])
    storage.mkdir(parents=True, exist_ok=True)
    if not resume:
        shutil.rmtree(storage / job["name"], ignore_errors=True)
    file = storage / f"{job['name']}.yaml"
    file.write_text(yaml.safe_dump(dict(job)), encoding="utf-8")
    # Tracebacks are wanted where a run may end, once, on a machine that is gone afterwards; a stop has its exit code
    # without `--debug` alone.
    debug = ("--debug",) if exit_codes == (0,) else ()
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, *entry, *debug, "train", str(file), *options],
        env={**os.environ, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        check=False,
    )
    seconds = time.monotonic() - begun
    (storage / f"{job['name']}.log").write_text(done.stdout, encoding="utf-8")
    if done.returncode not in exit_codes:
        note_failure(storage.parent, job["name"], done.stdout)
        raise TrainingFailed(f"{job['name']}: exit code {done.returncode}: {last_words(done.stdout)}")
    return read_run(storage / job["name"], seconds, done.stdout)


def note_failure(folder: Path, name: str, text: str) -> None:
    """Append the end of an output, or a traceback, to the file of failures."""
    with (folder / FAILURES).open("a", encoding="utf-8") as file:
        file.write(f"\n==== {name}\n{text[-6000:]}\n")


def read_run(directory: Path, seconds: float, output: str) -> Trained:
    """Read the metrics of a run directory."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    # A step that was made again after a restart counts as it was made last.
    steps = {line["step"]: line for line in lines if line["kind"] == "step"}
    return Trained(directory, seconds, steps, [line for line in lines if line["kind"] == "times"], output)


def last_words(output: str, characters: int = 300) -> str:
    """Return the end of an output in one line."""
    return " ".join(output.split())[-characters:]


def largest_difference(run: Trained, other: Trained) -> float:
    """Return the largest difference of two loss curves, which must have the same steps."""
    assert run.steps.keys() == other.steps.keys(), (sorted(run.steps), sorted(other.steps))
    return max(abs(a - b) for a, b in zip(run.losses, other.losses, strict=True))
