"""Global batches cut into parts, and these into shards, one per rank: built on data workers, opened on train workers.

Every global batch is cut into the same parts (virtual ranks) for any number of ranks, and each part into the same
micro-batches; a rank works off a contiguous range of parts. So whatever depends on a part has the same bits on any
number of workers. A shard is an Arrow IPC stream with one rank's samples of a window: the task's columns, the columns
`__step`, `__micro`, `__row` and `__mask`, and a header with the weight of each global batch. Read `stream.py` for what
builds them.
"""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from launcher.data.mixture import source_of
from launcher.data.sampler import RowIds
from launcher.tasks.base import Task
from launcher.tasks.samples import Batch, Encoded


@dataclass(frozen=True)
class GlobalBatch:
    """Facts of one global batch that are the same on every rank."""

    samples: int
    weight: float
    """Sum of the samples' weights. Each rank divides its sum of losses by it, so the loss does not depend on ranks."""
    micro_batches: int
    """Micro-batches of each part, fillers included: ranks must call forward and backward equally often."""
    totals: Mapping[str, float] = field(default_factory=dict)
    """Sum of each of `Task.normalizers` over all samples."""
    source_weights: tuple[float, ...] = ()
    """Weight of the samples of each source of a mixture; () without a mixture."""

    @property
    def divisor(self) -> float:
        """Return the weight; 1 for a batch whose rows are all skipped, as 0 / 0 would make its gradient NaN."""
        return self.weight or 1.0


@dataclass(frozen=True)
class ShardHeader:
    """Header of one window's shard for one rank."""

    kind: str
    """`train`, or the name of the split that is evaluated."""
    epoch: int
    first_step: int
    """Steps completed before the first step of this shard; for an evaluation, the step it belongs to."""
    is_last: bool
    """True in the last window of an evaluation."""
    skipped_rows: int
    """Unusable rows of the window. Only rank 0's shard has the count, so that a sum over ranks counts each once."""
    parts: tuple[int, ...]
    """Parts of this rank, ascending; -1 for one that consists of fillers."""
    steps: tuple[GlobalBatch, ...]


@dataclass(frozen=True)
class Part:
    """One part of a global batch."""

    index: int
    """Number of the part in its global batch; -1 if it consists of fillers."""
    micro_batches: tuple[pa.Table, ...]
    """Tables with the columns that the task encoded, `__row` (row id; -1 for a filler) and `__mask`. With packing they
    have `segments` too, and `__row` is the first sample's."""


@dataclass(frozen=True)
class LocalBatch:
    """One rank's parts of a global batch."""

    global_batch: GlobalBatch
    parts: tuple[Part, ...]

    @property
    def micro_batches(self) -> tuple[pa.Table, ...]:
        """Return the micro-batches of all parts, in order."""
        return tuple(samples for part in self.parts for samples in part.micro_batches)


@dataclass(frozen=True)
class BatchLayout:
    """Cut of a global batch into parts and shards."""

    world_size: int
    parts: int
    """Parts of a global batch (`train.virtual_ranks`), a power of two."""
    micro_batch: int | None
    """Sequences per micro-batch; None means all sequences of a part in one."""
    pack_length: int | None = None
    """Maximum length of a sequence of packed samples; None makes each sample a sequence."""
    normalizers: tuple[str, ...] = ()
    """Columns that are summed over each global batch (`Task.normalizers`)."""
    partner_columns: tuple[str, ...] = ()
    """Columns that each sample also gets from another row of its global batch (`Task.partner_columns`)."""
    source_starts: tuple[int, ...] = ()
    """First row id of each source of a mixture; () without a mixture."""

    def source_of(self, ids: RowIds) -> RowIds:
        """Return the index of the source of each row, int64 (n,); zeros without a mixture."""
        return source_of(self.source_starts or (0,), ids)

    def micro_batch_size(self, parts: list[list[RowIds]]) -> int:
        """Return the number of sequences of a full micro-batch of a global batch that is cut into these parts."""
        return self.micro_batch or max(1, *map(len, parts))

    def parts_of(self, rank: int) -> tuple[int, ...]:
        """Return the parts of a rank, filled up with -1: under ZeRO 2 and 3 all ranks must run equally many."""
        begin, end = rank * self.parts // self.world_size, (rank + 1) * self.parts // self.world_size
        most = -(-self.parts // self.world_size)
        return (*range(begin, end), *[-1] * (most - (end - begin)))


def cut_into_parts(batch: RowIds, lengths: RowIds, layout: BatchLayout, source: RowIds) -> list[list[RowIds]]:
    """Cut a global batch into parts: for each a list of sequences, each the positions of its samples.

    Nothing here depends on the number of ranks.

    Args:
        batch: Positions of the samples of the batch.
        lengths: Length of every sample of the window.
        layout: Number of parts, and packing.
        source: Source of every sample of the window; zeros without a mixture.
    """
    # No sequence is dropped to make parts equal: they may differ by one, and `build_shard` evens out the number of
    # calls.
    if layout.pack_length is None:
        # With length grouping the batch is sorted: a part has similar lengths, and little padding. The longest part is
        # followed by the shortest, and so on, so that any number of ranks gets about the same lengths.
        pieces = np.array_split(batch, layout.parts)
        order = [-1 - part // 2 if part % 2 else part // 2 for part in range(layout.parts)]
        return [[pieces[i][j : j + 1] for j in range(len(pieces[i]))] for i in order]
    # Packed sequences have no padding, so a part's time follows from its tokens and not from its number of samples.
    owner = _spread_evenly(lengths[batch], layout.parts)
    own = [batch[owner == part] for part in range(layout.parts)]
    # A sequence has samples of one source, so that the loss of each source is known.
    return [
        [
            sequence
            for i in np.unique(source[rows])
            for sequence in _pack(rows[source[rows] == i], lengths, layout.pack_length)
        ]
        for rows in own
    ]


def build_shard(
    encoded: Encoded,
    rows: RowIds,
    batches: Sequence[RowIds],
    assigned: Sequence[list[list[RowIds]]],
    rank: int,
    layout: BatchLayout,
) -> tuple[pa.Table, tuple[GlobalBatch, ...]]:
    """Gather one rank's sequences of each batch, cut into micro-batches.

    Args:
        encoded: Usable rows of the window.
        rows: Row ids of the window before encoding, int64 (n,).
        batches: Positions among the usable rows, from `cut_batches`.
        assigned: Result of `cut_into_parts` for each batch.
        rank: Rank that the shard is for.
        layout: Number of parts and ranks, micro-batch size, packing, and what the task needs of the whole batch.

    Returns:
        The sequences with their `__` columns, and the facts of each global batch.
    """
    ids = rows[encoded.valid_rows]
    source = layout.source_of(ids)
    sequences: list[RowIds] = []
    micro_of, mask, step_of, headers = [], [], [], []
    own_parts = layout.parts_of(rank)
    for step, (batch, parts) in enumerate(zip(batches, assigned, strict=True)):
        header = _describe_batch(encoded, batch, parts, source, layout)
        headers.append(header)
        own = [sequence for part in own_parts if part >= 0 for sequence in parts[part]]
        counts = [len(parts[part]) if part >= 0 else 0 for part in own_parts]
        micro, idle = _number_micro_batches(counts, layout.micro_batch_size(parts), header.micro_batches)
        # With length grouping the last sample is the shortest, so that a filler costs little.
        # An empty batch takes the first sample of the window: `handle_bad_rows` sees to it that there is one.
        filler = np.full(1, batch[-1] if len(batch) else 0, np.int64)
        # Fillers go behind the rank's own samples, not into place; `_local_batches` sorts by micro-batch.
        sequences += own + [filler] * len(idle)
        micro_of.append(np.concatenate([micro, idle]))
        mask.append(np.concatenate([np.ones(len(own), bool), np.zeros(len(idle), bool)]))
        step_of.append(np.full(len(own) + len(idle), step, np.int32))
    first = np.array([sequence[0] for sequence in sequences])
    is_real = np.concatenate(mask)
    # One gather for all steps of the window: one per step would pay the overhead of `take` for every column each time.
    table = encoded.samples.take(pa.array(np.concatenate(sequences)))
    if layout.pack_length is not None:
        table = _join_samples(table, np.array([len(sequence) for sequence in sequences]))
    if layout.partner_columns:
        partners = pa.array(_choose_partners(batches, len(ids))[first])
        for name in layout.partner_columns:
            table = table.append_column(f"partner_{name}", encoded.samples.column(name).take(partners))
    # A filler has row id -1 and mask 0, so that nothing counts it as the sample that it repeats.
    extra = {
        "__step": np.concatenate(step_of),
        "__micro": np.concatenate(micro_of).astype(np.int32),
        "__row": np.where(is_real, ids[first], -1),
        "__mask": is_real.astype(np.float32),
    }
    if layout.source_starts:
        extra["__source"] = source[first]
    for name, values in extra.items():
        table = table.append_column(name, pa.array(values))
    return table, tuple(headers)


def _describe_batch(
    encoded: Encoded, batch: RowIds, parts: list[list[RowIds]], source: RowIds, layout: BatchLayout
) -> GlobalBatch:
    """Return the facts of a global batch. Each rank computes the same: no collective has to agree on them at a step."""
    weights = encoded.weights[batch]
    by_source: tuple[float, ...] = ()
    if layout.source_starts:
        by_source = tuple(np.bincount(source[batch], weights, minlength=len(layout.source_starts)).tolist())
    return GlobalBatch(
        samples=len(batch),
        # Of the global batch, not of a rank: dividing by it makes the sum over ranks the mean.
        weight=float(weights.sum()),
        # At least one: a batch whose rows were all skipped is still a step of the plan.
        micro_batches=max(1, -(-max(map(len, parts)) // layout.micro_batch_size(parts))),
        totals={
            name: float(encoded.samples.column(name).take(pa.array(batch)).to_numpy().sum())
            for name in layout.normalizers
        },
        source_weights=by_source,
    )


def _number_micro_batches(counts: Sequence[int], size: int, micro_batches: int) -> tuple[RowIds, RowIds]:
    """Return the number of each sequence's micro-batch among all of a rank, and the micro-batches without any.

    Args:
        counts: Number of sequences of each of the rank's parts.
        size: Number of sequences of a full micro-batch.
        micro_batches: Number of micro-batches of every part.
    """
    numbers = np.concatenate([np.arange(count) // size + i * micro_batches for i, count in enumerate(counts)])
    # A part that has fewer micro-batches than the largest one runs fillers of weight zero: under ZeRO 2 and 3 every
    # forward and backward is a collective, and a rank that skipped one would leave the others waiting.
    return numbers, np.setdiff1d(np.arange(len(counts) * micro_batches), numbers)


def _choose_partners(batches: Sequence[RowIds], rows: int) -> RowIds:
    """Return the position of each usable row's partner: another row of its batch, int64 (rows,)."""
    partners = np.arange(rows)
    for batch in batches:
        # Neighbours in the window's order, which is shuffled, and not in the batch's, which is sorted by length.
        ordered = np.sort(batch)
        partners[ordered] = np.roll(ordered, -1)
    return partners


def _pack(positions: RowIds, lengths: RowIds, pack_length: int) -> list[RowIds]:
    """Pack samples into as few sequences of at most `pack_length` as `_spread_evenly` can fill."""
    # Start with the number of sequences that the total length fills; spreading evenly may need a few more.
    # The greedy spread is not optimal, but it is close and the same in every process.
    for count in range(max(1, -(-int(lengths[positions].sum()) // pack_length)), len(positions)):
        chosen = _spread_evenly(lengths[positions], count)
        # With weights `bincount` adds in float64, which is exact up to 2^53 tokens.
        if np.bincount(chosen, lengths[positions]).max() <= pack_length:
            return [positions[chosen == i] for i in range(count)]
    # Reached too where one sample alone exceeds the length: no number of sequences makes that one fit.
    return [positions[i : i + 1] for i in range(len(positions))]


def _spread_evenly(lengths: RowIds, parts: int) -> RowIds:
    """Return the part of each length: the longest first, each into the part with the least so far (Graham 1969)."""
    filled = np.zeros(parts, np.int64)
    chosen = np.empty(len(lengths), np.int64)
    # Ties go by position, in the stable sort and in `argmin`, so that every process gets the same parts.
    for i in np.argsort(-lengths, kind="stable"):
        chosen[i] = int(filled.argmin())
        filled[chosen[i]] += lengths[i]
    return chosen


def _join_samples(samples: pa.Table, counts: "np.ndarray") -> pa.Table:
    """Join consecutive samples into sequences of `counts` samples each; `segments` holds the samples' tokens.

    Columns that are no lists are dropped: only evaluations, which are not packed, read them.
    """
    bounds = np.concatenate([[0], np.cumsum(counts)])
    columns: dict[str, pa.Array] = {}
    for name in samples.column_names:
        lists = samples.column(name).combine_chunks()
        if not pa.types.is_list(lists.type):
            continue
        # `offsets` are positions in `values` also where the array is a slice; those in `flatten()` would begin at the
        # slice.
        offsets = lists.offsets.to_numpy()
        # Samples are joined by leaving out the offsets between them: the values are not copied.
        columns[name] = pa.ListArray.from_arrays(pa.array(offsets[bounds], pa.int32()), lists.values)
    sizes = pc.list_value_length(samples.column("input_ids")).combine_chunks().cast(pa.int32())
    segments = pa.ListArray.from_arrays(pa.array(bounds, pa.int32()), sizes)
    return pa.table(columns | {"segments": segments})


def repeat_sample(task: Task, samples: pa.Table, position: int, count: int, fill: int) -> Batch:
    """Return a micro-batch of `count` sequences, each with the same sample `fill` times."""
    table = samples.take(pa.array(np.full(count * fill, position, np.int64)))
    totals = {name: float(table.column(name).to_numpy().sum()) for name in task.normalizers}
    if task.pack_length is not None:
        table = _join_samples(table, np.full(count, fill))
    for name in task.partner_columns:
        table = table.append_column(f"partner_{name}", table.column(name))
    table = table.append_column("__row", pa.array(np.full(count, position, np.int64)))
    table = table.append_column("__mask", pa.array(np.ones(count, np.float32)))
    return collate(task, table, GlobalBatch(count, float(count), 1, totals))


def serialize_shard(table: pa.Table, header: ShardHeader) -> bytes:
    """Serialize a shard to the bytes that one row of Ray Data carries to its rank."""
    # The header travels in the schema: a shard is one buffer, and the train worker parses the header once per window.
    table = table.replace_schema_metadata({"launcher": json.dumps(asdict(header))})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        # One record batch: the reader gets each column as one chunk.
        writer.write_table(table.combine_chunks())
    return sink.getvalue().to_pybytes()  # type: ignore[no-any-return]  # pyarrow ships no types


def deserialize_shard(content: pa.Buffer) -> tuple[ShardHeader, Iterator[LocalBatch]]:
    """Return the header and the steps of a serialized shard. The samples are not copied."""
    # The table refers to the received buffer: as long as a step of the window is in use, the whole shard stays in
    # memory.
    table = pa.ipc.open_stream(content).read_all()
    raw = json.loads(table.schema.metadata[b"launcher"])
    steps = tuple(GlobalBatch(**step) for step in raw["steps"])
    header = ShardHeader(**{**raw, "parts": tuple(raw["parts"]), "steps": steps})
    return header, _local_batches(table.replace_schema_metadata(None), header)


def _local_batches(table: pa.Table, header: ShardHeader) -> Iterator[LocalBatch]:
    step_of = table.column("__step").to_numpy()
    micro_of = table.column("__micro").to_numpy()
    samples = table.drop_columns(["__step", "__micro"])
    for index, step in enumerate(header.steps):
        # Steps are in order in the table, so a binary search finds each; a mask per step would scan the whole window.
        begin, end = np.searchsorted(step_of, [index, index + 1])
        # Fillers were appended behind the samples of their step; a stable sort puts them into their micro-batch.
        order = np.argsort(micro_of[begin:end], kind="stable")
        # `take` copies, but one step at a time: a sorted copy of the window would double its memory.
        local = samples.slice(begin, end - begin).take(pa.array(order))
        count = step.micro_batches
        bounds = np.searchsorted(micro_of[begin:end][order], np.arange(len(header.parts) * count + 1)).tolist()
        tables = [local.slice(a, b - a) for a, b in itertools.pairwise(bounds)]
        parts = (Part(index, tuple(tables[i * count : (i + 1) * count])) for i, index in enumerate(header.parts))
        yield LocalBatch(step, tuple(parts))


def collate(task: Task, samples: pa.Table, global_batch: GlobalBatch) -> Batch:
    """Return one micro-batch of a global batch as tensors on the CPU; the mask is 0 for fillers."""
    # Not at the top: data workers import this module without paying for torch.
    import torch

    own = [name for name in ("__row", "__mask", "__source") if name in samples.column_names]
    batch = task.collate(samples.drop_columns(own))
    # Arrow's views are read-only, and `torch.from_numpy` warns of arrays that cannot be written: copy.
    mask = torch.from_numpy(samples.column("__mask").to_numpy().copy())
    source = torch.from_numpy(samples.column("__source").to_numpy().copy()) if "__source" in own else None
    totals = {"weight": global_batch.weight, **global_batch.totals}
    return replace(batch, mask=mask, source=source, totals=totals, rows=tuple(samples.column("__row").to_pylist()))
