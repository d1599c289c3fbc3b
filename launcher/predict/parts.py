"""Decides which rows make a part of the output, and which worker does it. Pure, no I/O; runs on the head.

A part is one Parquet file of the output: rows in file order, the same number in each, however the input is cut into
files and row groups. No part depends on the workers, so a command that resumes with other workers resumes the same
parts. A piece is read, predicted and written at once. Read `driver.py` next.
"""

import heapq
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

# Enough parts that a few dozen workers share a small input evenly...
_TARGET_PARTS = 256
# ... but no tiny files: a part costs a worker some 10 ms in addition to its rows.
_MIN_ROWS = 2048
# Work that is lost with a worker, at most; 10 million rows are 153 files.
_MAX_ROWS = 65536
_MAX_BYTES = 128 << 20
# Rows that are sorted by length together. A worker's memory holds two pieces: one is read ahead.
_PIECE_ROWS = 8192
_PIECE_BYTES = 8 << 20


@dataclass(frozen=True)
class Layout:
    """Cut of an input's rows into parts and pieces.

    Args:
        rows: Number of rows of the input.
        part_rows: Number of rows of each part but the last, which has the rest.
        piece_rows: Number of rows of each piece of a part but its last.
    """

    rows: int
    part_rows: int
    piece_rows: int

    @property
    def parts(self) -> int:
        """Return the number of parts."""
        return -(-self.rows // self.part_rows)

    def part(self, number: int) -> range:
        """Return the row ids of a part."""
        return range(number * self.part_rows, min(self.rows, (number + 1) * self.part_rows))

    def pieces(self, number: int) -> list[range]:
        """Return the row ids of a part, piece by piece."""
        rows = self.part(number)
        return [rows[begin : begin + self.piece_rows] for begin in range(0, len(rows), self.piece_rows)]


def cut_parts(rows: int, size_bytes: int) -> Layout:
    """Cut an input into parts, from what its footers say alone.

    Another result for the same input would make unfinished outputs useless.

    Args:
        rows: Number of rows of the input, at least one.
        size_bytes: Size of all rows, uncompressed.
    """
    # Nothing of the job or the cluster may enter here: the layout has to be the same for every command that resumes.
    row_bytes = max(1.0, size_bytes / rows)
    # Rows bound small rows and bytes bound large ones, such as pictures, of which 65536 would be gigabytes.
    part = min(_MAX_ROWS, max(_MIN_ROWS, -(-rows // _TARGET_PARTS)), max(1, int(_MAX_BYTES / row_bytes)))
    piece = min(part, _PIECE_ROWS, max(1, int(_PIECE_BYTES / row_bytes)))
    return Layout(rows, part, piece)


@dataclass
class PartQueue:
    """Assignment of parts to workers, in order; a worker also knows its next part, to read ahead.

    Args:
        missing: Numbers of the parts that are not written yet.
    """

    missing: Iterable[int]
    _waiting: list[int] = field(init=False)
    _current: dict[int, int] = field(init=False, default_factory=dict)
    _next: dict[int, int] = field(init=False, default_factory=dict)
    _losses: Counter[int] = field(init=False, default_factory=Counter)
    _suspects: set[int] = field(init=False, default_factory=set)
    """Parts that a worker was doing, or reading ahead, when it died. They are no longer read ahead, so that the next
    death shows which of them is the cause."""

    def __post_init__(self) -> None:
        # Sorted is a heap already, and in rising order each worker reads its files forwards (`row_reader.py`).
        self._waiting = sorted(self.missing)

    @property
    def left(self) -> int:
        """Return the number of parts that are not done."""
        return len(self._waiting) + len(self._current) + len(self._next)

    def take(self, worker: int) -> tuple[int, int | None] | None:
        """Return the part for an idle worker and the one it should read ahead; None if nothing is left.

        An idle worker takes over the next part of a busy one if no other is left.
        """
        assert worker not in self._current
        number = self._next.pop(worker, None)
        if number is None:
            number = self._pop_lowest()
        if number is None:
            return None
        self._current[worker] = number
        # A suspect is done alone: with a second part read ahead, a death would not tell which of the two was the cause.
        if self._waiting and not {number, self._waiting[0]} & self._suspects:
            self._next[worker] = heapq.heappop(self._waiting)
        return number, self._next.get(worker)

    def _pop_lowest(self) -> int | None:
        if self._waiting:
            return heapq.heappop(self._waiting)
        # The owner may have read the first piece of that part ahead for nothing.
        owner = min(self._next, key=lambda worker: self._next[worker], default=None)
        return None if owner is None else self._next.pop(owner)  # the next part of a busy worker

    def mark_written(self, worker: int) -> None:
        """Mark the worker's part as written."""
        del self._current[worker]

    def requeue(self, worker: int) -> tuple[int, int] | None:
        """Put a dead worker's parts back; return the one it was doing and how often that was lost, None if idle."""
        number, following = self._current.pop(worker, None), self._next.pop(worker, None)
        if following is not None:
            # Only the part at hand counts as lost, but both are suspects: the thread that reads ahead may have killed
            # the worker.
            heapq.heappush(self._waiting, following)
            self._suspects.add(following)
        if number is None:
            return None
        heapq.heappush(self._waiting, number)
        self._suspects.add(number)
        self._losses[number] += 1
        return number, self._losses[number]
