"""Labels in real files: floats for integers, placeholders for "no label", names that look alike, tags without names."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from launcher.data.checks import check_first_rows
from launcher.driver.prepare import PreparedJob, prepare
from launcher.errors import DataError
from launcher.init.defaults import fill_defaults
from launcher.init.guess import UserChoices
from launcher.init.model_choice import default_model
from launcher.init.rules import guess_task
from launcher.init.user_data import match_splits, open_training
from launcher.tasks import build_task
from launcher.tasks.metrics.labels import class_name_notes
from tests.support.jobs import make_job

_TEXT = {"type": "text-classification", "max_length": 32}
_TAGS = {"type": "token-classification", "text": "tokens", "label": "tags", "max_length": 32}
_REMEDY = (
    "which usually says that a row has no label; list the classes in task.labels, without it and with data.on_bad_row: "
    "skip, or with it if it is one"
)


def _prepared(
    model: Path, folder: Path, task: dict[str, Any], on_bad_row: str = "error", **tables: pa.Table
) -> PreparedJob:
    folder.mkdir(exist_ok=True)
    for split, table in tables.items():
        pq.write_table(table, folder / f"{split}.parquet")
    data = {split: str(folder / f"{split}.parquet") for split in tables}
    prepared = prepare(make_job(model, {**data, "on_bad_row": on_bad_row}, folder / "runs", task=task))
    check_first_rows(prepared.job, prepared.splits)
    return prepared


def _texts(labels: Any) -> pa.Table:
    labels = labels if isinstance(labels, pa.Array) else pa.array(labels)
    return pa.table({"text": [f"w{i}" for i in range(len(labels))], "label": labels})


def _classes(prepared: PreparedJob, table: pa.Table) -> tuple[list[str], list[Any], list[tuple[int, str]]]:
    encoded = build_task(prepared.job).encode(table, True)
    targets = encoded.samples.column("target").to_pylist()
    return _names(prepared), targets, list(encoded.problems)


def _names(prepared: PreparedJob) -> list[str]:
    names = prepared.job.task.parameters()["labels"]
    assert isinstance(names, list)
    return names


@pytest.mark.parametrize("null", [None, float("nan")])
def test_whole_floats_are_classes_and_nulls_are_bad_rows(tiny_bert: Path, tmp_path: Path, null: Any) -> None:
    """Read integers with nulls as pandas writes them."""
    table = _texts(pa.array([0.0, 1.0, null, 1.0] * 5))
    prepared = _prepared(tiny_bert, tmp_path, _TEXT, "skip", train=table, validation=_texts([0, 1, 1]))
    names, targets, problems = _classes(prepared, table)
    assert names == ["0", "1"] and targets == [[0.0], [1.0], [1.0]] * 5
    assert problems == [(row, "label is null") for row in range(2, 20, 4)]
    task = {**_TEXT, "class_weights": "balanced"}
    weights = _prepared(tiny_bert, tmp_path / "w", task, "skip", train=table).job.task.parameters()["class_weights"]
    assert weights == {"0": 1.5, "1": 0.75}


def test_float_classes_of_validation_match_integers_of_training(tiny_bert: Path, tmp_path: Path) -> None:
    valid = _texts([1.0, 0.0])
    prepared = _prepared(tiny_bert, tmp_path, _TEXT, train=_texts([0, 1, 1]), validation=valid)
    assert _classes(prepared, valid)[1] == [[1.0], [0.0]]
    for bad, why in ((2.0, "label is 2, which is not one of 0, 1"), (None, "label is null")):
        with pytest.raises(DataError, match=f"row 1: {why}"):
            _prepared(tiny_bert, tmp_path, _TEXT, train=_texts([0, 1, 1]), validation=_texts(pa.array([1.0, bad])))


def test_lists_of_whole_floats_are_classes(tiny_bert: Path, tmp_path: Path) -> None:
    table = _texts(pa.array([[0.0], [1.0, 2.0], []]))
    prepared = _prepared(tiny_bert, tmp_path, {**_TEXT, "kind": "multi-label"}, train=table)
    assert _classes(prepared, table)[:2] == (["0", "1", "2"], [[1.0, 0.0, 0.0], [0.0, 1.0, 1.0], [0.0, 0.0, 0.0]])


@pytest.mark.parametrize(
    "labels", [[0, 1, -100], [0, 1, 2, 255], ["a", "b", ""], ["a", "b", " "], [0.0, 1.0, -100.0]], ids=str
)
def test_a_placeholder_for_no_label_is_refused_as_a_class(tiny_bert: Path, tmp_path: Path, labels: Any) -> None:
    """Refuse 255 (masks), -100 (torch and transformers) and empty text."""
    name = str(int(labels[-1])) if isinstance(labels[-1], float) else str(labels[-1])
    table = _texts(labels * 5)
    with pytest.raises(DataError) as caught:
        _prepared(tiny_bert, tmp_path, _TEXT, train=table)
    assert str(caught.value) == f"task: column label of the training data has the class {name!r}, {_REMEDY}"
    # What the sentence says helps: without it the rows are left out, with it it is a class.
    names = [str(int(label)) if isinstance(label, float) else str(label) for label in labels]
    without = _prepared(tiny_bert, tmp_path, {**_TEXT, "labels": names[:-1]}, "skip", train=table)
    assert len(_classes(without, table)[1]) == 5 * (len(labels) - 1)
    within = _prepared(tiny_bert, tmp_path, {**_TEXT, "labels": names}, train=table)
    assert len(_classes(within, table)[1]) == 5 * len(labels)


def test_placeholders_are_refused_in_lists_tags_and_entities(tiny_bert: Path, tmp_path: Path) -> None:
    for i, (task, table) in enumerate((
        ({**_TEXT, "kind": "multi-label"}, _texts([["a", ""], ["b"]])),
        (_TAGS, pa.table({"tokens": [["w1", "w2"]] * 3, "tags": [["B-x", ""]] * 3})),
        (_TAGS, pa.table({"tokens": ["w1"] * 3, "tags": [[{"start": 0, "end": 2, "label": ""}]] * 3})),
    )):  # fmt: skip
        with pytest.raises(DataError, match="has the class '', which usually says that a row has no label"):
            _prepared(tiny_bert, tmp_path / str(i), task, train=table)


@pytest.mark.parametrize("labels", [[254, 255], [0, 255], [1, 5, 255], [-1, 1], ["NA", "DE"]], ids=str)
def test_classes_that_only_look_like_placeholders_are_accepted(tiny_bert: Path, tmp_path: Path, labels: Any) -> None:
    """Accept gaps, byte values, the -1 and 1 of SVMs, and Namibia."""
    prepared = _prepared(tiny_bert, tmp_path, _TEXT, train=_texts(labels * 5))
    assert _names(prepared) == [str(label) for label in sorted(labels)]
    assert not [note for note in prepared.plan.notes if "has the class" in note]


@pytest.mark.parametrize("labels", [[0, 1, -1], [1, 2, 3, 99], ["a", "b", "nan"]], ids=str)
def test_a_possible_placeholder_is_noted_in_the_plan(tiny_bert: Path, tmp_path: Path, labels: Any) -> None:
    note = (
        f"column label has the class {str(labels[-1])!r}: if it says that a row has no label, leave it out of "
        "task.labels and set data.on_bad_row: skip"
    )
    assert note in _prepared(tiny_bert, tmp_path, _TEXT, train=_texts(labels * 5)).plan.notes


_ALIKE = (
    "column label has the classes 'Pos', 'pos', 'pos ', which differ in spaces and capitals alone: write them alike if "
    "they are one class"
)


def test_class_names_that_look_alike_are_noted(tiny_bert: Path, tmp_path: Path) -> None:
    """Check the notes of `check` and of `init`."""
    table = _texts(["pos", "pos ", "Pos", "neg"] * 10)
    prepared = _prepared(tiny_bert, tmp_path, _TEXT, train=table)
    assert prepared.plan.notes.count(_ALIKE) == 1
    data = open_training(str(tmp_path / "train.parquet"), {})
    (note,) = match_splits(data, guess_task(data.profile, UserChoices()), {}).notes
    assert sorted(note) == sorted(_ALIKE)
    assert class_name_notes(("B-PER", "B-Per", "O"), "tags") == [
        "column tags has the classes 'B-PER', 'B-Per', which differ in spaces and capitals alone: write them alike if "
        "they are one class"
    ]
    assert not class_name_notes(("neg", "pos"), "label")


def test_numeric_tags_need_names(tiny_bert: Path, tmp_path: Path) -> None:
    """Refuse numbers: which of them is outside is unknown, so entities could not be scored."""
    table = pa.table({"tokens": [["w1", "w2", "w3"]] * 9, "tags": [[0, 1, 2]] * 9})
    with pytest.raises(DataError) as caught:
        _prepared(tiny_bert, tmp_path, _TAGS, train=table)
    assert str(caught.value) == (
        "task: column tags of the training data holds numbers as tags, without their names; give the names in "
        "order in task.labels, such as [O, B-PER, I-PER]"
    )
    named = _prepared(tiny_bert, tmp_path, {**_TAGS, "labels": ["O", "B-x", "I-x"]}, train=table)
    (row, *_) = build_task(named.job).encode(table, True).samples.column("labels").to_pylist()
    assert [label for label in row if label != -100] == [0, 1, 2]


def test_init_notes_that_numeric_tags_need_names(tmp_path: Path) -> None:
    words = [[f"w{i}", f"w{i + 1}", "w3"] for i in range(40)]
    pq.write_table(pa.table({"tokens": words, "ner_tags": [[0, 1, 2]] * 40}), tmp_path / "train.parquet")
    data = open_training(str(tmp_path / "train.parquet"), {})
    guessed = guess_task(data.profile, UserChoices())
    assert guessed.notes == ("tags in column ner_tags are numbers; name them in order in task.labels before training",)
    fitted = match_splits(data, guessed, {})
    made = fill_defaults("x", data.profile, guessed, fitted.labels, default_model(guessed), fitted.sources)
    assert [line.is_commented for line in made.sections["task"] if line.key == "labels"] == [True]


@pytest.mark.parametrize("ending", ["parquet", "csv"])
def test_init_guesses_classes_for_few_whole_floats(
    tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guess classes, not regression, for two values and nulls."""
    monkeypatch.chdir(tmp_path)
    labels = pa.array([None if i in (3, 9) else float(i % 2) for i in range(40)])
    table = pa.table({"text": [f"a text of words {i}" for i in range(40)], "label": labels})
    if ending == "csv":
        rows = zip(table.column("text").to_pylist(), labels.to_pylist(), strict=True)
        lines = [f"{text},{'' if label is None else label}" for text, label in rows]
        (tmp_path / "train.csv").write_text("\n".join(["text,label", *lines]) + "\n")
    else:
        pq.write_table(table, tmp_path / "train.parquet")
    data = open_training(str(tmp_path / f"train.{ending}"), {})
    guessed = guess_task(data.profile, UserChoices())
    assert (guessed.task, guessed.form) == ("text-classification", "single-label")
    fitted = match_splits(data, guessed, {})
    assert fitted.labels is not None
    assert fitted.labels.nulls == 2
    assert [count for _, count in fitted.labels.counts] == [20, 18]


def test_numbers_in_validation_do_not_match_names_of_training(tiny_bert: Path, tmp_path: Path) -> None:
    """Refuse lists and floats as well."""
    pairs: tuple[tuple[dict[str, Any], Any, Any], ...] = (
        (_TEXT, ["a", "b"], [0.0, 1.0]),
        ({**_TEXT, "kind": "multi-label"}, [["a"], ["b"]], [[0], [1]]),
    )
    for i, (task, train, valid) in enumerate(pairs):
        with pytest.raises(DataError, match="column 'label' holds numbers, but names in "):
            _prepared(tiny_bert, tmp_path / str(i), task, train=_texts(train), validation=_texts(valid))


def test_names_of_a_class_label_are_never_placeholders(tiny_bert: Path, tmp_path: Path) -> None:
    """Accept the class "" if a ClassLabel names it."""
    features = {"label": {"names": ["", "spam"], "_type": "ClassLabel"}}
    table = _texts([0, 1] * 5).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    assert _names(_prepared(tiny_bert, tmp_path, _TEXT, train=table)) == ["", "spam"]
