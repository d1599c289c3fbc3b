"""Splits opened as a run opens them, and whether the others fit the training data. Runs on the client."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from launcher.data.convert import splittable_files
from launcher.data.splits import Split, open_files
from launcher.errors import DataError
from launcher.init.guess import Guess
from launcher.init.look import Labels, count_labels
from launcher.spec.job import OutputSpec
from launcher.tasks.base import ColumnKind

# Labels of so many kinds, more than half as many as there are rows, are names of the rows.
_FEW = 20
_UNLABELLED = "-1"


@dataclass(frozen=True)
class FirstRowsCheck:
    """How one split goes with the training data.

    Args:
        rows: rows in it.
        problem: why it cannot be used, or "".
        bad_rows: rows without a usable label.
    """

    rows: int
    problem: str = ""
    bad_rows: int = 0


def open_data(name: str, locations: Sequence[str], kinds: Mapping[str, ColumnKind] = MappingProxyType({})) -> Split:
    """Open a split; formats without footers are converted into the cache where the run will look for them.

    Args:
        name: Of the split.
        locations: Where its files are.
        kinds: What the columns that will be read hold; nothing is known of them before the task is chosen.

    Raises:
        DataError: it cannot be read.
    """
    try:
        files = splittable_files(name, locations, "auto", f"{OutputSpec().storage}/.cache", kinds)
        return open_files(name, files, kinds=kinds)
    except DataError as error:
        said = error.message.removeprefix(f"data.{name}: ").replace(", or set data.format", "")
        raise DataError(said) from error


def kinds_of(guess: Guess) -> dict[str, ColumnKind]:
    """Return what the columns hold that the task will read."""
    kinds: dict[str, ColumnKind] = dict.fromkeys((column.name for column in guess.inputs), "text")
    if guess.label is not None:
        forms: dict[str, ColumnKind] = {"regression": "number", "prompt": "text"}
        kinds[guess.label.name] = forms.get(guess.form, "class")
    return kinds


def training_labels(split: Split, guess: Guess) -> Labels:
    """The labels of the training data, counted.

    Raises:
        DataError: they are too few or too many kinds to be classes.
    """
    assert guess.label is not None
    name, labels = guess.label.name, count_labels(split, guess.label.name)
    kinds = [label for label, _ in labels.counts if not _is_gap(label, labels, guess)]
    if guess.form in ("regression", "spans", "prompt"):
        if labels.nulls == labels.rows:
            raise DataError(f"--label {name}: is null in all rows; name another column")
        return labels
    if len(kinds) < 2 and not guess.label.class_names:
        only = f"only the label {kinds[0]!r}" if kinds else "no label"
        raise DataError(f"--label {name}: holds {only}; at least two classes are needed: name another column")
    if guess.form == "single-label" and len(kinds) > max(_FEW, labels.rows / 2):
        raise DataError(
            f"--label {name}: has {len(kinds)} different values in {labels.rows} rows, which are no classes; "
            "name another column"
        )
    return labels


def known_labels(labels: Labels, guess: Guess) -> tuple[str, ...]:
    """The classes that the run will learn."""
    assert guess.label is not None
    return guess.label.class_names or tuple(label for label, _ in labels.counts if not _is_gap(label, labels, guess))


def has_gaps(labels: Labels, guess: Guess) -> bool:
    """Whether -1 stands for rows without a label, where classes are counted from 0."""
    return any(_is_gap(label, labels, guess) for label, _ in labels.counts)


def _is_gap(label: str, labels: Labels, guess: Guess) -> bool:
    assert guess.label is not None
    if label != _UNLABELLED or guess.label.shape not in ("integer", "integers", "number"):
        return False
    others = {value for value, _ in labels.counts} - {_UNLABELLED}
    counted = len(others) > 1 and others == {str(i) for i in range(len(others))}
    return counted or bool(guess.label.class_names)


def check_rows(split: Split, guess: Guess, known: Sequence[str]) -> FirstRowsCheck:
    """Look whether a split has the columns and labels of the training data.

    Args:
        split: validation or test.
        guess: the task and its columns.
        known: the classes of the training data; empty where labels are none.
    """
    columns = [*guess.inputs, *guess.beside.values(), *([guess.label] if guess.label else [])]
    missing = [column.name for column in columns if column.name not in split.schema.names]
    if missing:
        return FirstRowsCheck(split.rows, f"it has no column {missing[0]}")
    if guess.label is None or guess.form == "prompt":
        return FirstRowsCheck(split.rows)
    labels = count_labels(split, guess.label.name)
    bad = labels.nulls + sum(count for label, count in labels.counts if known and label not in known)
    good = sum(count for label, count in labels.counts if label in known) if known else labels.rows - labels.nulls
    if not good:
        return FirstRowsCheck(split.rows, f"none of its labels is one of the training data ({guess.label.name})")
    return FirstRowsCheck(split.rows, "", bad)
