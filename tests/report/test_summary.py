"""The summary line and the tiles (`launcher/report/summary.py`)."""

import dataclasses
import math
from collections.abc import Callable

from launcher.report.collect import collect
from launcher.report.summary import make_tiles, summarize
from launcher.rundir.directory import RunDir
from launcher.rundir.records import EvaluationRecord, ResultRecord


def test_summary_of_a_classifier(make_run: Callable[..., RunDir]) -> None:
    run = make_run("done", ("negative", "positive"), steps=400)
    assert (
        summarize(collect(run)) == "text-classification: accuracy 0.771 on test (chance 0.584), 400 steps, 1 min 24 s"
    )


def test_summary_of_a_regression_has_a_baseline(make_run: Callable[..., RunDir]) -> None:
    assert "pearson 0.787 on test (baseline 0), 20 steps, 4.2 s" in summarize(collect(make_run("done", steps=20)))


def test_summary_before_the_first_record(begun: RunDir) -> None:
    assert summarize(collect(begun)) == "text-classification: nothing is logged yet"
    assert make_tiles(collect(begun)) == ()


def test_summary_of_an_unfinished_run(make_run: Callable[..., RunDir]) -> None:
    run = make_run("running", ("a", "b"), steps=20)
    for name in ("result.json", "scores-test.json", "scores-validation.json"):
        run.delete(name)
    assert summarize(collect(run)) == "text-classification: accuracy 0.791 on validation, 20 steps, 4.2 s, not finished"
    assert make_tiles(collect(run))[0].note == "best so far"


def test_summary_says_stopped_early(make_run: Callable[..., RunDir]) -> None:
    run = make_run("early", ("a", "b"), steps=20)
    result = run.read_record("result.json", ResultRecord)
    run.write_record("result.json", result.model_copy(update={"stopped_early": True}))
    assert summarize(collect(run)).endswith("stopped early")


def test_tiles_show_the_baseline_and_warn_of_skipped_rows(make_run: Callable[..., RunDir]) -> None:
    by_label = {tile.label: tile for tile in make_tiles(collect(make_run("done", ("negative", "positive"))))}
    assert (by_label["accuracy on test"].value, by_label["accuracy on test"].note) == ("0.7710", "chance 0.5843")
    assert by_label["Best step"].value == "280"
    assert (by_label["Skipped rows"].value, by_label["Skipped rows"].note) == ("5", "training 3, test 2")
    assert [tile.label for tile in by_label.values() if tile.is_warning] == ["Skipped rows"]


def test_no_tile_without_skipped_rows(begun: RunDir) -> None:
    line = EvaluationRecord(
        split="validation", step=3, loss=1.0, metrics={}, rows=4, skipped_rows=0, seconds=1.0, best=True
    )
    begun.append_metrics([line])
    assert "Skipped rows" not in {tile.label for tile in make_tiles(collect(begun))}


def test_a_non_finite_loss_is_a_tile(make_run: Callable[..., RunDir]) -> None:
    data = collect(make_run("burst", ("a", "b"), steps=20))
    steps = tuple(line.model_copy(update={"loss": math.nan}) if line.step > 17 else line for line in data.steps)
    tile = next(tile for tile in make_tiles(dataclasses.replace(data, steps=steps)) if tile.label == "Non-finite loss")
    assert (tile.value, tile.note, tile.is_warning) == ("3 steps", "first at step 18", True)
