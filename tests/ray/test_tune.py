"""Sweeps on a real Ray cluster: schedulers, trials of several workers, failures, and resume after a kill.

Each trial must have the curve that `launcher train` has with the same values.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from launcher.driver.run import run_job
from launcher.errors import RunError
from launcher.rundir.directory import RunDir
from launcher.rundir.records import EvaluationRecord, ScoresRecord, StepRecord
from launcher.rundir.recovery import read_reductions
from launcher.rundir.trials import TrialRecord
from launcher.spec.job import JobSpec
from launcher.spec.loader import dump_job
from launcher.train.checkpoint import catalog
from launcher.tune.run import SweepResult, run_sweep, tune_job
from launcher.tune.search import Search
from tests.support.jobs import make_job, write_splits

pytestmark = pytest.mark.ray

_SPACE: dict[str, Any] = {"train.learning_rate": {"loguniform": [1e-4, 1e-2]}}


def _job(tiny_bert: Path, folder: Path, tune: dict[str, Any], **sections: Any) -> JobSpec:
    data = write_splits(folder / "data", 121, validation=53, test=41)
    return make_job(
        tiny_bert, data, folder / "runs",
        train={"epochs": 3, "batch_size": 16}, evaluation={"every_steps": 6},
        cluster={"workers": 1, "cpus_per_worker": 1.0},
        tune={"space": _SPACE, "trials": 4, "max_concurrent": 2, "scheduler": "none", **tune}, **sections,
    )  # fmt: skip


def _ignore(trial: TrialRecord) -> None:
    """Take a changed trial and do nothing."""


def _trials(tuned: SweepResult) -> list[TrialRecord]:
    return [tuned.sweep.trials[number] for number in sorted(tuned.sweep.trials)]


def _run(tuned: SweepResult, number: int) -> RunDir:
    return RunDir(tuned.sweep.run.path(f"sweep/trials/trial-{number:04d}"))


def _curve(run: RunDir) -> list[tuple[int, float]]:
    return [(line.step, line.loss) for line in run.read_metrics() if isinstance(line, StepRecord)]


def test_each_trial_of_a_sweep_matches_a_run_of_train(tiny_bert: Path, tmp_path: Path, ray_cluster: None) -> None:
    """Show with random search that the test data is read only after all trials, and that nothing is trained twice."""
    job = _job(tiny_bert, tmp_path, {"trials": 5, "repeats": 2}, model={"name": str(tiny_bert), "dropout": 0.1})
    test = Path(job.data.test[0] if job.data.test else "")
    hidden = test.with_suffix(".hidden")
    test.rename(hidden)
    test.write_bytes(b"not a Parquet file: reading it fails")
    tuned = tune_job(job, _ignore)
    trials = _trials(tuned)
    assert [trial.status for trial in trials] == ["finished"] * 7
    assert len({repr(trial.params) for trial in trials[:5]}) == 5
    assert [(t.repeat_of, t.seed) for t in trials[5:]] == [(tuned.best.number, 1), (tuned.best.number, 2)]
    assert all([evaluation.step for evaluation in trial.evaluations] == [6, 12, 18, 24] for trial in trials)
    shutil.move(hidden, test)
    console = Console(file=StringIO(), width=200)
    run = run_sweep(job, console)  # resumes the complete sweep
    assert [trial.evaluations for trial in trials] == [t.evaluations for t in _trials(tune_job(job, _ignore))]
    scores = run.read_record("scores-test.json", ScoresRecord)
    assert (scores.rows, run.exists("model/config.json")) == (41, True)
    best = tuned.best.best_evaluation("max")
    assert (
        best is not None and run.read_record("scores-validation.json", ScoresRecord).metrics["accuracy"] == best.value
    )
    text = console.file.getvalue() if isinstance(console.file, StringIO) else ""
    assert text.count("test at step") == 1
    for name in ("sweep/report.html", "sweep/best.yaml", "sweep/trials.parquet", "sweep/trials.csv", "report.html"):
        assert run.exists(name)
    # The fourth trial ran in a warm worker that had trained others before: its losses are those of a fresh `train`.
    number = trials[3].number
    alone = job.model_copy(update={"tune": None, "name": "alone", "data": job.data.model_copy(update={"test": None})})
    alone = alone.model_copy(
        update={"train": alone.train.model_copy(update={"learning_rate": trials[3].params["train.learning_rate"]})}
    )
    trial_losses = dict(_curve(tuned.sweep.trial_run(number)))
    for step, loss in _curve(run_job(alone, Console(file=StringIO()))):
        assert abs(trial_losses[step] - loss) < 1e-6, f"step {step}"
    with pytest.raises(RunError, match="belongs to another sweep"):
        run_sweep(job.model_copy(update={"seed": 5}), console)


def _check_asha(trials: list[TrialRecord]) -> None:
    assert {trial.status for trial in trials} == {"finished", "pruned"}
    assert all(trial.evaluations[-1].progress < 100 for trial in trials if trial.status == "pruned")
    assert all(trial.evaluations[-1].step == 24 for trial in trials if trial.status == "finished")


def _check_hyperband(trials: list[TrialRecord]) -> None:
    # Which trials a bracket prunes depends on the order of their results.
    assert {trial.status for trial in trials} <= {"finished", "pruned"}
    assert all(trial.evaluations[-1].step == 24 for trial in trials if trial.status == "finished")


def _check_pbt(trials: list[TrialRecord]) -> None:
    ends = [(trial.status, trial.reason, trial.evaluations[-1].step if trial.evaluations else 0) for trial in trials]
    assert ends == [("finished", "", 48)] * len(trials)


_RUNGS = {"grace": 0.25, "reduction_factor": 2.0}


@pytest.mark.parametrize(
    ("tune", "check"),
    [
        pytest.param({"scheduler": "asha", "trials": 6, "metric": "loss", **_RUNGS}, _check_asha, id="asha"),
        pytest.param(
            {"scheduler": "hyperband", "trials": 7, **_RUNGS}, _check_hyperband, marks=pytest.mark.long, id="hyperband"
        ),
        pytest.param({"scheduler": "pbt", "grace": 0.15, "metric": "loss", "max_concurrent": 4}, _check_pbt, id="pbt"),
        pytest.param({"search": "bohb", "trials": 7, **_RUNGS}, _check_hyperband, marks=pytest.mark.long, id="bohb"),
    ],
)
def test_every_scheduler_records_each_step_once(
    tune: dict[str, Any],
    check: Callable[[list[TrialRecord]], None],
    tiny_bert: Path,
    tmp_path: Path,
    ray_cluster: None,
) -> None:
    """Stop, pause and copy trials."""
    wide = {"train.learning_rate": {"loguniform": [1e-7, 3e-2]}}
    job = _job(tiny_bert, tmp_path, {"space": wide, **tune})
    if tune.get("scheduler") == "pbt":  # long trials with many evaluations, so that some copy others
        evaluation = job.evaluation.model_copy(update={"every_steps": 2})
        job = job.model_copy(update={"evaluation": evaluation, "train": job.train.model_copy(update={"epochs": 6})})
    tuned = tune_job(job, _ignore)
    trials = _trials(tuned)
    check(trials)
    for trial in trials:
        run = tuned.sweep.trial_run(trial.number)
        steps = [step for step, _ in _curve(run)]
        if tune.get("scheduler") == "pbt":  # a trial that copies one ahead of it skips steps
            assert steps == sorted(set(steps)) and steps[-1] == 48
        else:
            assert steps == list(range(1, trial.evaluations[-1].step + 1))
        evaluated = [line.step for line in run.read_metrics() if isinstance(line, EvaluationRecord)]
        assert evaluated == [evaluation.step for evaluation in trial.evaluations]
        if trial.status == "pruned" and trial.number != tuned.best.number:
            assert catalog.complete_steps(run) == []
    if tune.get("scheduler") == "pbt":
        search = Search(tuned.sweep.spec, 0, "max")
        first_params = [search.suggest(number) for number in range(len(trials))]
        assert [trial.params for trial in trials] != first_params, "no trial copied another"


def test_trials_of_one_to_three_workers_have_the_same_curve(tiny_bert: Path, tmp_path: Path, ray_cluster: None) -> None:
    """Search the number of workers on a cluster that cannot run all trials at once."""
    space = {"cluster.workers": {"choice": [1, 2, 3]}, "parallel.zero": {"choice": [1, 3]}}
    job = _job(tiny_bert, tmp_path, {"space": space, "search": "grid", "trials": 9, "max_concurrent": 4})
    job = job.model_copy(update={"cluster": job.cluster.model_copy(update={"cpus_per_worker": 1.5})})
    tuned = tune_job(job, _ignore)
    trials = _trials(tuned)
    assert [(t.status, t.workers) for t in trials] == [("finished", w) for w in (1, 1, 2, 2, 3, 3)]
    curves = [np.array([loss for _, loss in _curve(tuned.sweep.trial_run(t.number))]) for t in trials]
    assert all(len(curve) == 24 for curve in curves)
    assert max(np.abs(curve - curves[0]).max() for curve in curves) < 1e-5


_FAILING = '''
from launcher.tasks.text_classification import TextClassification


class Fragile(TextClassification):
    """Fails in a way that depends on max_length."""

    def sample_losses(self, outputs, batch):
        losses = super().sample_losses(outputs, batch)
        if self.params.max_length == 31 and len(batch.labels) > 1:
            raise RuntimeError("CUDA out of memory (not really)")
        return losses * (float("nan") if self.params.max_length == 30 else 1.0)
'''


def test_a_sweep_continues_after_a_failed_trial_and_an_oom(
    tiny_bert: Path, tmp_path: Path, user_modules: Path, monkeypatch: pytest.MonkeyPatch, ray_cluster: None
) -> None:
    (user_modules / "fragile.py").write_text(_FAILING)
    monkeypatch.syspath_prepend(user_modules)
    space = {"task.max_length": {"choice": [30, 31, 32, 33]}}
    job = _job(
        tiny_bert, tmp_path, {"space": space, "search": "grid", "retries": 1},
        task={"type": "fragile:Fragile", "max_length": 32},
    )  # fmt: skip
    tuned = tune_job(job, _ignore)
    trials = _trials(tuned)
    assert [trial.status for trial in trials] == ["failed", "finished", "finished", "finished"]
    assert "the loss is nan at step" in trials[0].reason
    reductions = [(r.micro_batch, r.reduced, r.restarted) for r in read_reductions(_run(tuned, 1))]
    assert reductions == [(4, 2, True), (2, 1, True)]
    assert [step for step, _ in _curve(_run(tuned, 1))] == list(range(1, trials[1].total_steps + 1))
    assert tuned.best.number in (1, 2, 3)


def test_a_killed_sweep_resumes(tiny_bert: Path, tmp_path: Path) -> None:
    """Kill the driver during trials: finished trials stay unchanged, running ones resume."""
    job = _job(tiny_bert, tmp_path, {"trials": 4})
    file = tmp_path / "job.yaml"
    file.write_text(dump_job(job))
    command = [sys.executable, "-m", "launcher", "tune", str(file)]
    folder = tmp_path / "runs" / job.name / "sweep" / "trials"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    first = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    finished: dict[Path, bytes] = {}
    until = time.monotonic() + 240
    while not finished and time.monotonic() < until and first.poll() is None:
        time.sleep(0.05)
        finished = {path: text for path in folder.glob("*/trial.json") if b'"finished"' in (text := path.read_bytes())}
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert 1 <= len(finished) < 4
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    assert all(path.read_bytes() == text for path, text in finished.items())
    trials = [TrialRecord.model_validate_json(path.read_bytes()) for path in sorted(folder.glob("*/trial.json"))]
    assert [(trial.number, trial.status) for trial in trials] == [(number, "finished") for number in range(4)]
    assert all([evaluation.step for evaluation in trial.evaluations] == [6, 12, 18, 24] for trial in trials)
    for trial in trials:
        run = RunDir(str(folder / f"trial-{trial.number:04d}"))
        assert [step for step, _ in _curve(run)] == list(range(1, 25))
