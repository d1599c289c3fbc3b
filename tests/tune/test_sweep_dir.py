"""A sweep directory: ranks, tables, checkpoint budget, and the report (`launcher/tune/sweep_dir.py`)."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from launcher.driver.prepare import prepare
from launcher.errors import RunError
from launcher.report.sweep import collect_sweep, render_sweep, summarize_sweep
from launcher.rundir.directory import RunDir
from launcher.rundir.records import FileEntry, ManifestRecord
from launcher.rundir.trials import SweepRecord, TrialEvaluation, TrialRecord
from launcher.spec.job import JobSpec
from launcher.spec.tune import TuneSpec
from launcher.tasks import params_class
from launcher.train.checkpoint import catalog
from launcher.tune.run import prepare_sweep
from launcher.tune.search import Search
from launcher.tune.space import trial_job
from launcher.tune.sweep_dir import SweepDir
from launcher.tune.tables import write_tables
from tests.support.jobs import make_job, write_splits

_SPEC = TuneSpec.model_validate(
    {"space": {"train.learning_rate": {"loguniform": [1e-6, 1e-3]}, "train.batch_size": {"choice": [8, 16]}}}
)
_JOB = JobSpec.model_validate(
    {"name": "s", "task": {"type": "text-classification"}, "model": {"name": "m"}, "data": {"train": "t.parquet"}}
)


def _sweep(folder: Path, mode: str = "max", trials: int = 4) -> SweepDir:
    space = {key: d.model_dump(mode="json", exclude_none=True) for key, d in _SPEC.space.items()}
    record = SweepRecord(
        name="s", metric="accuracy", mode=mode, space=space, trials=trials, search="random", scheduler="asha"
    )  # type: ignore[arg-type]
    return SweepDir(RunDir(str(folder / "s")), record, _SPEC, _JOB)


def _trial(number: int, *values: float, status: str = "finished", repeat_of: int | None = None) -> TrialRecord:
    evaluations = tuple(
        TrialEvaluation(step=10 * i, progress=100 * i / max(1, len(values)), value=value, loss=1.0)
        for i, value in enumerate(values, 1)
    )
    params = Search(_SPEC, 0, "max").suggest(number)
    return TrialRecord(
        number=number, params=params, seed=0, status=status, evaluations=evaluations, repeat_of=repeat_of, seconds=3.0
    )  # type: ignore[arg-type]


def _give_checkpoint(sweep: SweepDir, number: int, size: int) -> None:
    run = sweep.trial_run(number)
    run.write_bytes("checkpoints/step-00000010/state/x", b"1")
    entry = FileEntry(path="state/x", size_bytes=size, sha256="0")
    run.write_record(
        "checkpoints/step-00000010/manifest.json",
        ManifestRecord(step=10, world_size=1, zero=0, spec_hash="", files=(entry,)),
    )


@pytest.mark.parametrize(("mode", "order"), [("max", [2, 0, 1, 3]), ("min", [1, 0, 2, 3])])
def test_trials_are_ranked_by_their_best_evaluation(tmp_path: Path, mode: str, order: list[int]) -> None:
    sweep = _sweep(tmp_path, mode)
    for trial in (_trial(0, 0.3, 0.5), _trial(1, 0.2), _trial(2, 0.9, 0.6), _trial(3, 0.95, status="failed")):
        sweep.record_trial(trial)
    assert [trial.number for trial in sweep.rank_trials()] == order
    other = _sweep(tmp_path, mode)
    other.load()
    assert other.trials == sweep.trials


def test_checkpoints_beyond_the_budget_are_removed(tmp_path: Path) -> None:
    """Show that the best and running trials keep their checkpoints, and pruned, failed and bad ones lose theirs."""
    sweep = _sweep(tmp_path)
    statuses = ["finished", "finished", "pruned", "failed", "running", "finished"]
    for number, (value, status) in enumerate(zip([0.7, 0.9, 0.8, 0.1, 0.2, 0.3], statuses, strict=True)):
        sweep.record_trial(_trial(number, value, status=status))
        _give_checkpoint(sweep, number, 1 << 29)
    sweep.free_space(budget_gib=1.0)
    with_checkpoint = [number for number in range(6) if catalog.latest_step(sweep.trial_run(number))]
    assert with_checkpoint == [0, 1, 4]


def test_tables_have_every_trial(tmp_path: Path) -> None:
    sweep = _sweep(tmp_path)
    for trial in (_trial(0, 0.3), _trial(1), _trial(2, 0.5, status="pruned"), _trial(4, 0.51, repeat_of=2)):
        sweep.record_trial(trial)
    write_tables(sweep)
    table = pq.read_table(tmp_path / "s" / "sweep" / "trials.parquet").to_pylist()
    assert [(row["rank"], row["number"], row["status"]) for row in table] == [
        (1, 2, "pruned"), (2, 0, "finished"), (3, 1, "finished"), (None, 4, "finished"),
    ]  # fmt: skip
    assert table[0]["train.learning_rate"] == sweep.trials[2].params["train.learning_rate"]
    assert (tmp_path / "s" / "sweep" / "trials.csv").read_text().count("\n") == 5


def test_tables_hold_choices_of_numbers_and_words(tmp_path: Path) -> None:
    sweep = _sweep(tmp_path)
    for number, value in enumerate((4, "auto", None)):
        params = {"train.batch_size": value}
        sweep.record_trial(_trial(number, 0.1 * number).model_copy(update={"params": params}))
    write_tables(sweep)
    table = pq.read_table(tmp_path / "s" / "sweep" / "trials.parquet").to_pylist()
    assert {row["number"]: row["train.batch_size"] for row in table} == {0: "4", 1: "auto", 2: None}


def test_the_report_of_500_trials_stays_small(tmp_path: Path) -> None:
    sweep = _sweep(tmp_path, trials=500)
    for number in range(500):
        values = [0.5 + 0.0008 * number + 0.01 * i for i in range(20)]
        sweep.record_trial(_trial(number, *values, status=("finished", "pruned", "failed")[number % 3]))
    sweep.save(seconds=100.0, importances={"train.learning_rate": 0.8, "train.batch_size": 0.2})
    page = render_sweep(collect_sweep(sweep.run))
    assert len(page.encode()) < 5_000_000
    titles = ("all trials", "train.learning_rate against accuracy", "train.learning_rate and train.batch_size",
              "Parallel coordinates", "Hyperparameter importance", "Compute by status")  # fmt: skip
    assert [title for title in titles if title not in page] == []


def test_the_report_of_a_sweep_without_evaluations(tmp_path: Path) -> None:
    sweep = _sweep(tmp_path)
    sweep.save()
    sweep.record_trial(_trial(0, status="running"))
    data = collect_sweep(sweep.run)
    assert "0 of 4 trials completed, no evaluation yet" in summarize_sweep(data)
    assert "trials.csv" in render_sweep(data)


def test_noise_is_computed_from_repeats(tmp_path: Path) -> None:
    sweep = _sweep(tmp_path)
    for trial in (_trial(0, 0.9), _trial(1, 0.5), _trial(4, 0.8, repeat_of=0), _trial(5, 1.0, repeat_of=0)):
        sweep.record_trial(trial)
    sweep.save(best=0)
    assert collect_sweep(sweep.run).seed_std == pytest.approx(0.1)
    assert "standard deviation over 3 seeds" in render_sweep(collect_sweep(sweep.run))


def test_trials_are_evaluated_alike(tiny_bert: Path, tmp_path: Path) -> None:
    data = write_splits(tmp_path / "data", train=64, validation=20)
    space = {"train.learning_rate": {"choice": [1e-3]}, "train.batch_size": {"choice": [16, 256]}}
    job = make_job(tiny_bert, data, tmp_path, tune={"space": space, "trials": 1, "metric": "loss"})
    sweep = prepare_sweep(job)
    assert (sweep.prepared.job.evaluation.metric, sweep.prepared.job.evaluation.mode) == ("loss", "min")
    assert (sweep.prepared.plan.metric, sweep.prepared.plan.metric_mode) == ("loss", "min")
    params: dict[str, object] = {"train.learning_rate": 1e-3, "train.batch_size": 256}
    trial = prepare(trial_job(sweep.prepared.job, params, params_class).model_copy(update={"tune": None}))
    assert (trial.plan.metric, trial.plan.metric_mode) == ("loss", "min")
    # A loss over the batch must not depend on the batches that a trial trains with.
    assert trial.job.evaluation_batch_size == 64


def test_a_trial_on_disk_that_sets_another_key_is_refused(tmp_path: Path) -> None:
    """Refuse a record by which someone with access to the directory could permit what the job file forbids."""
    sweep = _sweep(tmp_path)
    sweep.record_trial(_trial(0, 0.5))
    tampered = _trial(1, 0.9)
    sweep.record_trial(tampered.model_copy(update={"params": {**tampered.params, "model.trust_remote_code": True}}))
    with pytest.raises(
        RunError, match=r"trial-0001/trial\.json: sets model\.trust_remote_code, which is not in tune\.sp"
    ):
        _sweep(tmp_path).load()
