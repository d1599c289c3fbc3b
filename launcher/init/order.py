"""The steps from data to a draft, in their order; what is asked in between is the command's. Runs on the client.

Read `look.py` (facts), `guess.py` (task and columns), `settle.py` (numbers) and `write.py` (YAML) next.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from launcher.data.splits import Split
from launcher.errors import DataError
from launcher.init.cut import hold_out
from launcher.init.fit import check_rows, kinds_of, known_labels, open_data, training_labels
from launcher.init.guess import Guess
from launcher.init.look import DataProfile, Labels, profile_data
from launcher.init.pretrained import Model
from launcher.init.settle import Draft, Sources, fill_defaults
from launcher.init.splits import FoundSplits, find_splits
from launcher.tasks.metrics.labels import remarks


@dataclass(frozen=True)
class Data:
    """What the user's data is before anything is decided.

    Args:
        found: its splits' locations.
        train: the training split, opened.
        look: a look at it.
    """

    found: FoundSplits
    train: Split
    profile: DataProfile


def open_training(location: str, given: Mapping[str, str]) -> Data:
    """Find the splits of some data and look at the training rows.

    Args:
        location: as the user wrote it.
        given: locations of validation and test data that the user named.

    Raises:
        DataError: there is nothing to train on.
    """
    found = find_splits(location)
    train = open_data("train", found.locations["train"])
    return with_splits(Data(found, train, profile_data(train, location)), given)


def as_read(data: Data, guess: Guess) -> Data:
    """Return the data with its training split as the task will read it: a CSV's `3.10` may be a class and no number."""
    if not any(fragment.origin for fragment in data.train.fragments):
        return data
    return replace(data, train=open_data("train", data.found.locations["train"], kinds_of(guess)))


def with_splits(data: Data, given: Mapping[str, str]) -> Data:
    """The data with locations of validation and test data beside it.

    Args:
        data: the user's.
        given: a location by split.
    """
    named = {name: (place,) for name, place in given.items()}
    return replace(data, found=replace(data.found, locations={**data.found.locations, **named}))


@dataclass(frozen=True)
class Fitted:
    """The data once task and columns are decided.

    Args:
        sources: what the job file says of it.
        labels: of the training data; None where the task has none.
        notes: what the user should know of splits that are left out.
    """

    sources: Sources
    labels: Labels | None
    notes: tuple[str, ...]


def fit_splits(data: Data, guess: Guess, given: Mapping[str, str]) -> Fitted:
    """Count the labels, and keep the splits that go with the training data.

    Args:
        data: the user's.
        guess: the task and its columns.
        given: locations that the user named; they must fit.

    Raises:
        DataError: the labels are no labels, or a split that the user named does not fit.
    """
    has_labels = guess.label is not None and guess.form != "prompt"
    labels = training_labels(data.train, guess) if has_labels else None
    known = known_labels(labels, guess) if labels is not None and labels.counts else ()
    locations, rows, notes, bad = {"train": data.found.locations["train"]}, {"train": data.train.rows}, [], 0
    for name in ("validation", "test"):
        if name not in data.found.locations:
            continue
        where = ", ".join(data.found.locations[name])
        fitted = check_rows(open_data(name, data.found.locations[name], kinds_of(guess)), guess, known)
        if fitted.problem and name in given:
            raise DataError(f"--{name} {where}: {fitted.problem}; give one that goes with the training data")
        if fitted.problem:
            notes.append(f"{where} is left out: {fitted.problem}; `launcher predict` reads it without labels")
            continue
        locations[name], rows[name], bad = data.found.locations[name], fitted.rows, bad + fitted.bad_rows
    if data.found.left_out:
        notes.append(f"left out, as their names tell no split: {', '.join(data.found.left_out[:5])}")
    if labels is not None and guess.label is not None and guess.form != "regression":
        notes += remarks(known, guess.label.name)
    missing = {} if "validation" in locations else {"validation": _remedy(data.found)}
    return Fitted(Sources(locations, rows, bad, missing), labels, tuple(notes))


def set_aside(data: Data, fitted: Fitted, fraction: float, folder: Path, force: bool) -> Fitted:
    """Cut validation rows off the training data, into files of their own.

    Args:
        data: the user's.
        fitted: its splits, without validation.
        fraction: share of rows.
        folder: for the files.
        force: whether files there may be replaced.
    """
    _check_source(data.train, folder)
    parts = hold_out(data.train, fraction, folder, force)
    locations = {**fitted.sources.locations, "train": (parts.train,), "validation": (parts.validation,)}
    rows = {**fitted.sources.rows, "train": parts.train_rows, "validation": parts.validation_rows}
    return replace(fitted, sources=replace(fitted.sources, locations=locations, rows=rows, missing={}))


def _check_source(train: Split, folder: Path) -> None:
    """Refuse to cut files that the cut would replace: what is set aside would be lost.

    Raises:
        DataError: the training data is one of them.
    """
    for fragment in train.fragments:
        if "://" not in fragment.path and Path(fragment.path).resolve().parent == folder.resolve():
            raise DataError(f"{fragment.path}: lies where its parts would be written; give another --output")


def draft(name: str, data: Data, guess: Guess, fitted: Fitted, model: Model) -> Draft:
    """The job file to be.

    Args:
        name: the run's.
        data: the user's.
        guess: the task and its columns.
        fitted: the splits.
        model: what to start from.
    """
    return fill_defaults(name, data.profile, guess, fitted.labels, model, fitted.sources)


def _remedy(found: FoundSplits) -> str:
    """What to do where there is no validation data."""
    near = found.beside.get("validation")
    if near:
        return f"none was given ({near} may be it); without it the last weights are kept, whatever they are worth"
    return "none was found; without it the last weights are kept, whatever they are worth"
