"""The custom task of the README, in a module outside the package, in a whole run on Ray."""

import re
from pathlib import Path

import pytest
from rich.console import Console

from launcher.driver.run import run_job
from launcher.rundir.records import EvaluationRecord, StepRecord
from tests.support.jobs import make_job, write_splits

pytestmark = pytest.mark.ray

_README = Path(__file__).resolve().parents[2] / "README.md"


def test_the_task_in_readme_trains(
    tiny_bert: Path, tmp_path: Path, user_modules: Path, monkeypatch: pytest.MonkeyPatch, ray_cluster: None
) -> None:
    match = re.search(r"```python\n# my_tasks.py\n(.*?)```", _README.read_text(encoding="utf-8"), re.DOTALL)
    assert match
    (user_modules / "my_tasks.py").write_text(match[1], encoding="utf-8")
    monkeypatch.syspath_prepend(user_modules)
    data = write_splits(tmp_path / "data", 121, validation=53)
    job = make_job(
        tiny_bert, data, tmp_path / "runs", task={"type": "my_tasks:Focal", "gamma": 3.0, "max_length": 32},
        train={"epochs": 3, "learning_rate": 5e-3},
    )  # fmt: skip
    run = run_job(job, Console(quiet=True))
    lines = list(run.read_metrics())
    first = next(line for line in lines if isinstance(line, StepRecord))
    assert first.loss == pytest.approx(0.693 / 8, rel=0.2)  # random guess: log 2, times (1 - 1/2) ** gamma
    assert [line for line in lines if isinstance(line, EvaluationRecord)][-1].metrics["accuracy"] > 0.9
