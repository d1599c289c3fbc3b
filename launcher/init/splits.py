"""Which files are for training, validation and test, told from their names; and how a job file names them. Client."""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from launcher.data.files import list_files
from launcher.errors import DataError
from launcher.spec.hub import PREFIX

SPLITS = ("train", "validation", "test")
_WORDS = {
    "train": "train", "training": "train", "validation": "validation", "valid": "validation", "val": "validation",
    "dev": "validation", "test": "test", "testing": "test",
}  # fmt: skip


@dataclass(frozen=True)
class FoundSplits:
    """The files of some data, by split.

    Args:
        locations: what the job file names, by split; `train` is always there.
        left_out: data files that belong to no split, where others do.
        beside: files beside a single one whose names tell another split.
    """

    locations: dict[str, tuple[str, ...]]
    left_out: tuple[str, ...] = ()
    beside: dict[str, str] = field(default_factory=dict)


def find_splits(location: str) -> FoundSplits:
    """Take a location apart into splits.

    Args:
        location: a file, a directory, a glob, a URI or a data set of the hub.

    Raises:
        DataError: nothing is there, or nothing to train on.
    """
    if location.startswith(PREFIX):
        return FoundSplits({"train": (location,)})
    listed = files_of(location)
    if len(listed) == 1:
        path = _shown(listed[0][0], location)
        return FoundSplits({"train": (path,)}, beside=_beside(path))
    by_split: dict[str, list[tuple[str, str]]] = {}
    for path, relative in listed:
        by_split.setdefault(split_of(relative), []).append((path, relative))
    others = by_split.pop("", [])
    if "train" not in by_split:
        by_split, others = {**by_split, "train": others}, []
    if not by_split["train"]:
        only = " and ".join(sorted(set(by_split) - {"train"}))
        raise DataError(f"{location}: its files are all for {only} by their names; name the file to train on")
    locations = {
        name: _concise(location, [path for path, _ in by_split[name]], len(by_split[name]) == len(listed))
        for name in SPLITS
        if name in by_split
    }
    return FoundSplits(locations, tuple(relative for _, relative in others))


def split_of(relative: str) -> str:
    """The split that a file's name, or a directory it is in, tells; "" where none does.

    Args:
        relative: path of the file below the location.
    """
    *folders, name = relative.split("/")
    for folder in reversed(folders):
        if folder.lower() in _WORDS:
            return _WORDS[folder.lower()]
    told = [_WORDS[word] for word in re.split(r"[^a-z]+", name.rsplit(".", 1)[0].lower()) if word in _WORDS]
    return told[0] if len(set(told)) == 1 else ""


def files_of(location: str) -> list[tuple[str, str]]:
    """(path, path below the location) of each data file; what is wrong is said without the job file's keys.

    Raises:
        DataError: nothing is there, or no data files.
    """
    try:
        return [(file.path, file.relative) for file in list_files("train", location)]
    except DataError as error:
        raise DataError(error.message.removeprefix("data.train: ").replace(", or set data.format", "")) from error


def _beside(path: str) -> dict[str, str]:
    """Files beside a training file whose names tell another split."""
    folder, name = os.path.split(path)
    if "://" in path or split_of(name) not in ("train", ""):
        return {}
    found: dict[str, str] = {}
    for other, relative in files_of(folder or "."):
        kind = split_of(relative)
        if kind in ("validation", "test") and "/" not in relative:
            found.setdefault(kind, _shown(other, path))
    return {name: found[name] for name in SPLITS if name in found}


def _shown(path: str, location: str) -> str:
    """A listed path the way the user writes: relative paths stay relative to where the command runs."""
    if "://" in path or os.path.isabs(os.path.expanduser(location)):
        return path
    return os.path.relpath(path)


def _concise(location: str, paths: Sequence[str], is_all: bool) -> tuple[str, ...]:
    """The shortest way to name some files that means these files and no others."""
    if is_all:
        return (location,)
    shown = [_shown(path, location) for path in paths]
    if len(shown) == 1:
        return (shown[0],)
    wanted = sorted(paths)
    for candidate in _candidates(shown):
        try:
            if sorted(path for path, _ in files_of(candidate)) == wanted:
                return (candidate,)
        except DataError:
            continue  # a glob that matches nothing, where names have stars in them
    return tuple(shown)


def _candidates(shown: Sequence[str]) -> Iterator[str]:
    """Directories and globs that may mean just these files."""
    start, end = _shared(shown), _shared([path[::-1] for path in shown])[::-1]
    folder = start.rpartition("/")[0]
    if folder:
        yield folder
    # train-00000-of-00002: up to the number, whose first digits the files share.
    yield f"{start.rstrip('0123456789')}*{os.path.splitext(end)[1] or end}"


def _shared(texts: Sequence[str]) -> str:
    """What all texts begin with."""
    first, last = min(texts), max(texts)
    return first[: next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))]


def job_name(location: str, output: str) -> str:
    """A name for the run: the job file's own, or that of the data where it is called `job`.

    Args:
        location: of the data.
        output: file name of the job file, without its ending.
    """
    if output != "job":
        return _clean(output) or "my-job"
    bare = location.removeprefix(PREFIX).split("#")[0].split("?")[0].rstrip("/")
    parts = [part for part in os.path.abspath(bare).split("/") if not set("*?[") & set(part)]
    names = [_clean(part.rsplit(".", 1)[0] if index == 0 else part) for index, part in enumerate(reversed(parts))]
    return next((name for name in names if name and not split_of(name) and name != "data"), "my-job")


def _clean(text: str) -> str:
    """A text as the name of a run may be."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("._-")[:63]
