"""The top of a report: the run in one line, and the tiles below it. Pure; runs on the client or the head."""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from launcher.formatting import format_duration, format_number, format_rounded
from launcher.report.collect import ReportData
from launcher.rundir.records import ScoresRecord


@dataclass(frozen=True)
class Tile:
    """One number on top of the page."""

    label: str
    value: str
    note: str = ""
    is_warning: bool = False


def summarize(data: ReportData) -> str:
    """Return the run in one line: its best known score, steps and time."""
    parts = [_describe_score(data)]
    if data.steps_done:
        parts += [f"{data.steps_done:,} steps", format_duration(data.elapsed_s)]
    if data.result is not None and data.result.stopped_early:
        parts.append("stopped early")
    if data.result is None and data.steps_done:
        parts.append("not finished")
    return f"{data.job.task.type}: " + ", ".join(part for part in parts if part)


def make_tiles(data: ReportData) -> tuple[Tile, ...]:
    """Return the headline numbers, the most important first."""
    tiles = _make_score_tiles(data)
    if data.steps_done:
        note = "so far" if data.result is None else ("stopped early" if data.result.stopped_early else "finished")
        tiles.append(Tile("Steps", f"{data.steps_done:,}", note))
    best = data.best_evaluation
    if best is not None:
        value = best.metrics.get(data.main_metric or "")
        note = "its weights are kept" if value is None else f"validation {data.main_metric} {format_number(value)}"
        tiles.append(Tile("Best step", f"{best.step:,}", note))
    if data.steps:
        # A median, so that a few slow steps do not count.
        rate = statistics.median(step.samples_per_s for step in data.steps)
        tiles.append(Tile("Rows per second", format_rounded(rate), "training, median over the steps"))
        tiles.append(Tile("Training time", format_duration(data.elapsed_s), "over all attempts"))
    broken = [step.step for step in data.steps if not math.isfinite(step.loss)]
    if broken:
        tiles.append(Tile("Non-finite loss", f"{len(broken):,} steps", f"first at step {broken[0]:,}", is_warning=True))
    for pair in data.leakage.leaks if data.leakage is not None else ():
        label = f"{pair.split.capitalize()} rows in {pair.other}"
        tiles.append(Tile(label, f"{pair.duplicates:,}", f"of {pair.rows:,}, the same inputs", is_warning=True))
    skipped = count_skipped_rows(data)
    if skipped:
        note = ", ".join(f"{split} {count:,}" for split, count in skipped.items())
        tiles.append(Tile("Skipped rows", f"{sum(skipped.values()):,}", note, is_warning=True))
    return tuple(tiles)


def count_skipped_rows(data: ReportData) -> Mapping[str, int]:
    """Return the number of invalid rows that were skipped, by split, without splits that have none."""
    counts = {"training": data.steps[-1].skipped_rows if data.steps else 0}
    if data.result is not None:
        # The last log may lie before the last step.
        counts["training"] = data.result.skipped_rows
    if data.evaluations:
        counts["validation"] = data.evaluations[-1].skipped_rows
    # Scores last: every row of the split was read for them.
    counts |= {record.split: record.skipped_rows for record in data.scores}
    return {split: count for split, count in counts.items() if count}


def baseline_name(record: ScoresRecord) -> str:
    """Return the word for the baseline: "chance" for classes, "baseline" for numbers."""
    # A regression has neither: predicting the mean is no matter of chance.
    return "chance" if record.classes or record.confusion is not None else "baseline"


def _describe_score(data: ReportData) -> str:
    metric = data.main_metric
    for record in data.scores:
        if metric in record.metrics:
            baseline = record.baseline.get(metric)
            note = f" ({baseline_name(record)} {format_rounded(baseline)})" if baseline is not None else ""
            return f"{metric} {format_rounded(record.metrics[metric])} on {record.split}{note}"
    best = data.best_evaluation
    if best is not None and metric in best.metrics:
        return f"{metric} {format_rounded(best.metrics[metric])} on validation"
    return f"training loss {format_rounded(data.steps[-1].loss)}" if data.steps else "nothing is logged yet"


def _make_score_tiles(data: ReportData) -> list[Tile]:
    metric = data.main_metric
    tiles = []
    for record in data.scores:
        if metric in record.metrics:
            baseline = record.baseline.get(metric)
            note = f"{baseline_name(record)} {format_number(baseline)}" if baseline is not None else "no baseline"
            tiles.append(Tile(f"{metric} on {record.split}", format_number(record.metrics[metric]), note))
    best = data.best_evaluation
    if not tiles and best is not None and metric in best.metrics:
        tiles.append(Tile(f"{metric} on validation", format_number(best.metrics[metric]), "best so far"))
    if not tiles and data.steps:
        tiles.append(Tile("Training loss", format_number(data.steps[-1].loss), f"step {data.steps[-1].step:,}"))
    return tiles
