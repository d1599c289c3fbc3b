"""The top of the report: a verdict in one line and the tiles under it. Pure; runs on the client or the head."""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from launcher.report.collect import ReportData
from launcher.report.numbers import duration, number, short
from launcher.rundir.records import ScoresRecord


@dataclass(frozen=True)
class Tile:
    """One number on top of the page."""

    label: str
    value: str
    note: str = ""
    warns: bool = False


def verdict(data: ReportData) -> str:
    """The run in one line."""
    parts = [_headline_score(data)]
    if data.steps_done:
        parts.append(f"{data.steps_done:,} steps")
        parts.append(duration(_elapsed_s(data)))
    if data.result is not None and data.result.stopped_early:
        parts.append("stopped early")
    if data.result is None and data.steps_done:
        parts.append("not finished")
    return f"{data.job.task.type}: " + ", ".join(part for part in parts if part)


def tiles(data: ReportData) -> tuple[Tile, ...]:
    """The headline numbers, the most important first."""
    found = [*_score_tiles(data)]
    if data.steps_done:
        note = "" if data.result is None else ("stopped early" if data.result.stopped_early else "finished")
        found.append(Tile("Steps", f"{data.steps_done:,}", note or "so far"))
    if data.best is not None:
        found.append(Tile("Best step", f"{data.best.step:,}", _best_note(data)))
    if data.steps:
        rate = statistics.median(step.samples_per_s for step in data.steps)
        found.append(Tile("Rows per second", short(rate), "training, median over the steps"))
        found.append(Tile("Training time", duration(_elapsed_s(data)), "over all attempts"))
    broken = [step.step for step in data.steps if not math.isfinite(step.loss)]
    if broken:
        found.append(Tile("Loss not finite", f"{len(broken):,} steps", f"the first is step {broken[0]:,}", warns=True))
    for pair in data.leakage.leaks if data.leakage is not None else ():
        label = f"{pair.split.capitalize()} rows in {pair.other}"
        found.append(Tile(label, f"{pair.duplicates:,}", f"of {pair.rows:,}, the same inputs", warns=True))
    skipped = skipped_rows(data)
    if skipped:
        note = ", ".join(f"{where} {count:,}" for where, count in skipped.items())
        found.append(Tile("Skipped rows", f"{sum(skipped.values()):,}", note, warns=True))
    return tuple(found)


def skipped_rows(data: ReportData) -> Mapping[str, int]:
    """Rows that could not be used, by where they were left out; only where there were any."""
    counts = {"training": data.steps[-1].skipped_rows if data.steps else 0}
    if data.result is not None:
        counts["training"] = data.result.skipped_rows
    if data.evaluations:
        counts["validation"] = data.evaluations[-1].skipped_rows
    counts |= {record.split: record.skipped_rows for record in data.scores}
    return {where: count for where, count in counts.items() if count}


def baseline_word(record: ScoresRecord) -> str:
    """What to call the baseline: classes are guessed by chance, numbers are not."""
    return "chance" if record.classes or record.confusion is not None else "baseline"


def _headline_score(data: ReportData) -> str:
    metric = data.main_metric
    for record in data.scores:
        if metric in record.metrics:
            known = metric in record.baseline
            beside = f" ({baseline_word(record)} {short(record.baseline[metric])})" if known else ""
            return f"{metric} {short(record.metrics[metric])} on {record.split}{beside}"
    if data.best is not None and metric in data.best.metrics:
        return f"{metric} {short(data.best.metrics[metric])} on validation"
    return f"training loss {short(data.steps[-1].loss)}" if data.steps else "nothing is logged yet"


def _score_tiles(data: ReportData) -> list[Tile]:
    metric = data.main_metric
    found = []
    for record in data.scores:
        if metric in record.metrics:
            known = metric in record.baseline
            note = f"{baseline_word(record)} {number(record.baseline[metric])}" if known else "no baseline"
            found.append(Tile(f"{metric} on {record.split}", number(record.metrics[metric]), note))
    if not found and data.best is not None and metric in data.best.metrics:
        found.append(Tile(f"{metric} on validation", number(data.best.metrics[metric]), "best so far"))
    if not found and data.steps:
        found.append(Tile("Training loss", number(data.steps[-1].loss), f"step {data.steps[-1].step:,}"))
    return found


def _best_note(data: ReportData) -> str:
    metric = data.main_metric
    if data.best is None or metric not in data.best.metrics:
        return "its weights are kept"
    return f"validation {metric} {number(data.best.metrics[metric])}"


def _elapsed_s(data: ReportData) -> float:
    if data.result is not None:
        return data.result.elapsed_s
    return data.steps[-1].elapsed_s if data.steps else 0.0
