"""The lines that a sweep prints where there is no terminal."""

import io

from rich.console import Console

from launcher.rundir.trials import TrialRecord
from launcher.spec.tune import TuneSpec
from launcher.tune.progress import watch_sweep


def test_brackets_of_values_and_reasons_are_printed_as_they_are() -> None:
    spec = TuneSpec.model_validate({"space": {"model.name": {"choice": ["models/[a]", "b"]}}, "trials": 2})
    trial = TrialRecord(
        number=0, params={"model.name": "models/[a]"}, seed=0, status="failed", reason="[rank0]: [/disk] is full",
        workers=1, gpus=0,
    )  # fmt: skip
    console = Console(file=io.StringIO())
    with watch_sweep(spec, "accuracy", "max", console) as listener:
        listener(trial)
        listener(trial)  # a line for each change of the status
    assert console.file.getvalue() == (
        "[1/2] trial 0 failed ([rank0]: [/disk] is full): no evaluation  model.name models/[a]  0 s\n"
    )
