"""Marked and generated texts (`launcher/report/texts.py`)."""

from launcher.report.texts import group_by_row, split_at_marks
from launcher.rundir.records import GenerationRecord, SpanMark


def _mark(start: int, end: int, kind: str, label: str = "person") -> SpanMark:
    return SpanMark.model_validate({"start": start, "end": end, "label": label, "kind": kind})


def test_a_text_is_split_where_marks_begin_and_end() -> None:
    text = "Ada Lovelace lived in London"
    marks = (_mark(0, 12, "missed"), _mark(4, 12, "wrong"), _mark(22, 28, "found", "place"))
    pieces = split_at_marks(text, marks)
    assert "".join(piece.text for piece in pieces) == text
    assert [(piece.text, piece.kinds) for piece in pieces] == [
        ("Ada ", ("missed",)), ("Lovelace", ("missed", "wrong")), (" lived in ", ()), ("London", ("found",)),
    ]  # fmt: skip
    assert [[(mark.label, mark.kind) for mark in piece.ends] for piece in pieces] == [
        [], [("person", "missed"), ("person", "wrong")], [], [("place", "found")],
    ]  # fmt: skip


def test_marks_outside_of_the_text_are_ignored() -> None:
    assert [piece.text for piece in split_at_marks("abc", (_mark(1, 9, "wrong"), _mark(2, 2, "wrong")))] == ["abc"]


def test_generations_are_grouped_by_row() -> None:
    def generate(step: int, row: int) -> GenerationRecord:
        return GenerationRecord(step=step, row=row, inputs={"text": f"row {row}"}, prediction=f"{row} at {step}")

    keys = ((10, 0), (10, 3), (20, 0), (20, 3), (30, 0))
    histories = group_by_row(tuple(generate(step, row) for step, row in keys))
    assert [(h.row, h.inputs["text"], h.last.prediction) for h in histories] == [
        (0, "row 0", "0 at 30"), (3, "row 3", "3 at 20"),
    ]  # fmt: skip
    assert [[g.step for g in h.earlier] for h in histories] == [[20, 10], [10]]
