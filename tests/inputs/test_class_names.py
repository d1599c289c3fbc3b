"""Class numbers: a number means what the metadata of its own file says, even if another file or split differs."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from launcher.data.splits import open_split
from launcher.driver.evaluate import _check_classes, open_split_file
from launcher.driver.prepare import PreparedJob, prepare
from launcher.errors import DataError
from launcher.tasks import build_task
from tests.support.jobs import make_job

_TASKS = {
    "single-label": {"type": "text-classification", "max_length": 32},
    "multi-label": {"type": "text-classification", "max_length": 32, "kind": "multi-label"},
    "tags": {"type": "token-classification", "text": "words", "label": "label", "max_length": 32},
}


def _numbered(labels: Sequence[Any], names: Sequence[str] | None) -> pa.Table:
    """Make a table whose labels are numbers, with the metadata that `datasets` writes for a ClassLabel."""

    def number(label: Any) -> Any:
        if isinstance(label, list):
            return [number(entry) for entry in label]
        return label if isinstance(label, int) or names is None else names.index(label)

    rows = [number(label) for label in labels]
    words = [[f"w{i}"] * (len(label) if isinstance(label, list) else 1) for i, label in enumerate(labels)]
    table = pa.table({"text": [" ".join(some) for some in words], "words": words, "label": rows})
    if names is None:
        return table
    feature: dict[str, Any] = {"names": list(names), "_type": "ClassLabel"}
    if isinstance(rows[0], list):
        feature = {"feature": feature, "_type": "List"}
    info = {"info": {"features": {"text": {"dtype": "string", "_type": "Value"}, "label": feature}}}
    return table.replace_schema_metadata({"huggingface": json.dumps(info)})


def _files(folder: Path, **tables: Sequence[pa.Table]) -> dict[str, str]:
    for split, parts in tables.items():
        (folder / split).mkdir(parents=True)
        for i, table in enumerate(parts):
            pq.write_table(table, folder / split / f"{i}.parquet", row_group_size=3)
    return {split: str(folder / split) for split in tables}


def _prepared(model: Path, folder: Path, kind: str = "single-label", labels: Any = None, **tables: Any) -> PreparedJob:
    task = {**_TASKS[kind], "labels": labels}
    return prepare(make_job(model, _files(folder, **tables), folder / "runs", task=task))


def _targets(prepared: PreparedJob, split: str) -> list[Any]:
    """Return the names of the classes that the model learns or is scored by."""
    task, split_data = build_task(prepared.job), prepared.splits[split]
    names = prepared.job.task.parameters()["labels"]
    assert isinstance(names, list | tuple)
    encoded = task.encode(split_data.read(np.arange(split_data.rows), task.input_columns + task.target_columns), True)
    assert not encoded.problems
    if "labels" in encoded.samples.column_names:
        return [[names[i] for i in row if i != -100] for row in encoded.samples.column("labels").to_pylist()]
    rows = encoded.samples.column("target").to_pylist()
    if len(rows[0]) == 1:
        return [names[int(row[0])] for row in rows]
    return [[name for name, on in zip(names, row, strict=True) if on] for row in rows]


_LABELS = {
    "single-label": ["neg", "pos", "pos", "neg"] * 5,
    "multi-label": [["neg"], ["pos", "neg"], [], ["pos"]] * 5,
    "tags": [["O", "B-x"], ["B-x", "I-x", "O"], ["O"]] * 5,
}


def _expected(kind: str) -> list[Any]:
    labels = _LABELS[kind]
    return [sorted(row) for row in labels] if kind == "multi-label" else list(labels)


@pytest.mark.parametrize("kind", _LABELS)
def test_splits_and_files_may_number_classes_in_different_orders(tiny_bert: Path, tmp_path: Path, kind: str) -> None:
    labels = _LABELS[kind]
    names = ["O", "B-x", "I-x"] if kind == "tags" else ["neg", "pos"]
    turned = names[::-1]
    train = [_numbered(labels, names), _numbered(labels, turned)]
    prepared = _prepared(tiny_bert, tmp_path, kind, train=train, validation=[_numbered(labels, turned)])
    assert list(prepared.job.task.parameters()["labels"]) == names  # type: ignore[call-overload]
    assert _targets(prepared, "train") == _expected(kind) * 2
    assert _targets(prepared, "validation") == _expected(kind)
    again = prepare(prepared.job)  # as a run that goes on
    assert _targets(again, "validation") == _expected(kind) and again.job == prepared.job


def test_numbers_without_names_use_the_names_of_the_training_data(tiny_bert: Path, tmp_path: Path) -> None:
    bare = _numbered([0, 1, 1], None)
    prepared = _prepared(
        tiny_bert, tmp_path, train=[_numbered(["pos", "neg"], ["pos", "neg"]), bare], validation=[bare]
    )
    assert _targets(prepared, "train") == ["pos", "neg", "pos", "neg", "neg"]
    assert _targets(prepared, "validation") == ["pos", "neg", "neg"]


def test_names_that_are_numbers_are_not_indices(tiny_bert: Path, tmp_path: Path) -> None:
    """Use names as `class_encode_column` sorts them: 0, 1, 10, 2."""
    names = ["0", "1", "10", "2"]
    labels = ["10", "2", "0", "1"]
    prepared = _prepared(tiny_bert, tmp_path, train=[_numbered(labels, names)])
    assert _targets(prepared, "train") == labels
    with pytest.raises(DataError, match="holds numbers without names, and its classes 0, 1, 10, 2 are numbers"):
        _prepared(
            tiny_bert, tmp_path / "b", train=[_numbered(labels, names)], validation=[_numbered([3, 2, 0, 1], None)]
        )


def test_a_class_of_one_file_alone_is_learned(tiny_bert: Path, tmp_path: Path) -> None:
    more = _numbered(["new", "pos"], ["new", "neg", "pos"])
    prepared = _prepared(tiny_bert, tmp_path, train=[_numbered(["neg", "pos"], ["neg", "pos"]), more])
    assert _targets(prepared, "train") == ["neg", "pos", "new", "pos"]


def test_a_class_unknown_to_training_is_refused_by_name(tiny_bert: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        _prepared(
            tiny_bert, tmp_path,
            train=[_numbered(["neg", "pos"], ["neg", "pos"])], validation=[_numbered(["pos", "new"], ["new", "pos"])],
        )  # fmt: skip
    assert "row 1: label is 'new', which is not one of neg, pos;" in str(caught.value)


def test_names_of_the_job_file_override_those_of_files(tiny_bert: Path, tmp_path: Path) -> None:
    """Reorder the names of the files, or rename the classes, for which the files must agree."""
    same = _numbered(["neg", "pos"], ["neg", "pos"])
    other = _numbered(["neg", "pos"], ["pos", "neg"])
    prepared = _prepared(tiny_bert, tmp_path / "a", labels=["pos", "neg"], train=[same], validation=[other])
    assert _targets(prepared, "train") == _targets(prepared, "validation") == ["neg", "pos"]
    prepared = _prepared(tiny_bert, tmp_path / "b", labels=["bad", "good"], train=[same], validation=[same])
    assert _targets(prepared, "train") == _targets(prepared, "validation") == ["bad", "good"]
    with pytest.raises(DataError) as caught:
        _prepared(tiny_bert, tmp_path / "c", labels=["bad", "good"], train=[same], validation=[other])
    assert str(caught.value) == (
        "task.labels: renames the classes of column 'label', but files number them differently (neg, pos in data.train,"
        " pos, neg in data.validation); give task.labels the names of the files, or null"
    )


def test_words_of_training_match_numbers_elsewhere_by_name(tiny_bert: Path, tmp_path: Path) -> None:
    words = pa.table({"text": ["w1", "w2"], "label": ["neg", "pos"]})
    prepared = _prepared(tiny_bert, tmp_path, train=[words], validation=[_numbered(["pos", "neg"], ["pos", "neg"])])
    assert _targets(prepared, "validation") == ["pos", "neg"]


def test_data_to_evaluate_use_the_names_of_the_run(tiny_bert: Path, tmp_path: Path) -> None:
    prepared = _prepared(tiny_bert, tmp_path, train=[_numbered(["neg", "pos"], ["neg", "pos"])])
    job, task = prepared.job, build_task(prepared.job)
    for i, names in enumerate((["pos", "neg"], ["neg", "pos"])):
        place = _files(tmp_path / f"new{i}", x=[_numbered(["pos", "neg", "pos"], names)])["x"]
        part = open_split_file(job, "x", (place,))
        encoded = task.encode(part.read(np.arange(3), ["text", "label"]), True)
        assert encoded.samples.column("target").to_pylist() == [[1.0], [0.0], [1.0]]
        _check_classes(part, task)
    place = _files(tmp_path / "other", x=[_numbered(["spam", "ham"], ["spam", "ham"])])["x"]
    with pytest.raises(DataError, match="the classes of label are spam, ham, but the model knows neg, pos; write"):
        _check_classes(open_split_file(job, "x", (place,)), task)


def test_minus_100_is_not_a_tag_of_a_class_label(tiny_bert: Path, tmp_path: Path) -> None:
    rows = [["O", "B-x", -100], ["B-x", "O"]] * 3
    prepared = _prepared(tiny_bert, tmp_path, "tags", train=[_numbered(rows, ["O", "B-x"])])
    assert _targets(prepared, "train") == [["O", "B-x"], ["B-x", "O"]] * 3
    balanced = prepared.job.model_copy(
        update={"task": prepared.job.task.model_copy(update={"class_weights": "balanced", "labels": None})}
    )
    assert prepare(balanced).job.task.parameters()["class_weights"] == {"O": 1.0, "B-x": 1.0}


@pytest.mark.parametrize("is_list", [False, True], ids=["labels", "lists"])
def test_dictionaries_are_read_as_their_values(tmp_path: Path, is_list: bool) -> None:
    """Read pandas' categories, whose codes differ between files and row groups."""
    rows = [["a", "b"], ["b", "a", None]]
    for i, row in enumerate(rows):
        column: pa.Array = pa.array(row).dictionary_encode()
        if is_list:
            column = pa.ListArray.from_arrays(pa.array(range(len(row) + 1), pa.int32()), column)
        pq.write_table(pa.table({"label": column}), tmp_path / f"{i}.parquet", row_group_size=1)
    split = open_split("train", [str(tmp_path)])
    kind = split.schema.field("label").type
    assert kind == (pa.list_(pa.string()) if is_list else pa.string())
    flat = [[value] if is_list else value for value in (*rows[0], *rows[1])]
    assert split.read(np.arange(5), ["label"]).column("label").to_pylist() == flat
    assert [value for piece in split.iter_column("label") for value in piece.to_pylist()] == flat
