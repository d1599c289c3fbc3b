"""Global batches as shares: what one worker gets of each step. Built in data workers, opened in train workers.

A share is an Arrow IPC stream: the worker's samples of a window, with `__step`, `__micro`, `__row` and `__mask` beside
the task's columns, and a header that tells each step's global weight. Read `stream.py` for who emits them.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa

from launcher.data.sampler import RowIds
from launcher.tasks.base import Batch, Encoded, Task


@dataclass(frozen=True)
class GlobalBatch:
    """One global batch, the same on every worker."""

    samples: int
    weight: float
    """Sum of the samples' weights: the loss is the sum of losses over this."""
    micro_batches: int
    """Micro-batches each worker runs, fillers included, so that all stay in lockstep."""


@dataclass(frozen=True)
class ShardHeader:
    """One window's share, for one worker."""

    kind: str
    """`train`, or the name of the split that is evaluated."""
    epoch: int
    first_step: int
    """Steps done before the first step of this share; for an evaluation, the step it belongs to."""
    last: bool
    """Whether this is the last window of an evaluation."""
    skipped_rows: int
    """Unusable rows of the window, told to rank 0 only so that a sum over workers counts each once."""
    steps: tuple[GlobalBatch, ...]


@dataclass(frozen=True)
class LocalBatch:
    """One worker's share of one global batch."""

    global_batch: GlobalBatch
    micro_batches: tuple[pa.Table, ...]
    """Each with the columns the task encoded, `__row` (row ids; -1 for a filler) and `__mask`; where samples are
    packed, `segments` beside them, and `__row` is the first one's."""


@dataclass(frozen=True)
class BatchLayout:
    """How a global batch is cut into shares: a matter of memory and speed, never of the result."""

    world_size: int
    micro_batch: int | None
    """Sequences per micro-batch; None takes the whole share at once."""
    pack_length: int | None = None
    """Length a sequence may have that several samples share; None makes every sample a sequence."""


def assign_to_ranks(batch: RowIds, lengths: RowIds, cut: BatchLayout) -> list[list[RowIds]]:
    """For each worker, positions that share a sequence each; once for all, as each must know the largest share."""
    if cut.pack_length is None:
        return [[batch[i : i + 1] for i in range(rank, len(batch), cut.world_size)] for rank in range(cut.world_size)]
    owner = _evenly(lengths[batch], cut.world_size)
    return [_pack(batch[owner == rank], lengths, cut.pack_length) for rank in range(cut.world_size)]


def build_shard(
    encoded: Encoded,
    rows: RowIds,
    batches: Sequence[RowIds],
    dealt: Sequence[list[list[RowIds]]],
    rank: int,
    cut: BatchLayout,
) -> tuple[pa.Table, tuple[GlobalBatch, ...]]:
    """One worker's sequences of each batch, cut into micro-batches.

    Args:
        encoded: the window's usable rows.
        rows: (n,) row ids of the window before encoding.
        batches: positions among the usable rows, from `cut_batches`.
        dealt: `assign_to_ranks` of each batch.
        rank: whose share.
        cut: workers, micro-batch and packing.

    Returns:
        The sequences with their `__` columns, and one header per batch.
    """
    ids = rows[encoded.valid_rows]
    sequences: list[RowIds] = []
    micro_of, mask, step_of, headers = [], [], [], []
    for step, (batch, shares) in enumerate(zip(batches, dealt, strict=True)):
        largest = max(len(share) for share in shares)
        size = cut.micro_batch or max(largest, 1)
        micro_batches = max(1, -(-largest // size))
        headers.append(GlobalBatch(len(batch), float(encoded.weights[batch].sum()), micro_batches))
        mine = shares[rank]
        micro = np.arange(len(mine)) // size
        # A worker without samples runs a filler of weight zero: ZeRO gathers and reduces in lockstep.
        idle = np.setdiff1d(np.arange(micro_batches), micro)
        filler = np.full(1, batch[-1] if len(batch) else 0, np.int64)
        sequences += mine + [filler] * len(idle)
        micro_of.append(np.concatenate([micro, idle]))
        mask.append(np.concatenate([np.ones(len(mine), bool), np.zeros(len(idle), bool)]))
        step_of.append(np.full(len(mine) + len(idle), step, np.int32))
    first = np.array([sequence[0] for sequence in sequences])
    real = np.concatenate(mask)
    table = encoded.samples.take(pa.array(np.concatenate(sequences)))
    if cut.pack_length is not None:
        table = _join(table, np.array([len(sequence) for sequence in sequences]))
    extra = {
        "__step": np.concatenate(step_of),
        "__micro": np.concatenate(micro_of).astype(np.int32),
        "__row": np.where(real, ids[first], -1),
        "__mask": real.astype(np.float32),
    }
    for name, values in extra.items():
        table = table.append_column(name, pa.array(values))
    return table, tuple(headers)


def _pack(mine: RowIds, lengths: RowIds, pack_length: int) -> list[RowIds]:
    """Positions put into as few sequences of at most `pack_length` as even filling allows."""
    # No packing needs fewer than their total length fills; even filling may need a few more.
    for count in range(max(1, -(-int(lengths[mine].sum()) // pack_length)), len(mine)):
        chosen = _evenly(lengths[mine], count)
        if np.bincount(chosen, lengths[mine]).max() <= pack_length:
            return [mine[chosen == i] for i in range(count)]
    return [mine[i : i + 1] for i in range(len(mine))]


def _evenly(lengths: RowIds, parts: int) -> RowIds:
    """For each length the part it goes to: the longest first, always into the emptiest (Graham 1969)."""
    filled = np.zeros(parts, np.int64)
    chosen = np.empty(len(lengths), np.int64)
    for i in np.argsort(-lengths, kind="stable"):
        chosen[i] = int(filled.argmin())
        filled[chosen[i]] += lengths[i]
    return chosen


def _join(samples: pa.Table, counts: "np.ndarray") -> pa.Table:
    """Consecutive samples end to end, `counts` of them a row; `segments` keeps their lengths.

    Every column must hold one list per sample, all of a sample's lists as long as the sample.
    """
    bounds = np.concatenate([[0], np.cumsum(counts)])
    columns: dict[str, pa.Array] = {}
    for name in samples.column_names:
        lists = samples.column(name).combine_chunks()
        offsets = lists.offsets.to_numpy()
        columns[name] = pa.ListArray.from_arrays(pa.array(offsets[bounds], pa.int32()), lists.values)
        sizes = np.diff(offsets)
    segments = pa.ListArray.from_arrays(pa.array(bounds, pa.int32()), pa.array(sizes, pa.int32()))
    return pa.table(columns | {"segments": segments})


def repeated(task: Task, samples: pa.Table, position: int, count: int, fill: int) -> Batch:
    """A micro-batch of `count` sequences, each of which holds the same sample `fill` times."""
    table = samples.take(pa.array(np.full(count * fill, position, np.int64)))
    if task.pack_length is not None:
        table = _join(table, np.full(count, fill))
    rows = np.full(count, position, np.int64)
    return collate(
        task, table.append_column("__row", pa.array(rows)).append_column("__mask", pa.array(np.ones(count, np.float32)))
    )


def serialize_shard(table: pa.Table, header: ShardHeader) -> bytes:
    """A share as bytes; one cell of the row that Ray Data carries to its worker."""
    table = table.replace_schema_metadata({"launcher": json.dumps(asdict(header))})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks())
    return sink.getvalue().to_pybytes()  # type: ignore[no-any-return]  # pyarrow ships no types


def deserialize_shard(content: pa.Buffer) -> tuple[ShardHeader, Iterator[LocalBatch]]:
    """The header and the steps of a packed share, without copying the samples."""
    table = pa.ipc.open_stream(content).read_all()
    raw = json.loads(table.schema.metadata[b"launcher"])
    header = ShardHeader(**{**raw, "steps": tuple(GlobalBatch(**step) for step in raw["steps"])})
    return header, _steps(table.replace_schema_metadata(None), header)


def _steps(table: pa.Table, header: ShardHeader) -> Iterator[LocalBatch]:
    step_of, micro_of = table.column("__step").to_numpy(), table.column("__micro").to_numpy()
    columns = [name for name in table.column_names if name not in ("__step", "__micro")]
    samples = table.select(columns)
    for index, step in enumerate(header.steps):
        begin, end = np.searchsorted(step_of, [index, index + 1])
        order = np.argsort(micro_of[begin:end], kind="stable")
        inside = samples.slice(begin, end - begin).take(pa.array(order))
        bounds = np.searchsorted(micro_of[begin:end][order], np.arange(step.micro_batches + 1))
        pairs = zip(bounds[:-1], bounds[1:], strict=True)
        yield LocalBatch(step, tuple(inside.slice(int(a), int(b - a)) for a, b in pairs))


def collate(task: Task, samples: pa.Table) -> Batch:
    """One micro-batch of a share as tensors; fillers are masked out."""
    import torch  # data workers use this module without torch

    batch = task.collate(samples.drop_columns(["__row", "__mask"]))
    return Batch(batch.inputs, batch.labels, torch.from_numpy(samples.column("__mask").to_numpy().copy()))
