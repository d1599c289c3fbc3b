"""Evaluation, exact and streaming: metric states are merged, logits never gathered, rows counted. Train workers."""

import base64
import heapq
import time
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist

from launcher.data.rank_batches import LocalBatch, collate
from launcher.data.splits import Split
from launcher.data.stream import Evaluation
from launcher.errors import RowCountError, TrainingError
from launcher.rundir.records import EvaluationRecord, GenerationRecord, ScoresRecord, WorstRow
from launcher.tasks.base import RowResult, Task, TaskMetrics
from launcher.train.engine import Engine
from launcher.train.oom import is_out_of_memory, out_of_memory_message, release_cached_memory, split_micro_batches

# As many as people read.
_WORST = 20
_DEMONSTRATED = 4


@dataclass(frozen=True)
class _WorstSample:
    """A row the model was wrong about; ordered by loss, then row, so that ties merge the same everywhere."""

    loss: float
    row: int
    verdict: RowResult

    def __lt__(self, other: "_WorstSample") -> bool:
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
    mistakes: tuple[_WorstSample, ...]

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
        RowCountError: the number of scored rows is not what the file footers say.
    """
    started, task = time.monotonic(), task.for_evaluation()
    metrics = task.metrics(engine.device)
    sums = torch.zeros(2, dtype=torch.float64, device=engine.device)  # loss, rows: this worker's
    weight, mistakes = 0.0, list[_WorstSample]()
    with engine.evaluation_mode():
        for share in shares:
            weight += share.global_batch.weight
            sums += _score(engine, task, share, metrics, mistakes)
    skipped = torch.tensor([float(shares.skipped_rows)], dtype=torch.float64, device=engine.device)
    merged = torch.cat([sums, skipped])
    dist.all_reduce(merged)
    loss, rows, skipped_rows = merged.tolist()
    if int(rows) + int(skipped_rows) != split.rows:
        raise RowCountError(
            f"{split.name}: {int(rows)} rows scored and {int(skipped_rows)} skipped, but the files hold {split.rows}; "
            "did the files change while the run was reading them?"
        )
    values = metrics.compute()
    gathered: list[list[_WorstSample]] = [[] for _ in range(engine.world_size)]
    dist.all_gather_object(gathered, mistakes)
    worst = heapq.nlargest(_WORST, (m for part in gathered for m in part))
    seconds = time.monotonic() - started
    return Scores(
        split, step, loss / max(weight, 1e-12), int(rows), int(skipped_rows), values, seconds, metrics, tuple(worst)
    )


def generate_samples(engine: Engine, task: Task, split: Split, step: int) -> list[GenerationRecord]:
    """What the model writes for the first rows of a split, if it is a model that writes (a collective).

    Every worker generates the same, so that those who hold the model in shards stay in lockstep.
    """
    if not task.generates:
        return []
    ids = np.arange(min(_DEMONSTRATED, split.rows))
    rows = task.generation_prompts(split.read(ids, task.input_columns))
    encoded = task.encode(rows, False)
    with engine.evaluation_mode():
        written = task.predict(engine.model, encoded.samples).column("prediction").to_pylist()  # type: ignore[arg-type]  # a transformers model, kept as nn.Module
    shown = [task.display_inputs(row) for row in rows.take(pa.array(encoded.valid_rows)).to_pylist()]
    return [
        GenerationRecord(step=step, row=int(ids[kept]), inputs=row.texts, prediction=text)
        for kept, row, text in zip(encoded.valid_rows, shown, written, strict=True)
    ]


def _score(
    engine: Engine, task: Task, share: LocalBatch, metrics: TaskMetrics, mistakes: list[_WorstSample]
) -> torch.Tensor:
    total = torch.zeros(2, dtype=torch.float64, device=engine.device)
    waiting = list(share.micro_batches)
    while waiting:
        samples = waiting.pop(0)
        scored = _forward(engine, task, samples)
        if scored is None:  # memory ran out: two halves
            release_cached_memory()
            waiting[:0] = split_micro_batches([samples], -(-len(samples) // 2))
            continue
        logits, labels, losses, real = scored
        if not len(labels):
            continue  # a filler: the forward pass was for the other workers' sake
        metrics.update(logits, labels)
        total += torch.stack([losses.double().sum(), real.double().sum()])
        rows = [row for row in samples.column("__row").to_pylist() if row >= 0]
        _remember(task, mistakes, rows, (logits, labels, losses, samples))
    return total


def _forward(
    engine: Engine, task: Task, samples: pa.Table
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """Logits, labels and losses of the samples that are no fillers, and which these are; None when memory ran out."""
    try:
        batch = collate(task, samples).to(engine.device)
        logits = engine.logits(batch)
        real = batch.mask > 0
        logits, labels = logits[real], batch.labels[real]
        return logits, labels, task.sample_losses(logits, labels) if len(labels) else real, real
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        if len(samples) == 1 or engine.zero == 3:  # ZeRO-3 gathers in lockstep: the others could not follow
            raise TrainingError(out_of_memory_message(f"evaluation on rank {engine.rank}", len(samples))) from None
        error.__traceback__ = None  # its frames hold what was made
    return None


def _remember(
    task: Task,
    mistakes: list[_WorstSample],
    rows: list[int],
    scored: tuple[torch.Tensor, torch.Tensor, torch.Tensor, pa.Table],
) -> None:
    """Keep the rows with the largest losses; the predictions of all others are never looked at."""
    logits, labels, losses, samples = scored
    floor = mistakes[0].loss if len(mistakes) == _WORST else -1.0
    values = losses.float().cpu()  # a sync point; evaluation only
    chosen = [i for i in values.argsort(descending=True).tolist()[:_WORST] if float(values[i]) > floor]
    if not chosen:
        return
    verdicts = task.row_results(logits[chosen].cpu(), labels[chosen].cpu(), samples.take(pa.array(chosen)))
    for i, verdict in zip(chosen, verdicts, strict=True):
        mistake = _WorstSample(float(values[i]), rows[i], verdict)
        if len(mistakes) < _WORST:
            heapq.heappush(mistakes, mistake)
        else:
            heapq.heappushpop(mistakes, mistake)


def _worst_row(split: Split, task: Task, mistake: _WorstSample) -> WorstRow:
    file, file_row = split.locate(mistake.row)
    shown = task.display_inputs(split.read(np.array([mistake.row]), task.input_columns).to_pylist()[0])
    verdict = mistake.verdict
    return WorstRow(
        row=mistake.row, file=file, file_row=file_row, loss=mistake.loss, inputs=shown.texts,
        target=verdict.target, prediction=verdict.prediction, marks=verdict.marks, image=_data_uri(shown.image),
    )  # fmt: skip


def _data_uri(image: bytes | None) -> str | None:
    if image is None:
        return None
    kind = "jpeg" if image[:2] == b"\xff\xd8" else "webp" if image[8:12] == b"WEBP" else "png"
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"
