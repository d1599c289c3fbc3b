"""Data files whose columns are not what the task reads: `launcher check` and `launcher train` refuse each."""

from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.support.desk import Case, Desk, check_and

_TRAIN = "data/train.parquet"
_MEND = "fix the row, or set data.on_bad_row: skip to leave such rows out"
_AB = ["a", "b"] * 10


def _twice(desk: Desk) -> None:
    arrays = [pa.array(["w1", "w2"]), pa.array(["a", "b"]), pa.array(["w1", "w2"])]
    pq.write_table(pa.Table.from_arrays(arrays, ["text", "label", "text"]), _TRAIN)


def _second(desk: Desk, **columns: Any) -> list[str]:
    desk.table("data/train2.parquet", **columns)
    return ["data.train=data/train*.parquet"]


COLUMNS = [
    Case("no column of labels", lambda desk: desk.table(text=["w1", "w2"], labels=["a", "b"]),
         f"DESK/{_TRAIN}: has no column 'label', which the task reads; did you mean labels? (see task:)"),
    Case("no column of labels in the validation data",
         lambda desk: desk.table("data/validation.parquet", text=["w1", "w2"]),
         "DESK/data/validation.parquet: has no column 'label', which the task reads; the file has text (see task:)"),
    Case("two columns of one name", _twice, f"DESK/{_TRAIN}: has two columns named 'text'; rename one of them"),
    Case("files with different columns", lambda desk: _second(desk, text=["w1"], kind=["a"]),
         f"DESK/data/train2.parquet: has no column 'label', which DESK/{_TRAIN} has; give all files of a split the "
         "same columns"),
    Case("files with different types", lambda desk: _second(desk, text=["w1"], label=[3]),
         f"DESK/data/train2.parquet: column 'label' is int64, but string in DESK/{_TRAIN}; give all files of a split "
         "the same types"),
    Case("texts that are lists", lambda desk: desk.table(text=[["w1", "w2"]] * 20, label=_AB),
         f"DESK/{_TRAIN}: row 0: text is ['w1', 'w2'], which is not text; {_MEND}"),
    Case("texts that are bytes", lambda desk: desk.table(text=[b"\xff"] * 20, label=_AB),
         f"DESK/{_TRAIN}: row 0: text is b'\\xff', which is not text; {_MEND}"),
    Case("a text that is null", lambda desk: desk.table(text=["w1"] * 19 + [None], label=_AB),
         f"DESK/{_TRAIN}: row 19: text is null; {_MEND}"),
    Case("texts that are all null, to be skipped",
         lambda desk: desk.table(text=pa.nulls(20), label=_AB) or ["data.on_bad_row=skip"],
         f"DESK/{_TRAIN}: row 0: text is null, and so are all 20 rows read with it; is the right column named?"),
    Case("labels that are all null", lambda desk: desk.texts(pa.nulls(20, pa.string())),
         "task: column label of the training data holds no label; at least two classes are needed"),
    Case("one class alone", lambda desk: desk.texts(["a"] * 20),
         "task: column label of the training data holds only the label 'a'; at least two classes are needed"),
    Case("labels that are numbers with a point", lambda desk: desk.texts([0.5, 1.5] * 10),
         "task: column label of the training data holds 0.5; classes are whole numbers or strings; for amounts set "
         "kind: regression"),
    Case("labels that are structs", lambda desk: desk.texts([{"name": "a"}, {"name": "b"}] * 10),
         "task: column label of the training data is of type struct<name: string>; classes are ints or strings"),
    Case("several labels for one class", lambda desk: desk.texts([["a"], ["b"]] * 10),
         f"DESK/{_TRAIN}: row 0: label is ['a'], which is not one of a, b; {_MEND}"),
    Case("one label where there should be several", lambda desk: ["task.kind=multi-label"],
         f"DESK/{_TRAIN}: row 0: label is 'b', which is not a list of labels; {_MEND}"),
    Case("names for a regression", lambda desk: ["task.kind=regression"],
         f"DESK/{_TRAIN}: row 0: label is 'b', which is not a number; {_MEND}"),
    Case("a label that is null", lambda desk: desk.texts(["a", "b", None] * 6),
         f"DESK/{_TRAIN}: row 2: label is null; {_MEND}"),
    Case("a label of the job file that is missing", lambda desk: ["task.labels=[a, c]"],
         "DESK/data/validation.parquet: row ...: label is 'b', which is not one of a, c; fix the row, or set ..."),
    Case("a label unknown in training, far behind",
         lambda desk: desk.texts(["a"] * 900 + ["c"], "data/validation.parquet"),
         f"DESK/data/validation.parquet: row 900: label is 'c', which is not one of a, b; {_MEND}"),
    Case("numbers in one split, names in another", lambda desk: desk.texts([0, 1] * 6, "data/validation.parquet"),
         f"DESK/data/validation.parquet: column 'label' holds numbers, but names in DESK/{_TRAIN}; write names, or say "
         "in task.labels which name each number means"),
    Case("names in one split, numbers in another", lambda desk: desk.texts([0, 1] * 10),
         "DESK/data/validation.parquet: row 0: label is ..., which is not one of 0, 1; fix the row, or set ..."),
    Case("as many classes as rows", lambda desk: desk.texts([f"id{i}" for i in range(300)]),
         "DESK/data/validation.parquet: row 0: label is 'a', which is not one of id0, id1, id10, ... (300 in all); fix "
         "the row, or set data.on_bad_row: skip to leave such rows out"),
    Case("validation rows that are in the training data",
         lambda desk: ["data.leakage=error", f"data.validation={_TRAIN}"],
         f"data.leakage: 40 of 40 validation rows are also in train (100.0 %), first: DESK/{_TRAIN}:0 and "
         f"DESK/{_TRAIN}:0; remove them, or set data.leakage: warn"),
]  # fmt: skip


@check_and("train", COLUMNS)
def test_unusable_columns_are_refused(command: str, case: Case, desk: Desk) -> None:
    desk.refuses_case(command, case)
