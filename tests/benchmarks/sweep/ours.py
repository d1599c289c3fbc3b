"""Our side of the sweep benchmark: `launcher tune` up to the ranked trials. Runs on the client; `run.py` starts it."""

import json
import sys
import time

from launcher.records import EvaluationRecord, StepRecord, TrialRecord
from launcher.spec.load import load_job
from launcher.tasks import params_of
from launcher.tune.tuner import tune_job

_ends: dict[int, float] = {}


def note(trial: TrialRecord) -> None:
    """When each trial was over."""
    if trial.status != "running":
        _ends.setdefault(trial.number, time.monotonic())


def main() -> None:
    started = time.monotonic()
    job = load_job(sys.argv[1], (), params_of)
    tuned = tune_job(job, note)
    seconds = time.monotonic() - started
    assert all(trial.status == "finished" for trial in tuned.sweep.trials.values())
    work = []
    for number in tuned.sweep.trials:
        lines = list(tuned.sweep.trial_run(number).read_metrics())
        looks = [line for line in lines if isinstance(line, EvaluationRecord)]
        steps = [line for line in lines if isinstance(line, StepRecord)]
        work.append(steps[-1].elapsed_s + looks[-1].seconds)
    assert job.tune is not None
    first, concurrent = job.tune.max_concurrent or 1, job.tune.max_concurrent or 1
    ends = sorted(_ends.values())
    # Between the ends of the first trials and of the last, every slot was busy with the others.
    each = (ends[-1] - ends[first - 1]) * concurrent / (len(ends) - first)
    best = tuned.best.best("max")
    assert best is not None
    print(
        json.dumps(
            {
                "seconds": seconds, "best": best.value, "trials": len(ends),
                "each": each, "overhead": each - sum(work[first:]) / len(work[first:]),
            }
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
