"""Runs are compared, their page is complete and works offline, and equal curves are recognised."""

import json
import math
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.errors import RunError
from launcher.report.collect import collect
from launcher.report.compare import MARK, _shorten_names, compare, render_comparison, write_comparison
from launcher.report.curves_match import compare_curves, find_first_difference
from launcher.rundir.directory import RunDir
from launcher.rundir.records import EnvironmentRecord, EvaluationRecord, MetricsLine, ScoresRecord, StepRecord

MakeRun = Callable[..., RunDir]
Pair = tuple[RunDir, RunDir]


@pytest.fixture
def pair(make_run: MakeRun) -> Pair:
    """Return two runs of one job that differ in nothing but their names."""
    return make_run("one", ("a", "b"), steps=30), make_run("other", ("a", "b"), steps=30)


def _edit_job(run: RunDir, old: str, new: str) -> None:
    text = run.read_bytes("job.yaml").decode()
    assert old in text
    run.write_bytes("job.yaml", text.replace(old, new).encode())


def _change(run: RunDir, change: Callable[[MetricsLine], MetricsLine | None]) -> None:
    lines = [changed for line in run.read_metrics() if (changed := change(line)) is not None]
    run.delete("metrics.jsonl")
    run.append_metrics(lines)


def _raise_loss(step: int, by: float) -> Callable[[MetricsLine], MetricsLine]:
    def change(line: MetricsLine) -> MetricsLine:
        hit = isinstance(line, StepRecord) and line.step == step
        return line.model_copy(update={"loss": line.loss + by}) if hit else line

    return change


# ---- the comparison ----


def test_the_best_value_of_each_metric_is_marked(pair: Pair) -> None:
    first, second = pair
    scores = second.read_record("scores-test.json", ScoresRecord)
    better = {**scores.metrics, "accuracy": 0.9, "extra": 0.5}
    second.write_record("scores-test.json", scores.model_copy(update={"metrics": better, "loss": 0.3}))
    rows = {row.name: row for row in compare((first, second)).metrics}
    assert list(rows)[:3] == ["test accuracy", "test f1_macro", "test mcc"]
    assert rows["test accuracy"].values == ("0.7710", "0.9000") and rows["test accuracy"].best == (1,)
    assert rows["test loss"].values == ("0.4711", "0.3000") and rows["test loss"].best == (1,), "a lower loss is better"
    assert rows["validation accuracy"].best == (), "equal values"
    assert rows["test extra"].values == ("", "0.5000") and rows["test extra"].best == ()


def test_lower_is_better_if_the_plan_says_so(make_run: MakeRun) -> None:
    runs = [make_run(name, ("a", "b"), steps=30) for name in ("one", "other")]
    for run, value in zip(runs, (3.0, 2.0), strict=True):
        scores = run.read_record("scores-test.json", ScoresRecord)
        run.write_record("scores-test.json", scores.model_copy(update={"metrics": {"error_rate": value}}))
    rows = {row.name: row for row in compare(runs).metrics}
    assert rows["test error_rate"].best == (0,)
    for run in runs:
        run.write_bytes("plan.json", json.dumps({"metric": "error_rate", "metric_mode": "min"}).encode())
    rows = {row.name: row for row in compare(runs).metrics}
    assert rows["test error_rate"].best == (1,) and rows["test error_rate"].note == "lower is better"


def test_only_differing_job_keys_are_listed_with_their_effect_on_the_curve(pair: Pair) -> None:
    first, second = pair
    comparison = compare((first, second))
    assert comparison.job_differences == () and comparison.environment_differences == ()
    assert comparison.agreement[0] == "the losses of all 30 steps are bit-identical"
    _edit_job(second, "batch_size: 32}", "batch_size: 64}\ncluster: {workers: 4}\nparallel: {zero: 3}")
    environment = second.read_record("environment.json", EnvironmentRecord)
    packages = {**environment.packages, "torch": "2.12.0"}
    second.write_record("environment.json", environment.model_copy(update={"packages": packages, "workers": ()}))
    comparison = compare((first, second))
    assert [(row.name, *row.values, row.note) for row in comparison.job_differences] == [
        ("train.batch_size", "32", "64", "yes"),
        ("parallel.zero", '"auto"', "3", "no"),
        ("cluster.workers", "1", "4", "no"),
    ]
    changed = {row.name: row.values for row in comparison.environment_differences}
    assert changed == {"torch": ("2.13.0", "2.12.0"), "hosts": ("node-1", ""), "devices": ("cpu", "")}
    assert comparison.agreement == (), "the job files describe different curves"
    facts = {row.name: row.values for row in comparison.facts}
    assert facts["workers"] == ("1, ZeRO-0", "4, ZeRO-3") and facts["memory per worker"] == ("1.3 GiB", "")
    assert facts["model"] == ("models/minilm",) * 2 and facts["steps"] == ("30", "30")


def test_runs_of_different_tasks_are_compared_with_a_warning(make_run: MakeRun) -> None:
    first, second = make_run("one", ("a", "b"), steps=30), make_run("other", steps=30)
    second.delete("result.json")
    _edit_job(second, "data/dev.parquet", "data/other.parquet")
    comparison = compare((first, second))
    assert comparison.warnings == (
        "The runs have different tasks (text-classification, text-regression): their losses and metrics cannot be "
        "compared.",
        "The runs were validated on different data.",
        "Not finished: other.",
    )
    page = render_comparison(comparison)
    assert "Validation accuracy" in page and "Validation pearson" in page


def test_a_run_without_scores_shows_its_best_evaluation(pair: Pair) -> None:
    first, second = pair
    for name in ("scores-test.json", "scores-validation.json", "environment.json", "plan.json", "result.json"):
        second.delete(name)
    rows = {row.name: row for row in compare((first, second)).metrics}
    assert rows["test accuracy"].values[1] == "" and rows["validation accuracy"].values[1] != ""


def test_names_are_as_long_as_needed(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run("same", ("a", "b"), steps=30)
    (tmp_path / "elsewhere").mkdir()
    os.rename(tmp_path / "same", tmp_path / "elsewhere" / "same")
    again = make_run("same", ("a", "b"), steps=30)
    moved = RunDir(str(tmp_path / "elsewhere" / "same"))
    assert compare((moved, again)).names == ("elsewhere/same", f"{tmp_path.name}/same")
    with pytest.raises(RunError, match=r"same: is listed twice; give different runs"):
        compare((run, RunDir(run.uri + "/")))


def test_a_run_without_metrics_is_refused(make_run: MakeRun, begun: RunDir) -> None:
    with pytest.raises(RunError, match=r"begun: has no metrics yet \(metrics\.jsonl\); train it for some steps first"):
        compare((make_run("one", ("a", "b"), steps=30), begun))


# ---- the page ----


def test_the_page_is_complete_and_works_offline(make_run: MakeRun, hostile: str) -> None:
    runs = [make_run(f"run-{i}", (hostile, hostile + "2"), steps=30, comment=hostile) for i in range(9)]
    for run in runs:
        scores = run.read_record("scores-test.json", ScoresRecord)
        run.write_record("scores-test.json", scores.model_copy(update={"metrics": {hostile: 0.5}}))
        _change(
            run,
            lambda line: line.model_copy(update={"metrics": {hostile: 0.5}}) if line.kind == "evaluation" else line,
        )
    _edit_job(runs[1], "models/minilm", json.dumps(hostile))
    text = render_comparison(compare(runs))
    before, data, *_ = re.split(r'<script type="application/json" id="figures">|</script>', text)
    assert "<script" not in before and "<img" not in before and not re.search(r"<[^>]*\ssrc=", before)
    assert "default-src &#39;none&#39;;" in before
    places = re.findall(r'data-figure="(.*?)"', before)
    figures = json.loads(data)
    assert places == list(figures)
    loss = figures["compare-0"]["data"]
    assert len(loss) == 18 and [trace["legendgroup"] for trace in loss[:2]] == ["run-0", "run-0"]
    assert [trace["showlegend"] for trace in loss[:2]] == [False, True], "a click on the name hides both"
    assert loss[1]["line"]["dash"] == "solid" and loss[17]["line"]["dash"] == "dash", "an eighth run is dashed"
    assert loss[1]["line"]["width"] > loss[3]["line"]["width"], "the first of equal curves can be seen below the others"
    assert "★" not in text, "all values are equal"


def test_the_page_is_written_atomically_and_never_over_another_file(pair: Pair, tmp_path: Path) -> None:
    comparison = compare(pair)
    target = tmp_path / "pages" / "compare.html"
    assert write_comparison(comparison, target) == target
    assert MARK in target.read_bytes()[:2048]
    write_comparison(comparison, target)
    assert os.listdir(target.parent) == ["compare.html"]
    for name, content in (("notes.html", b"<html>notes</html>"), ("empty.html", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(RunError, match=rf"--output: .*{name} is not a comparison page and would be overwritten"):
            write_comparison(comparison, tmp_path / name)
        assert (tmp_path / name).read_bytes() == content
    with pytest.raises(RunError, match="is not a comparison page"):
        write_comparison(comparison, tmp_path)
    with pytest.raises(RunError, match=r"--output: .*notes\.html/compare\.html cannot be written"):
        write_comparison(comparison, tmp_path / "notes.html" / "compare.html")
    assert stat.S_ISREG(target.stat().st_mode)


# ---- two curves ----


def test_bit_identical_curves(pair: Pair) -> None:
    result = compare_curves(*map(collect, pair))
    assert result.is_same_curve and result.identical_steps == 30 and result.evaluations == 10
    assert result.sentences == (
        "the losses of all 30 steps are bit-identical",
        "the metrics of all 10 evaluations agree within 1e-05",
    )


def test_curves_within_the_tolerance(pair: Pair) -> None:
    first, second = pair
    _change(second, _raise_loss(7, 3e-6))
    result = compare_curves(collect(first), collect(second))
    assert (
        result.is_same_curve
        and result.identical_steps == 29
        and result.largest_difference == pytest.approx(3e-6, rel=1e-3)
    )
    assert result.sentences[0] == (
        "the losses of all 30 steps agree within 1e-05 (largest difference 3e-06; 29 of 30 steps are bit-identical)"
    )


def test_the_first_step_that_differs_is_named_with_both_values(pair: Pair) -> None:
    first, second = pair
    _change(second, _raise_loss(20, 0.5))
    _change(second, _raise_loss(11, 2e-5))
    result = compare_curves(collect(first), collect(second))
    first, second = (next(s.loss for s in collect(run).steps if s.step == 11) for run in (first, second))
    assert not result.is_same_curve and result.loss_divergence is not None and result.loss_divergence.step == 11
    assert (
        result.sentences[0]
        == f"the loss curves differ: loss at step 11: {first!r} and {second!r}; 28 of 30 steps are bit-identical"
    )


@pytest.mark.parametrize(("value", "agrees"), [(math.nan, False), (math.inf, False)])
def test_a_non_finite_loss_agrees_only_with_the_same_value(pair: Pair, value: float, agrees: bool) -> None:
    def broken(line: MetricsLine) -> MetricsLine:
        hit = isinstance(line, StepRecord) and line.step == 5
        return line.model_copy(update={"loss": value}) if hit else line

    first, second = pair
    _change(second, broken)
    assert compare_curves(collect(first), collect(second)).is_same_curve is agrees
    _change(first, broken)
    assert compare_curves(collect(first), collect(second)).is_same_curve


def test_differing_evaluations_and_missing_steps_are_found(pair: Pair) -> None:
    first, second = pair

    def worse(line: MetricsLine) -> MetricsLine:
        hit = isinstance(line, EvaluationRecord) and line.step == 9
        return line.model_copy(update={"metrics": {**line.metrics, "accuracy": 0.25}}) if hit else line

    _change(second, worse)
    result = compare_curves(collect(first), collect(second))
    assert not result.is_same_curve and result.loss_divergence is None
    assert result.sentences[1].startswith("the evaluations differ: validation accuracy at step 9: 0.7")
    _change(second, lambda line: None if line.step > 20 else line)
    result = compare_curves(collect(first), collect(second))
    assert not result.is_same_curve and result.unmatched_steps == 10
    assert "10 steps are in only one of the runs" in result.sentences
    _change(second, lambda line: None)
    second.append_metrics([])
    assert compare_curves(collect(first), collect(second)).sentences == ("the runs have no step in common",)


def test_the_first_value_with_other_bits_is_found(pair: Pair) -> None:
    first, second = pair

    def differs() -> str | None:
        return find_first_difference(collect(first), collect(second))

    assert differs() is None

    def zero(sign: float) -> Callable[[MetricsLine], MetricsLine]:
        def change(line: MetricsLine) -> MetricsLine:
            hit = isinstance(line, StepRecord) and line.step == 25
            return line.model_copy(update={"loss": math.copysign(0.0, sign)}) if hit else line

        return change

    _change(first, zero(1))
    _change(second, zero(-1))
    assert differs() == "loss at step 25: 0.0 and -0.0"
    _change(
        second,
        lambda line: (
            line.model_copy(update={"metrics": {**line.metrics, "mcc": 0.5}})
            if isinstance(line, EvaluationRecord) and line.step == 21
            else line
        ),
    )
    assert (differs() or "").startswith("validation mcc at step 21: ")
    _change(second, lambda line: None if isinstance(line, StepRecord) and line.step == 7 else line)
    assert differs() == "loss at step 7 is in only one of the runs"


def test_names_of_runs_in_two_buckets_hold_no_keys() -> None:
    uris = ["s3://KEY:S3CR3T@one/runs/a", "s3://KEY:S3CR3T@two/runs/a"]
    assert _shorten_names(uris) == ("one/runs/a", "two/runs/a")
