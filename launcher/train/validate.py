"""Exact, streaming evaluation: metric states are merged, logits are never gathered, rows are counted.

Runs in train workers.
"""

import base64
import heapq
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist

from launcher.data.rank_batches import GlobalBatch, LocalBatch, collate
from launcher.data.splits import Split
from launcher.data.stream import Evaluation
from launcher.errors import RowCountError, TrainingError
from launcher.rundir.records import DocumentRow, EvaluationRecord, GenerationRecord, ScoresRecord, WorstRow
from launcher.tasks.base import Task
from launcher.tasks.results import RowResult, TaskMetrics, rounded
from launcher.tasks.samples import Batch, Outputs
from launcher.train.coupled import concatenate, gather_outputs, row_ids, without_fillers
from launcher.train.engine import Engine
from launcher.train.oom import is_out_of_memory, out_of_memory_message, release_cached_memory, split_micro_batches

_MAX_WORST = 20
_GENERATED_ROWS = 4


@dataclass(frozen=True)
class _WorstSample:
    """A row with a large loss. Ordered by loss, then row, so that ties are merged alike on every rank."""

    loss: float
    row: int
    result: RowResult

    def __lt__(self, other: "_WorstSample") -> bool:
        return (self.loss, -self.row) < (other.loss, -other.row)


@dataclass(frozen=True)
class _ScoredBatch:
    """Outputs and losses of a micro-batch of B rows, or of a filler."""

    samples: pa.Table
    batch: Batch
    outputs: Outputs
    losses_B: torch.Tensor | None
    """None where the loss depends on other micro-batches too."""

    @property
    def is_filler(self) -> bool:
        # A micro-batch holds rows or one filler, never both (data/rank_batches.py).
        return not row_ids(self.samples)


@dataclass(frozen=True)
class Scores:
    """Result of one pass over a split; equal on every rank."""

    split: Split
    step: int
    loss: float
    rows: int
    skipped_rows: int
    metrics: dict[str, float]
    seconds: float
    states: TaskMetrics
    worst: tuple[_WorstSample, ...]

    def line(self, best: bool) -> EvaluationRecord:
        """Return the scores as a line of metrics.jsonl."""
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
        """Return the scores with tables and the worst rows, whose inputs are read from the data again."""
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
            histogram=self.states.histogram(),
            worst=tuple(_worst_row(self.split, task, sample) for sample in self.worst),
            notes=self.states.notes(),
        )


def validate(engine: Engine, task: Task, batches: Evaluation, split: Split, step: int) -> Scores:
    """Score every row of a split exactly once. Collective.

    Args:
        engine: Model to evaluate, with averaged weights if there are any.
        task: Defines losses and metrics.
        batches: Batches of this rank.
        split: Split they come from.
        step: Number of optimizer steps completed.

    Raises:
        RowCountError: The number of scored rows is not the one in the file footers.
    """
    started = time.monotonic()
    task = task.for_evaluation()
    metrics = task.metrics(engine.device)
    # A global batch has rows of one source (data/windows.py), so each source of a mixture has states of its own.
    by_source = [task.metrics(engine.device) for _ in split.sources]
    # Loss and rows of this rank for each source, of all rows without a mixture. In float64, as a sum over millions of
    # rows in fp32 loses the small terms.
    sums = torch.zeros(max(1, len(split.sources)), 2, dtype=torch.float64, device=engine.device)
    weights = np.zeros(len(sums))
    local_worst: list[_WorstSample] = []
    with engine.evaluation_mode():
        for batch in batches:
            # Not reduced over ranks below: each header has the weight of its whole global batch.
            source = int(np.argmax(batch.global_batch.source_weights or (0.0,)))
            weights[source] += batch.global_batch.weight
            states = [metrics, *by_source[source : source + 1]]
            sums[source] += _score(engine, task, batch, states, local_worst)
    # Known after the last batch. Only rank 0's shards count skipped rows, so the sum counts each row once.
    skipped = torch.tensor([float(batches.skipped_rows)], dtype=torch.float64, device=engine.device)
    merged = torch.cat([sums.flatten(), skipped])
    # One all-reduce and one host-device sync for all numbers.
    dist.all_reduce(merged)
    *numbers, skipped_rows = merged.tolist()
    losses, counts = numbers[0::2], numbers[1::2]
    rows = sum(counts)
    # The numbers are merged, so all ranks raise or none. A row that is lost or read twice would change the score
    # without an error.
    if int(rows) + int(skipped_rows) != split.rows:
        raise RowCountError(
            f"{split.name}: {int(rows)} rows scored and {int(skipped_rows)} skipped, but the files hold {split.rows}; "
            "did the files change while the run was reading them?"
        )
    # Collective: torchmetrics merges the states of the ranks.
    values = metrics.compute()
    for index, part in enumerate(split.sources):
        named = {"loss": losses[index] / (float(weights[index]) or 1.0), **by_source[index].compute()}
        values |= {f"{part.name}/{name}": value for name, value in named.items()}
    return Scores(
        split=split,
        step=step,
        loss=sum(losses) / (float(weights.sum()) or 1.0),
        rows=int(rows),
        skipped_rows=int(skipped_rows),
        metrics=values,
        seconds=time.monotonic() - started,
        states=metrics,
        worst=_gather_worst(metrics, local_worst),
    )


def _gather_worst(metrics: TaskMetrics, local_worst: Sequence[_WorstSample]) -> tuple[_WorstSample, ...]:
    """Return the worst samples of all ranks, the worst one first. Collective."""
    completed = [replace(sample, result=metrics.complete(sample.row, sample.result)) for sample in local_worst]
    gathered: list[list[_WorstSample]] = [[] for _ in range(dist.get_world_size())]
    # Of pickles on the host: at most 20 rows of each rank.
    dist.all_gather_object(gathered, completed)
    return tuple(heapq.nlargest(_MAX_WORST, (sample for samples in gathered for sample in samples)))


def generate_samples(engine: Engine, task: Task, split: Split, step: int) -> list[GenerationRecord]:
    """Generate text for the first rows of a split; return nothing for tasks that do not generate. Collective.

    Every rank generates the same texts, so that ranks that hold the model in shards stay in lockstep.
    """
    if not task.generates:
        return []
    ids = np.arange(min(_GENERATED_ROWS, split.rows))
    whole = split.read(ids, task.input_columns + task.target_columns)
    rows = task.generation_prompts(whole.select(list(task.input_columns)))
    encoded = task.encode(rows, False)
    with engine.evaluation_mode():
        texts = task.predict(engine.model, encoded.samples).column("prediction").to_pylist()  # type: ignore[arg-type]  # a transformers model, kept as nn.Module
    inputs = [task.display_inputs(row) for row in rows.take(pa.array(encoded.valid_rows)).to_pylist()]
    targets = [task.display_target(row) for row in whole.take(pa.array(encoded.valid_rows)).to_pylist()]
    return [
        GenerationRecord(step=step, row=int(ids[index]), inputs=row.texts, prediction=text, target=target)
        for index, row, text, target in zip(encoded.valid_rows, inputs, texts, targets, strict=True)
    ]


def _score(
    engine: Engine, task: Task, batch: LocalBatch, metrics: Sequence[TaskMetrics], worst: list[_WorstSample]
) -> torch.Tensor:
    """Update metrics and worst samples with a batch; return the sum of its losses and its rows, float64 (2,)."""
    sums = torch.zeros(2, dtype=torch.float64, device=engine.device)
    scored = _forward_all(engine, task, batch)
    for part in _with_coupled_losses(task, list(scored)) if task.couples else scored:
        # Under ZeRO-3 the other ranks needed this forward pass.
        if part.is_filler:
            continue
        assert part.losses_B is not None
        for states in metrics:
            task.update_metrics(states, part.outputs, part.batch, part.samples)
        sums[0] += rounded(part.losses_B.double().sum())
        sums[1] += len(part.losses_B)
        _update_worst(task, worst, part, part.losses_B)
    return sums


def _forward_all(engine: Engine, task: Task, local: LocalBatch) -> Iterator[_ScoredBatch]:
    """Yield the outputs of each micro-batch, cut in halves where memory runs out."""
    queue = list(local.micro_batches)
    while queue:
        samples = queue.pop(0)
        scored = _forward(engine, task, samples, local.global_batch)
        # Only whole micro-batches are yielded: halves of a failed attempt must not count twice. Without ZeRO-3 a
        # forward pass is no collective, so this rank may run more passes.
        if scored is None:
            release_cached_memory()
            queue[:0] = split_micro_batches([samples], -(-len(samples) // 2))
        else:
            yield scored


def _with_coupled_losses(task: Task, scored: list[_ScoredBatch]) -> Iterator[_ScoredBatch]:
    """Yield micro-batches with the losses of their rows among those of the global batch. Collective."""
    rows = [row for part in scored for row in row_ids(part.samples)]
    gathered = gather_outputs(concatenate([without_fillers(part.outputs, part.samples) for part in scored]), rows)
    losses = task.coupled_losses(gathered.outputs)[gathered.own]
    begin = 0
    for part in scored:
        end = begin + len(row_ids(part.samples))
        yield replace(part, losses_B=losses[begin:end])
        begin = end


def _forward(engine: Engine, task: Task, samples: pa.Table, global_batch: GlobalBatch) -> _ScoredBatch | None:
    """Run the model on a micro-batch; return None if memory ran out."""
    try:
        batch = collate(task, samples, global_batch).to(engine.device)
        outputs = engine.forward(task, batch)
        return _ScoredBatch(samples, batch, outputs, None if task.couples else task.sample_losses(outputs, batch))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        # ZeRO-3 gathers weights in lockstep: the other ranks could not follow additional passes.
        if len(samples) == 1 or engine.zero == 3:
            raise TrainingError(out_of_memory_message(f"evaluation on rank {engine.rank}", len(samples))) from None
        # Its frames hold the tensors of the attempt.
        error.__traceback__ = None
    return None


def _update_worst(task: Task, worst: list[_WorstSample], scored: _ScoredBatch, losses_B: torch.Tensor) -> None:
    """Keep the rows with the largest losses in a heap; predictions are decoded for these only."""
    rows = row_ids(scored.samples)
    # A host-device sync, in evaluation only. A loss that is no number is not compared.
    losses = {i: loss for i, loss in enumerate(losses_B.float().tolist()) if not math.isnan(loss)}
    # By loss and row, as `_WorstSample` is ordered: rows of equal losses must not depend on the number of workers.
    smallest = (worst[0].loss, -worst[0].row) if len(worst) == _MAX_WORST else (-math.inf, 0)
    largest = heapq.nlargest(_MAX_WORST, losses, key=lambda i: (losses[i], -rows[i]))
    chosen = [i for i in largest if (losses[i], -rows[i]) > smallest]
    if not chosen:
        return
    results = task.row_results(scored.outputs, scored.batch, scored.samples, chosen)
    for i, result in zip(chosen, results, strict=True):
        sample = _WorstSample(losses[i], rows[i], result)
        if len(worst) < _MAX_WORST:
            heapq.heappush(worst, sample)
        else:
            heapq.heappushpop(worst, sample)


def _worst_row(split: Split, task: Task, sample: _WorstSample) -> WorstRow:
    file, file_row = split.locate(sample.row)
    inputs = task.display_inputs(split.read(np.array([sample.row]), task.input_columns).to_pylist()[0])
    return WorstRow(
        row=sample.row,
        file=file,
        file_row=file_row,
        loss=sample.loss,
        inputs=inputs.texts,
        target=sample.result.target,
        prediction=sample.result.prediction,
        marks=sample.result.marks,
        documents=_documents(split, task, sample),
        image=_data_uri(inputs.image),
    )


def _documents(split: Split, task: Task, sample: _WorstSample) -> tuple[DocumentRow, ...]:
    """Return ranked documents with their texts, which are read from the data again."""
    documents = sample.result.documents
    owners = [sample.row if document.row is None else document.row for document in documents]
    ids = np.unique(np.array(owners, np.int64))
    columns = task.input_columns + task.target_columns
    rows = dict(zip(ids.tolist(), split.read(ids, columns).to_pylist() if documents else (), strict=True))
    return tuple(
        DocumentRow(
            rank=document.rank,
            score=document.score,
            is_true=document.is_true,
            text=task.document_text(rows[owner], document.position),
        )
        for owner, document in zip(owners, documents, strict=True)
    )


def _data_uri(image: bytes | None) -> str | None:
    if image is None:
        return None
    kind = "jpeg" if image[:2] == b"\xff\xd8" else "webp" if image[8:12] == b"WEBP" else "png"
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"
