"""Marked texts and generated texts as the report shows them. Pure; runs on the client or the head."""

from dataclasses import dataclass

from launcher.rundir.records import GenerationRecord, SpanMark, WorstRow


@dataclass(frozen=True)
class Piece:
    """A stretch of text under the same marks."""

    text: str
    kinds: tuple[str, ...]
    """Kinds of the marks that cover it: found, missed, wrong. Empty for plain text."""
    ends: tuple[SpanMark, ...]
    """Marks that end with this piece. The page shows their labels after it."""


@dataclass(frozen=True)
class GenerationHistory:
    """Texts that the model generated for one row, over the steps."""

    row: int
    inputs: dict[str, str]
    last: GenerationRecord
    earlier: tuple[GenerationRecord, ...]
    """Earlier generations, the newest first."""


def split_at_marks(text: str, marks: tuple[SpanMark, ...]) -> tuple[Piece, ...]:
    """Split a text wherever a mark begins or ends. Marks outside of the text are ignored."""
    inside = [mark for mark in marks if 0 <= mark.start < mark.end <= len(text)]
    # Marks may overlap (missed and wrong), so nested tags would not do: each piece knows all marks that cover it.
    cuts = sorted({0, len(text), *(mark.start for mark in inside), *(mark.end for mark in inside)})
    pieces = []
    for begin, end in zip(cuts[:-1], cuts[1:], strict=True):
        covering = [mark for mark in inside if mark.start <= begin and mark.end >= end]
        kinds = tuple(dict.fromkeys(mark.kind for mark in covering))
        pieces.append(Piece(text[begin:end], kinds, tuple(mark for mark in covering if mark.end == end)))
    return tuple(pieces)


def split_row(line: WorstRow) -> tuple[Piece, ...]:
    """Return the first input of a worst row in pieces, or () if nothing is marked."""
    return split_at_marks(next(iter(line.inputs.values()), ""), line.marks) if line.marks else ()


def group_by_row(generations: tuple[GenerationRecord, ...]) -> tuple[GenerationHistory, ...]:
    """Group generated texts by the row that they answer, in the order of the rows."""
    histories = []
    for row in dict.fromkeys(record.row for record in generations):
        newest, *earlier = sorted((g for g in generations if g.row == row), key=lambda g: -g.step)
        histories.append(GenerationHistory(row, newest.inputs, newest, tuple(earlier)))
    return tuple(histories)
