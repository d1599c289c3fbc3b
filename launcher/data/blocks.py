"""Encoded rows as they are kept: a block is some consecutive rows of a split, ready for the model. Any worker.

Read `encoded_cache.py` for blocks on disk, `in_memory.py` for whole splits in memory.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow as pa

from launcher.data.sampler import RowIds
from launcher.tasks.base import Encoded

_DIGEST = 64
"""Bytes before the Arrow file: its sha256 in hex, which also keeps its buffers aligned."""
_LENGTH, _WEIGHT, _PLACE, _REASONS, _ROWS = "launcher.length", "launcher.weight", "launcher.place", "reasons", "rows"


class BlockError(ValueError):
    """A file is no whole block."""


@dataclass(frozen=True)
class Block:
    """Consecutive rows of a split, encoded.

    Args:
        samples: of the rows that can be used, in order.
        lengths: int64 (samples,).
        weights: float64 (samples,).
        place: int64 (rows,) position of each row among the samples; -1 where it cannot be used.
        reasons: why not, by row of the block.
    """

    samples: pa.Table
    lengths: RowIds
    weights: np.ndarray
    place: RowIds
    reasons: dict[int, str]

    @staticmethod
    def of(parts: Sequence[Encoded], rows: Sequence[int]) -> "Block":
        """From consecutive encoded parts of so many rows each."""
        starts = np.concatenate([[0], np.cumsum(rows)]).astype(np.int64)
        place = np.full(int(starts[-1]), -1, np.int64)
        kept = np.concatenate([start + part.valid_rows for start, part in zip(starts[:-1], parts, strict=True)])
        place[kept] = np.arange(len(kept))
        return Block(
            pa.concat_tables([part.samples for part in parts], promote_options="permissive").combine_chunks(),
            np.concatenate([part.lengths for part in parts]),
            np.concatenate([part.weights for part in parts]),
            place,
            {int(start) + at: why for start, part in zip(starts[:-1], parts, strict=True) for at, why in part.problems},
        )

    def slice(self, begin: int, stop: int) -> "Block":
        """The rows from `begin` to `stop`."""
        places = self.place[begin:stop]
        usable = places[places >= 0]
        first, end = (int(usable[0]), int(usable[-1]) + 1) if len(usable) else (0, 0)
        return Block(
            self.samples.slice(first, end - first),
            self.lengths[first:end],
            self.weights[first:end],
            np.where(places >= 0, places - first, -1),
            {row - begin: why for row, why in self.reasons.items() if begin <= row < stop},
        )

    def take(self, rows: RowIds) -> Encoded:
        """Some rows of the block, as `Task.encode` gives them."""
        places = self.place[rows]
        kept = np.flatnonzero(places >= 0)
        chosen = places[kept]
        problems = tuple((int(i), self.reasons[int(rows[i])]) for i in np.flatnonzero(places < 0))
        return Encoded(self.samples.take(pa.array(chosen)), kept, self.lengths[chosen], self.weights[chosen], problems)

    def write(self, file: IO[bytes]) -> int:
        """As a file: the sha256 of the rest in hex, then an Arrow file; returns its bytes."""
        usable = np.flatnonzero(self.place >= 0)
        extra = {_LENGTH: self.lengths, _WEIGHT: self.weights, _PLACE: usable}
        table = self.samples.combine_chunks()
        for name, values in extra.items():
            table = table.append_column(name, pa.array(values))
        said = {_REASONS: json.dumps(self.reasons), _ROWS: str(len(self.place))}
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, table.schema.with_metadata(said)) as writer:
            writer.write_table(table)
        content = sink.getvalue()
        return file.write(hashlib.sha256(content).hexdigest().encode()) + file.write(content)

    @staticmethod
    def open(path: Path) -> "Block":
        """A file of `write`, mapped into memory: what is not taken is not read again.

        Raises:
            FileNotFoundError: there is none.
            BlockError: it is cut short or damaged.
        """
        if path.stat().st_size <= _DIGEST:
            raise BlockError(f"{path}: cut short")
        whole = pa.memory_map(str(path)).read_buffer()
        content = whole.slice(_DIGEST)
        if hashlib.sha256(content).hexdigest().encode() != whole.slice(0, _DIGEST).to_pybytes():
            raise BlockError(f"{path}: damaged")
        table = pa.ipc.open_file(content).read_all()
        said = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
        place = np.full(int(said[_ROWS]), -1, np.int64)
        place[table.column(_PLACE).to_numpy()] = np.arange(len(table))
        return Block(
            table.drop_columns([_LENGTH, _WEIGHT, _PLACE]).replace_schema_metadata(),
            table.column(_LENGTH).to_numpy(),
            table.column(_WEIGHT).to_numpy(),
            place,
            {int(row): why for row, why in json.loads(said[_REASONS]).items()},
        )


def gather(blocks: Sequence[tuple[Block, RowIds, RowIds]]) -> Encoded:
    """Rows out of several blocks, as `Task.encode` gives them.

    Args:
        blocks: each with rows of it, and where these are wanted; together the places are 0 to n - 1.
    """
    parts = [(block.take(rows), places) for block, rows, places in blocks]
    kept = np.concatenate([places[part.valid_rows] for part, places in parts])
    order = np.argsort(kept)
    samples = pa.concat_tables([part.samples for part, _ in parts], promote_options="permissive")
    problems = [(int(places[at]), why) for part, places in parts for at, why in part.problems]
    return Encoded(
        samples.take(pa.array(order)).combine_chunks(),
        kept[order],
        np.concatenate([part.lengths for part, _ in parts])[order],
        np.concatenate([part.weights for part, _ in parts])[order],
        tuple(sorted(problems)),
    )
