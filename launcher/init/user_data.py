"""Data of a new job: open it, check that its splits match, hold out validation rows. Runs on the client.

`cli/init.py` calls these functions in order: `open_training`, `reopen_for_task`, `match_splits`,
`hold_out_validation`. Profile: `profile.py`; task and columns: `guess.py`; other values: `defaults.py`; YAML:
`job_file.py`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from launcher.data.convert import splittable_files
from launcher.data.files import errors_without_keys
from launcher.data.splits import Split, open_files
from launcher.errors import DataError
from launcher.init.defaults import Sources
from launcher.init.guess import Guess
from launcher.init.labels import Labels, count_labels
from launcher.init.profile import DataProfile, profile_data
from launcher.init.splits import FoundSplits, find_splits, hold_out
from launcher.spec.job import OutputSpec
from launcher.tasks.metrics.labels import class_name_notes
from launcher.tasks.params import ColumnKind

# Text labels with more distinct values than this, and than half of the rows, identify rows instead of classes.
_MAX_DISTINCT = 20


@dataclass(frozen=True)
class SplitCheck:
    """Result of comparing a split with the training data."""

    rows: int
    """Number of rows."""
    problem: str = ""
    """Reason why the split cannot be used; "" if it can."""
    bad_rows: int = 0
    """Number of rows without a usable label."""


def open_data(name: str, locations: Sequence[str], kinds: Mapping[str, ColumnKind] = MappingProxyType({})) -> Split:
    """Open a split as a run would. CSV and JSON are converted into the run's cache, so the run need not repeat it.

    Args:
        name: Name of the split.
        locations: Locations of its files.
        kinds: Kind of content of the columns that the task reads; empty before the task is chosen.

    Raises:
        DataError: The files cannot be read.
    """
    with errors_without_keys(name):
        files = splittable_files(name, locations, "auto", f"{OutputSpec().storage}/.cache", kinds)
        return open_files(name, files, kinds=kinds)


def kinds_of(guess: Guess) -> dict[str, ColumnKind]:
    """Return the kind of content of each column that the task reads."""
    kinds: dict[str, ColumnKind] = dict.fromkeys((column.name for column in guess.inputs), "text")
    if guess.label is not None:
        forms: dict[str, ColumnKind] = {"regression": "number", "prompt": "text", "pair": "text", "summary": "text"}
        kinds[guess.label.name] = forms.get(guess.form, "class")
    beside: dict[str, ColumnKind] = {c.name: "class" if k == "label" else "text" for k, c in guess.beside.items()}
    return beside | kinds


def training_labels(split: Split, guess: Guess) -> Labels:
    """Count the labels of the training data.

    Raises:
        DataError: The distinct labels are too few or too many to be classes.
    """
    assert guess.label is not None
    name = guess.label.name
    labels = count_labels(split, name)
    classes = [label for label, _ in labels.counts if not guess.is_unlabelled(label, labels)]
    if guess.writes_label or guess.form in ("regression", "spans"):
        # Numbers, spans and answers are not classes: any number of distinct values is right.
        if labels.nulls == labels.rows:
            raise DataError(f"--label {name}: is null in all rows; name another column")
        return labels
    # With names in the metadata, a class may be missing in these rows.
    if len(classes) < 2 and not guess.label.class_names:
        only = f"only the label {classes[0]!r}" if classes else "no label"
        raise DataError(f"--label {name}: holds {only}; at least two classes are needed: name another column")
    if guess.form == "single-label" and len(classes) > max(_MAX_DISTINCT, labels.rows / 2):
        raise DataError(
            f"--label {name}: has {len(classes)} different values in {labels.rows} rows, too many for classes; "
            "name another column"
        )
    return labels


def check_rows(split: Split, guess: Guess, known: Sequence[str]) -> SplitCheck:
    """Check that a split has the columns and classes of the training data (`known`; empty if there are none)."""
    columns = [*guess.inputs, *guess.beside.values(), *([guess.label] if guess.label else [])]
    missing = [column.name for column in columns if column.name not in split.schema.names]
    if missing:
        return SplitCheck(split.rows, f"it has no column {missing[0]}")
    if guess.label is None or guess.writes_label:
        return SplitCheck(split.rows)
    labels = count_labels(split, guess.label.name)
    # A label that training has never seen cannot be scored.
    bad = labels.nulls + sum(count for label, count in labels.counts if known and label not in known)
    good = sum(count for label, count in labels.counts if label in known) if known else labels.rows - labels.nulls
    if not good:
        return SplitCheck(split.rows, f"none of its labels is one of the training data ({guess.label.name})")
    return SplitCheck(split.rows, "", bad)


@dataclass(frozen=True)
class UserData:
    """Data of the user before the task is chosen."""

    splits: FoundSplits
    """Locations of the splits."""
    train: Split
    """Opened training split."""
    profile: DataProfile
    """Profile of the training rows."""


def open_training(location: str, named: Mapping[str, str]) -> UserData:
    """Find the splits of the data and profile the training rows.

    Args:
        location: Location as the user wrote it.
        named: Locations of validation and test data that the user named, by split.

    Raises:
        DataError: There is nothing to train on.
    """
    splits = find_splits(location)
    train = open_data("train", splits.locations["train"])
    return add_splits(UserData(splits, train, profile_data(train, location)), named)


def reopen_for_task(data: UserData, guess: Guess) -> UserData:
    """Open the training split again as the task reads it: in a CSV, `3.10` may be a class instead of a number."""
    # Only converted files (CSV, JSON) depend on the kinds of the columns.
    if not any(fragment.origin for fragment in data.train.fragments):
        return data
    return replace(data, train=open_data("train", data.splits.locations["train"], kinds_of(guess)))


def add_splits(data: UserData, named: Mapping[str, str]) -> UserData:
    """Return the data with further splits, given by name and location."""
    added = {name: (place,) for name, place in named.items()}
    return replace(data, splits=replace(data.splits, locations={**data.splits.locations, **added}))


@dataclass(frozen=True)
class MatchedSplits:
    """Splits that match task and columns."""

    sources: Sources
    """Locations and rows for the job file."""
    labels: Labels | None
    """Counted labels of the training data; None if the task has none."""
    notes: tuple[str, ...]
    """Notes for the user on empty columns, splits that are not used, and unusual labels."""


def match_splits(data: UserData, guess: Guess, named: Mapping[str, str]) -> MatchedSplits:
    """Count the labels, and keep the splits that match the training data. Those that the user named must match.

    Raises:
        DataError: The labels are not usable, or a split that the user named does not match.
    """
    has_labels = guess.label is not None and not guess.writes_label
    labels = training_labels(data.train, guess) if has_labels else None
    known = guess.known_labels(labels) if labels is not None and labels.counts else ()
    locations = {"train": data.splits.locations["train"]}
    rows = {"train": data.train.rows}
    bad_rows = 0
    empty = [column.name for column in data.profile.columns if column.is_empty]
    notes = [f"empty in all rows that were read: {', '.join(empty[:5])}"] if empty else []
    for name in ("validation", "test"):
        if name not in data.splits.locations:
            continue
        where = ", ".join(data.splits.locations[name])
        # Opened as the task reads them: a label that is `1` here and `1.0` there would match none.
        check = check_rows(open_data(name, data.splits.locations[name], kinds_of(guess)), guess, known)
        if check.problem and name in named:
            raise DataError(f"--{name} {where}: {check.problem}; give one that matches the training data")
        if check.problem:
            notes.append(f"{where} is not used: {check.problem}; `launcher predict` reads it without labels")
            continue
        locations[name] = data.splits.locations[name]
        rows[name] = check.rows
        bad_rows += check.bad_rows
    if data.splits.left_out:
        notes.append(f"not used, as their names say no split: {', '.join(data.splits.left_out[:5])}")
    if labels is not None and guess.label is not None and guess.form != "regression":
        notes += class_name_notes(known, guess.label.name)
    missing = {} if "validation" in locations else {"validation": _explain_missing(data.splits)}
    return MatchedSplits(Sources(locations, rows, bad_rows, missing), labels, tuple(notes))


def hold_out_validation(
    data: UserData, fitted: MatchedSplits, fraction: float, folder: Path, force: bool
) -> MatchedSplits:
    """Hold out a fraction of the training rows for validation, in files of their own; see `splits.hold_out`."""
    # Before anything is written: with --force, the parts would replace the rows that they are read from.
    _check_source(data.train, folder)
    parts = hold_out(data.train, fraction, folder, force)
    # Both splits are replaced: with the original training data, the held-out rows would be trained on.
    locations = {**fitted.sources.locations, "train": (parts.train,), "validation": (parts.validation,)}
    rows = {**fitted.sources.rows, "train": parts.train_rows, "validation": parts.validation_rows}
    return replace(fitted, sources=replace(fitted.sources, locations=locations, rows=rows, missing={}))


def _check_source(train: Split, folder: Path) -> None:
    """Check that the training data is not in the directory of its parts, where it would be overwritten.

    Raises:
        DataError: A training file is there.
    """
    for fragment in train.fragments:
        if "://" not in fragment.path and Path(fragment.path).resolve().parent == folder.resolve():
            raise DataError(f"{fragment.path}: lies where its parts would be written; give another --output")


def _explain_missing(splits: FoundSplits) -> str:
    """Explain that validation data is missing, and what follows."""
    near = splits.neighbours.get("validation")
    if near:
        return f"none was named ({near} may be it); without it the last weights are kept, not the best ones"
    return "none was found; without it the last weights are kept, not the best ones"
