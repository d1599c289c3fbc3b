"""Does a sweep stay fast and small at 500 trials? Runs on the client; needs no GPU.

Trials of two steps of a tiny model: nearly all of their time is the sweep's own. Compares the first hundred (after ten
to warm up) with the last hundred: seconds per trial, memory of the driver and of the largest worker. The last line of
the output is one JSON object.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT)]
os.environ.setdefault("RAY_AUTH_MODE", "disabled")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=500)
    options = parser.parse_args()
    from launcher.report.sweep import write_sweep_report
    from launcher.rundir.trials import TrialRecord
    from launcher.tune.run import tune_job
    from tests.support.jobs import make_job, write_splits
    from tests.support.tiny_models import make_tiny_bert

    marks: list[tuple[float, int, int]] = []
    seen: set[int] = set()

    def note(trial: TrialRecord) -> None:
        if trial.status != "running" and trial.number not in seen:
            seen.add(trial.number)
            marks.append((time.monotonic(), rss(os.getpid()), max(map(rss, workers()), default=0)))
            if len(marks) % 50 == 0:
                print(
                    f"{len(marks)} trials, driver {marks[-1][1] >> 20} MiB, worker {marks[-1][2] >> 20} MiB", flush=True
                )

    folder = Path(tempfile.mkdtemp(prefix="bench-many-"))
    data = write_splits(folder / "data", 40, validation=20)
    job = make_job(
        make_tiny_bert(folder / "model"), data, folder / "runs",
        train={"max_steps": 2, "batch_size": 16}, cluster={"workers": 1, "cpus_per_worker": 1.0},
        tune={
            "space": {"train.learning_rate": {"loguniform": [1e-5, 1e-2]}, "train.batch_size": {"choice": [8, 16]}},
            "trials": options.trials, "max_concurrent": 2, "scheduler": "asha",
        },
    )  # fmt: skip
    tuned = tune_job(job, note)
    report = Path(write_sweep_report(tuned.sweep.run))
    size = report.stat().st_size
    shutil.rmtree(folder)
    first, last = marks[10 : 10 + len(marks) // 5], marks[-len(marks) // 5 :]
    seconds = [(part[-1][0] - part[0][0]) / (len(part) - 1) for part in (first, last)]
    print(
        json.dumps(
            {
                "trials": len(marks), "seconds_per_trial": round(seconds[1], 3),
                "slower": round(seconds[1] / seconds[0], 3),
                "driver_growth": round(last[-1][1] / first[0][1], 3),
                "worker_growth": round(last[-1][2] / first[0][2], 3),
                "report_mb": round(size / 1e6, 2),
            }
        )
    )  # fmt: skip
    return 0


def rss(pid: int) -> int:
    """Return the resident bytes of a process; 0 if it is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def workers() -> list[int]:
    """Return the processes that run trials, of this machine's Rays."""
    pids = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if b"ray::" in path.read_bytes() and b"TrialActor" in path.read_bytes():
                pids.append(int(path.parent.name))
        except OSError:
            continue
    return pids


if __name__ == "__main__":
    sys.exit(main())
