"""Our side of the sweep benchmark: `launcher tune` up to the ranked trials. Runs on the client; `run.py` starts it."""

import json
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.cli.options import load, start_ray_early

if TYPE_CHECKING:
    from launcher.rundir.trials import TrialRecord

_ends: dict[int, float] = {}


def note(trial: "TrialRecord") -> None:
    """Record the moment at which a trial is over."""
    if trial.status != "running":
        _ends.setdefault(trial.number, time.monotonic())


def main() -> None:
    started = time.monotonic()
    job = load(Path(sys.argv[1]), ())
    start_ray_early(
        job, (job.tune and job.tune.max_concurrent) or 1
    )  # before torch and ray are imported, as the command does
    from launcher.processes import local_ray
    from launcher.rundir.records import EvaluationRecord, StepRecord
    from launcher.tune.run import tune_job

    tuned = tune_job(job, note)
    seconds = time.monotonic() - started
    assert all(trial.status == "finished" for trial in tuned.sweep.trials.values())
    assert job.tune is not None
    slots = job.tune.max_concurrent or 1
    ends = sorted(_ends.values())
    overheads = []
    for number in range(slots, len(ends)):
        lines = list(tuned.sweep.trial_run(number).read_metrics())
        looks = [line for line in lines if isinstance(line, EvaluationRecord)]
        steps = [line for line in lines if isinstance(line, StepRecord)]
        # A trial takes over the slot of the first one to end that nobody has taken yet.
        taken = _ends[number] - ends[number - slots]
        overheads.append(taken - steps[-1].elapsed_s - looks[-1].seconds)
    answer = {"seconds": seconds, "trials": len(ends), "overhead": statistics.median(overheads)}
    local_ray.stop_current()
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
