"""Show where the time of a start goes: the processes of `launcher train` until the first step, as table and picture.

Samples all processes below the command: when each began and ended, the processor time it had used by the end of the
first step, and the memory of the whole tree (PSS: pages that processes share count once). Prints the table, writes
`profile.svg`, and prints one JSON object on its last line. `make profile-start`. Runs on the client; needs no GPU.
"""

import argparse
import html
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

from tests.benchmarks.commands import ENVIRONMENT, empty_folder  # noqa: E402
from tests.benchmarks.throughput.run import write_job  # noqa: E402
from tests.benchmarks.tree import proportional_memory, tree  # noqa: E402

SAMPLE_S, MEMORY_S = 0.05, 1.0


@dataclass
class Process:
    """One process of the tree.

    Args:
        name: Name in the table; the last one that says something.
        began_s: Seconds after the command's start at which it was first seen.
        ended_s: Seconds at which it was last seen.
        cpu_s: Processor time it has used.
    """

    name: str
    began_s: float
    ended_s: float
    cpu_s: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--storage", type=Path, default=ROOT / "runs" / "profile-start")
    parser.add_argument("--command", nargs=argparse.REMAINDER, help="instead of `launcher train`: profiled to its end")
    options = parser.parse_args()
    storage = empty_folder(options.storage)
    if options.command:
        command, is_reached = options.command, None
    else:
        subprocess.run([sys.executable, str(ROOT / "jobs/quickstart/prepare.py")], check=True, stdout=sys.stderr)
        job, metrics = write_job(storage, 2), storage / "profiled" / "metrics.jsonl"
        command = [sys.executable, "-m", "launcher", "train", str(job), "name=profiled", "train.log_every_steps=1"]

        def is_reached() -> bool:
            return metrics.exists() and '"step":1,' in metrics.read_text(encoding="utf-8")

    seconds, processes, peak = sample(command, storage / "log.txt", is_reached)
    print_table(processes, seconds)
    (storage / "profile.svg").write_text(picture(processes, seconds), encoding="utf-8")
    print(f"picture: {storage / 'profile.svg'}")
    cpu = sum(process.cpu_s for process in processes)
    print(json.dumps({"seconds": round(seconds, 2), "cpu_s": round(cpu, 1), "processes": len(processes),
                      "peak_gib": round(peak / 2**30, 2)}))  # fmt: skip
    return 0


def sample(command: list[str], log: Path, is_reached: Callable[[], bool] | None) -> tuple[float, list[Process], int]:
    """Run a command and watch its processes.

    Args:
        command: Words of the command.
        log: File that its output goes to.
        is_reached: Returns True when what is measured has happened; None means the command's end.

    Returns:
        Seconds until then, all processes seen until then in order of start, and the peak memory in bytes.
    """
    seen: dict[tuple[int, float], Process] = {}
    peak, measured = 0, 0.0
    began = time.monotonic()
    with log.open("wb") as output:
        running = subprocess.Popen(command, cwd=ROOT, env=os.environ | ENVIRONMENT, stdout=output, stderr=output)
        while not (is_reached is not None and is_reached()):
            if running.poll() is not None:
                if is_reached is None:
                    break
                sys.exit(f"error: exit code {running.returncode}, see {log}")
            now = time.monotonic() - began
            for process in tree(running.pid):
                _look(process, now, seen)
            if is_reached is not None and now - measured > MEMORY_S:
                measured = now
                peak = max(peak, proportional_memory(running.pid))
            time.sleep(SAMPLE_S)
        seconds = time.monotonic() - began
        running.wait()
    return seconds, sorted(seen.values(), key=lambda process: process.began_s), peak


def _look(process: psutil.Process, now: float, seen: dict[tuple[int, float], Process]) -> None:
    try:
        with process.oneshot():
            key = (process.pid, process.create_time())
            name, times = _name_of(process.cmdline()), process.cpu_times()
    except psutil.Error:
        return  # it ended between the listing and the look
    sampled = seen.setdefault(key, Process(name, now, now, 0.0))
    sampled.name = name or sampled.name
    sampled.ended_s, sampled.cpu_s = now, times.user + times.system


def _name_of(words: list[str]) -> str:
    """Return what a process is called in the table: Ray's title, or the script or program that runs."""
    if not words:
        return ""
    if words[0].startswith("ray::"):
        return words[0].partition(".")[0]
    for word in words[1:4]:
        if word.endswith(".py"):
            return os.path.basename(word)
    program = os.path.basename(words[0])
    return " ".join([program, *[word for word in words[1:4] if not word.startswith("/")]])[:60]


def print_table(processes: list[Process], seconds: float) -> None:
    print(f"{'from':>6} .. {'to s':<6} {'CPU s':>6}  process")
    for process in processes:
        end = "" if process.ended_s > seconds - 2 * SAMPLE_S - 0.2 else f"{process.ended_s:.1f}"
        print(f"{process.began_s:6.1f} .. {end:<6} {process.cpu_s:6.2f}  {process.name}")
    print(f"{seconds:6.1f} s, {sum(process.cpu_s for process in processes):.1f} s of CPU, {len(processes)} processes")


def picture(processes: list[Process], seconds: float) -> str:
    """Return an SVG with one bar per process over time, darker where it used more of a core."""
    row, left, width = 18, 330, 760
    height = row * (len(processes) + 2)
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 80}" height="{height}" '
             'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>']  # fmt: skip
    for tick in range(0, int(seconds) + 1, 5 if seconds > 12 else 1):
        x = left + width * tick / seconds
        parts.append(f'<line x1="{x:.1f}" y1="0" x2="{x:.1f}" y2="{height - row}" stroke="#ddd"/>')
        parts.append(f'<text x="{x:.1f}" y="{height - 4}" text-anchor="middle" fill="#555">{tick} s</text>')
    for number, process in enumerate(processes):
        y, x = row * number + 4, left + width * process.began_s / seconds
        span = max(process.ended_s - process.began_s, SAMPLE_S)
        share = min(1.0, process.cpu_s / span)
        parts.append(f'<text x="{left - 8}" y="{y + 11}" text-anchor="end">{html.escape(process.name[:50])}</text>')
        parts.append(f'<rect x="{x:.1f}" y="{y}" width="{max(1.5, width * span / seconds):.1f}" height="{row - 5}" '
                     f'fill="#1f5f9f" fill-opacity="{0.15 + 0.85 * share:.2f}"/>')  # fmt: skip
        parts.append(f'<text x="{left + width + 6}" y="{y + 11}" fill="#555">{process.cpu_s:.1f} CPU s</text>')
    return "\n".join([*parts, "</svg>"])


if __name__ == "__main__":
    sys.exit(main())
