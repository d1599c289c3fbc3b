"""Marked texts and growing texts (`launcher/report/texts.py`)."""

from launcher.report.texts import pieces, writings
from launcher.rundir.records import GenerationRecord, Mark


def _mark(start: int, end: int, kind: str, label: str = "person") -> Mark:
    return Mark.model_validate({"start": start, "end": end, "label": label, "kind": kind})


def test_a_text_is_cut_where_marks_begin_and_end() -> None:
    text = "Ada Lovelace lived in London"
    marks = (_mark(0, 12, "missed"), _mark(4, 12, "wrong"), _mark(22, 28, "found", "place"))
    found = pieces(text, marks)
    assert "".join(piece.text for piece in found) == text
    assert [(piece.text, piece.kinds) for piece in found] == [
        ("Ada ", ("missed",)), ("Lovelace", ("missed", "wrong")), (" lived in ", ()), ("London", ("found",)),
    ]  # fmt: skip
    assert [[(mark.label, mark.kind) for mark in piece.ends] for piece in found] == [
        [], [("person", "missed"), ("person", "wrong")], [], [("place", "found")],
    ]  # fmt: skip


def test_marks_outside_of_the_text_are_left_out() -> None:
    assert [piece.text for piece in pieces("abc", (_mark(1, 9, "wrong"), _mark(2, 2, "wrong")))] == ["abc"]


def test_writings_are_put_together_by_row() -> None:
    def wrote(step: int, row: int) -> GenerationRecord:
        return GenerationRecord(step=step, row=row, inputs={"text": f"row {row}"}, prediction=f"{row} at {step}")

    found = writings((wrote(10, 0), wrote(10, 3), wrote(20, 0), wrote(20, 3), wrote(30, 0)))
    assert [(w.row, w.inputs["text"], w.last.prediction) for w in found] == [
        (0, "row 0", "0 at 30"), (3, "row 3", "3 at 20"),
    ]  # fmt: skip
    assert [[g.step for g in w.earlier] for w in found] == [[20, 10], [10]]
