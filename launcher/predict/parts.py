"""Which rows make a part of the output, and which worker does it: pure decisions, no I/O. Runs on the head.

A part is one Parquet file of the output: rows in file order, as many in each, however the input is cut into files and
row groups. No part depends on the workers, so a command that goes on with other workers goes on with the same parts.
A piece is what is read, predicted and written at once. Read `driver.py` next.
"""

import heapq
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

# Enough parts that a few dozen workers share a small input evenly...
_PARTS = 256
# ... but no tiny files: a part costs a worker some 10 ms beside its rows.
_MIN_ROWS = 2048
# What a killed worker does again, at most; 10 million rows are 153 files.
_MAX_ROWS = 65536
_MAX_BYTES = 128 << 20
# Rows among which those of like length share a batch; encoded twice over in a worker's memory, once ahead.
_PIECE_ROWS = 8192
_PIECE_BYTES = 8 << 20


@dataclass(frozen=True)
class Layout:
    """How the rows of an input are cut.

    Args:
        rows: of the input.
        part_rows: of each part but the last, which has the rest.
        piece_rows: of each piece of a part but its last.
    """

    rows: int
    part_rows: int
    piece_rows: int

    @property
    def parts(self) -> int:
        """How many parts there are."""
        return -(-self.rows // self.part_rows)

    def part(self, number: int) -> range:
        """Row ids of a part."""
        return range(number * self.part_rows, min(self.rows, (number + 1) * self.part_rows))

    def pieces(self, number: int) -> list[range]:
        """Row ids of a part, piece by piece."""
        rows = self.part(number)
        return [rows[begin : begin + self.piece_rows] for begin in range(0, len(rows), self.piece_rows)]


def cut_parts(rows: int, size_bytes: int) -> Layout:
    """The parts of an input; a function of what its footers say alone.

    Args:
        rows: of the input, at least one.
        size_bytes: of all of them, uncompressed.
    """
    row_bytes = max(1.0, size_bytes / rows)
    part = min(_MAX_ROWS, max(_MIN_ROWS, -(-rows // _PARTS)), max(1, int(_MAX_BYTES / row_bytes)))
    piece = min(part, _PIECE_ROWS, max(1, int(_PIECE_BYTES / row_bytes)))
    return Layout(rows, part, piece)


@dataclass
class PartQueue:
    """Who does which part. Parts are handed out in order; a worker knows its next one, to read ahead.

    Args:
        missing: numbers of the parts that are not there yet.
    """

    missing: Iterable[int]
    _waiting: list[int] = field(init=False)
    _now: dict[int, int] = field(init=False, default_factory=dict)
    _next: dict[int, int] = field(init=False, default_factory=dict)
    _losses: Counter[int] = field(init=False, default_factory=Counter)
    _suspects: set[int] = field(init=False, default_factory=set)
    """Parts that a worker was at, or was reading ahead, when it died: each is now done alone, so that it is found."""

    def __post_init__(self) -> None:
        self._waiting = sorted(self.missing)

    @property
    def left(self) -> int:
        """Parts that are not done."""
        return len(self._waiting) + len(self._now) + len(self._next)

    def take(self, worker: int) -> tuple[int, int | None] | None:
        """What a worker without work does now, and then unless another is idle before that; None for nothing."""
        assert worker not in self._now
        number = self._next.pop(worker, None)
        if number is None:
            number = self._lowest()
        if number is None:
            return None
        self._now[worker] = number
        if self._waiting and not {number, self._waiting[0]} & self._suspects:
            self._next[worker] = heapq.heappop(self._waiting)
        return number, self._next.get(worker)

    def _lowest(self) -> int | None:
        if self._waiting:
            return heapq.heappop(self._waiting)
        owner = min(self._next, key=lambda worker: self._next[worker], default=None)
        return None if owner is None else self._next.pop(owner)  # another's next: it is busy, this one is not

    def done(self, worker: int) -> None:
        """The worker's part is there."""
        del self._now[worker]

    def lost(self, worker: int) -> tuple[int, int] | None:
        """The worker is gone: its parts wait again. The part it was at, and how often that was lost; None for none."""
        number, following = self._now.pop(worker, None), self._next.pop(worker, None)
        if following is not None:
            heapq.heappush(self._waiting, following)
            self._suspects.add(following)
        if number is None:
            return None
        heapq.heappush(self._waiting, number)
        self._suspects.add(number)
        self._losses[number] += 1
        return number, self._losses[number]
