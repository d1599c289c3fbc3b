"""Marked texts and growing texts, as the page shows them. Runs on the client or the head.

A worst row's marks become pieces of its text; a model's writings are put together by the row they answer.
"""

from dataclasses import dataclass

from launcher.rundir.records import GenerationRecord, Mark, WorstRow


@dataclass(frozen=True)
class Piece:
    """A stretch of text under the same marks."""

    text: str
    kinds: tuple[str, ...]
    """found, missed, wrong: what covers it; empty is plain text."""
    ends: tuple[Mark, ...]
    """Marks whose last character this piece holds; their labels stand behind it."""


def pieces(text: str, marks: tuple[Mark, ...]) -> tuple[Piece, ...]:
    """A text cut wherever a mark begins or ends."""
    inside = [mark for mark in marks if 0 <= mark.start < mark.end <= len(text)]
    cuts = sorted({0, len(text), *(mark.start for mark in inside), *(mark.end for mark in inside)})
    found = []
    for begin, end in zip(cuts[:-1], cuts[1:], strict=True):
        covering = [mark for mark in inside if mark.start <= begin and mark.end >= end]
        kinds = tuple(dict.fromkeys(mark.kind for mark in covering))
        found.append(Piece(text[begin:end], kinds, tuple(mark for mark in covering if mark.end == end)))
    return tuple(found)


def marked(line: WorstRow) -> tuple[Piece, ...]:
    """The first of a worst row's inputs in pieces; () where nothing is marked."""
    return pieces(next(iter(line.inputs.values()), ""), line.marks) if line.marks else ()


@dataclass(frozen=True)
class Writing:
    """What the model wrote for one row, over the steps."""

    row: int
    inputs: dict[str, str]
    last: GenerationRecord
    earlier: tuple[GenerationRecord, ...]
    """The newest first."""


def writings(generations: tuple[GenerationRecord, ...]) -> tuple[Writing, ...]:
    """Generations by row, in the rows' order."""
    rows = dict.fromkeys(record.row for record in generations)
    found = []
    for row in rows:
        newest, *earlier = sorted((g for g in generations if g.row == row), key=lambda g: -g.step)
        found.append(Writing(row, newest.inputs, newest, tuple(earlier)))
    return tuple(found)
