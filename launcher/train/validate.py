"""Evaluation, exact and streaming: metric states are merged, logits never gathered, rows counted. Train workers."""

import heapq
import time
from collections.abc import Iterable
from dataclasses import dataclass

import pyarrow as pa
import torch
import torch.distributed as dist

from launcher.data.batches import StepShare, collate
from launcher.data.sources import Split
from launcher.data.stream import Evaluation
from launcher.errors import ExactnessError
from launcher.records import EvaluationRecord, ScoresRecord, WorstRow
from launcher.tasks.base import Task, TaskMetrics
from launcher.train.engine import Engine

# As many as people read.
_WORST = 20


@dataclass(frozen=True)
class _Mistake:
    """A row the model was wrong about; ordered by loss, then row, so that ties merge the same everywhere."""

    loss: float
    row: int
    target: str
    prediction: str

    def __lt__(self, other: "_Mistake") -> bool:
        return (self.loss, -self.row) < (other.loss, -other.row)


@dataclass(frozen=True)
class Scores:
    """What one pass over a split found; the same on every worker."""

    split: Split
    step: int
    loss: float
    rows: int
    skipped_rows: int
    metrics: dict[str, float]
    seconds: float
    states: TaskMetrics
    mistakes: tuple[_Mistake, ...]

    def line(self, best: bool) -> EvaluationRecord:
        """As one line of metrics.jsonl."""
        return EvaluationRecord(
            split=self.split.name,
            step=self.step,
            loss=self.loss,
            metrics=self.metrics,
            rows=self.rows,
            skipped_rows=self.skipped_rows,
            seconds=self.seconds,
            best=best,
        )

    def record(self, task: Task) -> ScoresRecord:
        """With tables and the worst rows' own text, read back from the data."""
        return ScoresRecord(
            split=self.split.name,
            step=self.step,
            loss=self.loss,
            rows=self.rows,
            skipped_rows=self.skipped_rows,
            metrics=self.metrics,
            baseline=self.states.baseline(),
            confusion=self.states.confusion(),
            classes=self.states.classes(),
            worst=tuple(_worst_row(self.split, task, mistake) for mistake in self.mistakes),
        )


def validate(engine: Engine, task: Task, shares: Evaluation, split: Split, step: int) -> Scores:
    """Score every row of a split exactly once (a collective).

    Raises:
        ExactnessError: the number of scored rows is not what the file footers say.
    """
    started = time.monotonic()
    metrics = task.metrics(engine.device)
    sums = torch.zeros(2, dtype=torch.float64, device=engine.device)  # loss, rows: this worker's
    weight, mistakes = 0.0, list[_Mistake]()
    with engine.evaluation_mode():
        for share in shares:
            weight += share.header.weight
            sums += _score(engine, task, share, metrics, mistakes)
    skipped = torch.tensor([float(shares.skipped_rows)], dtype=torch.float64, device=engine.device)
    merged = torch.cat([sums, skipped])
    dist.all_reduce(merged)
    loss, rows, skipped_rows = merged.tolist()
    if int(rows) + int(skipped_rows) != split.rows:
        raise ExactnessError(
            f"{split.name}: {int(rows)} rows scored and {int(skipped_rows)} skipped, but the files hold {split.rows}; "
            "did the files change while the run was reading them?"
        )
    values = metrics.compute()
    gathered: list[list[_Mistake]] = [[] for _ in range(engine.world_size)]
    dist.all_gather_object(gathered, mistakes)
    worst = heapq.nlargest(_WORST, (m for part in gathered for m in part))
    seconds = time.monotonic() - started
    return Scores(
        split, step, loss / max(weight, 1e-12), int(rows), int(skipped_rows), values, seconds, metrics, tuple(worst)
    )


def _score(
    engine: Engine, task: Task, share: StepShare, metrics: TaskMetrics, mistakes: list[_Mistake]
) -> torch.Tensor:
    total = torch.zeros(2, dtype=torch.float64, device=engine.device)
    for samples in share.micro_batches:
        batch = collate(task, samples).to(engine.device)
        logits = engine.logits(batch)
        real = batch.mask > 0
        if not bool(samples.column("__mask").to_numpy().any()):
            continue  # a filler: the forward pass was for the other workers' sake
        logits, labels = logits[real], batch.labels[real]
        losses = task.sample_losses(logits, labels)
        metrics.update(logits, labels)
        total += torch.stack([losses.double().sum(), real.double().sum()])
        rows = [row for row in samples.column("__row").to_pylist() if row >= 0]
        _remember(task, mistakes, rows, (logits, labels, losses))
    return total


def _remember(
    task: Task, mistakes: list[_Mistake], rows: list[int], scored: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
) -> None:
    """Keep the rows with the largest losses; the predictions of all others are never looked at."""
    logits, labels, losses = scored
    floor = mistakes[0].loss if len(mistakes) == _WORST else -1.0
    values = losses.float().cpu()  # a sync point; evaluation only
    chosen = [i for i in values.argsort(descending=True).tolist()[:_WORST] if float(values[i]) > floor]
    if not chosen:
        return
    predictions = task.predict(logits[chosen]).column("prediction").to_pylist()
    for i, prediction in zip(chosen, predictions, strict=True):
        mistake = _Mistake(float(values[i]), rows[i], task.target_text(labels[i].tolist()), _text(prediction))
        if len(mistakes) < _WORST:
            heapq.heappush(mistakes, mistake)
        else:
            heapq.heappushpop(mistakes, mistake)


def _text(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _worst_row(split: Split, task: Task, mistake: _Mistake) -> WorstRow:
    import numpy as np

    file, file_row = split.locate(mistake.row)
    columns = task.input_columns
    values: Iterable[pa.Table] = split.read(np.array([mistake.row]), columns).to_pylist()
    row = next(iter(values))
    inputs = {name: str(row[name]) for name in columns}
    return WorstRow(
        row=mistake.row, file=file, file_row=file_row, loss=mistake.loss, inputs=inputs,
        target=mistake.target, prediction=mistake.prediction,
    )  # fmt: skip
