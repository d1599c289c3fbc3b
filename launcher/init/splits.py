"""Splits of the user's data: find training, validation and test files by their names; hold out validation rows.

Runs on the client.
"""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from launcher.data.files import errors_without_keys, list_files
from launcher.data.footers import ORIGIN, castable
from launcher.data.splits import Split, read_batches, read_file_schema, small_batches
from launcher.errors import DataError
from launcher.rundir.uri import describe_os_error
from launcher.spec.hub import HUB_PREFIX

SPLITS = ("train", "validation", "test")
_WORDS = {
    "train": "train", "training": "train", "validation": "validation", "valid": "validation", "val": "validation",
    "dev": "validation", "test": "test", "testing": "test",
}  # fmt: skip


@dataclass(frozen=True)
class FoundSplits:
    """Files of a location, by split."""

    locations: dict[str, tuple[str, ...]]
    """Locations for the job file, by split. Always contains `train`."""
    left_out: tuple[str, ...] = ()
    """Data files without a split, if other files have one."""
    neighbours: dict[str, str] = field(default_factory=dict)
    """Files next to a single training file, by the split that their names say."""


def find_splits(location: str) -> FoundSplits:
    """Divide the files of a location into splits.

    Args:
        location: File, directory, glob, URI or data set of the hub.

    Raises:
        DataError: There are no files, or none to train on.
    """
    if location.startswith(HUB_PREFIX):
        return FoundSplits({"train": (location,)})
    listed = files_of(location)
    if len(listed) == 1:
        path = _user_path(listed[0][0], location)
        return FoundSplits({"train": (path,)}, neighbours=_find_neighbours(path))
    by_split: dict[str, list[tuple[str, str]]] = {}
    for path, relative in listed:
        by_split.setdefault(split_of(relative), []).append((path, relative))
    others = by_split.pop("", [])
    # Files without a split are for training then.
    if "train" not in by_split:
        by_split["train"] = others
        others = []
    if not by_split["train"]:
        only = " and ".join(sorted(set(by_split) - {"train"}))
        raise DataError(f"{location}: its files are all for {only} by their names; name the file to train on")
    locations = {
        name: _shortest_name(location, [path for path, _ in by_split[name]], len(by_split[name]) == len(listed))
        for name in SPLITS
        if name in by_split
    }
    return FoundSplits(locations, tuple(relative for _, relative in others))


def split_of(relative: str) -> str:
    """Return the split that a file's directories or name say; "" if they say none, or several."""
    *folders, name = relative.split("/")
    # Folders come before the name, the innermost first: `data/test/train.csv` is of the test split.
    for folder in reversed(folders):
        if folder.lower() in _WORDS:
            return _WORDS[folder.lower()]
    # Whole words only: `latest.csv` and `contest.csv` are no test data. Two of them (train_test.csv) say nothing.
    splits = {_WORDS[word] for word in re.split(r"[^a-z]+", name.rsplit(".", 1)[0].lower()) if word in _WORDS}
    return splits.pop() if len(splits) == 1 else ""


def files_of(location: str) -> list[tuple[str, str]]:
    """Return path and relative path of each data file.

    Raises:
        DataError: There are no data files. The text does not name keys, as there is no job file yet.
    """
    with errors_without_keys("train"):
        return [(file.path, file.relative) for file in list_files("train", location)]


def _find_neighbours(path: str) -> dict[str, str]:
    """Return the files next to a training file whose names say another split."""
    folder, name = os.path.split(path)
    if "://" in path or split_of(name) not in ("train", ""):
        return {}
    neighbours: dict[str, str] = {}
    for other, relative in files_of(folder or "."):
        kind = split_of(relative)
        if kind in ("validation", "test") and "/" not in relative:
            neighbours.setdefault(kind, _user_path(other, path))
    return {name: neighbours[name] for name in SPLITS if name in neighbours}


def _user_path(path: str, location: str) -> str:
    """Return a listed path in the user's form: relative to the working directory if the location is."""
    if "://" in path or os.path.isabs(os.path.expanduser(location)):
        return path
    return os.path.relpath(path)


def _shortest_name(location: str, paths: Sequence[str], is_all: bool) -> tuple[str, ...]:
    """Return the shortest location (directory, glob) that matches these files and no others, or all their paths."""
    if is_all:
        return (location,)
    shown = [_user_path(path, location) for path in paths]
    if len(shown) == 1:
        return (shown[0],)
    wanted = sorted(paths)
    for candidate in _candidate_names(shown):
        try:
            # Tried, not reasoned about: a glob that also matches other files would train on test data.
            if sorted(path for path, _ in files_of(candidate)) == wanted:
                return (candidate,)
        except DataError:
            # Names with stars can make a glob that matches nothing.
            continue
    return tuple(shown)


def _candidate_names(shown: Sequence[str]) -> Iterator[str]:
    """Yield directories and globs that may match exactly these files."""
    start, end = _common_prefix(shown), _common_prefix([path[::-1] for path in shown])[::-1]
    folder = start.rpartition("/")[0]
    if folder:
        yield folder
    # train-00000-of-00002: cut before the number, as its first digits are common too.
    yield f"{start.rstrip('0123456789')}*{os.path.splitext(end)[1] or end}"


def _common_prefix(texts: Sequence[str]) -> str:
    """Return the common prefix of all texts."""
    # The prefix that the first and the last in order have in common is common to all between them.
    first, last = min(texts), max(texts)
    return first[: next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))]


# Row numbers that are hashed at once (8 MiB).
_CHUNK_ROWS = 1 << 20
_GROUP_ROWS = 16384
_GROUP_BYTES = 16 << 20


@dataclass(frozen=True)
class HoldOut:
    """Paths and row counts of the two parts of a split."""

    train: str
    validation: str
    train_rows: int
    validation_rows: int


def hold_out(split: Split, fraction: float, folder: Path, force: bool) -> HoldOut:
    """Divide the rows of a split into `train.parquet` and `validation.parquet`.

    The part depends only on a hash of the row number, so the same rows are held out every time.

    Args:
        split: Split to divide.
        fraction: Fraction of rows for validation.
        folder: Directory of the files; created if missing.
        force: Permission to replace existing files.

    Raises:
        DataError: A file exists or cannot be written, or there are too few rows.
    """
    check_not_existing(folder, force)
    if split.rows < 2:
        raise DataError(f"--split {fraction:g}: there is {split.rows} row, too few to divide; give more data")
    limit = _limit(split.rows, fraction)
    targets = (folder / "train.parquet", folder / "validation.parquet")
    # Beside their targets, as a rename is atomic only within one file system. Both parts are complete before the first
    # is renamed; the two renames together are not atomic.
    staged = [target.with_name(f".{target.name}.{os.getpid()}.tmp") for target in targets]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        counts = _write_parts(split, limit, staged)
        for source, target in zip(staged, targets, strict=True):
            os.replace(source, target)
    except OSError as error:
        raise DataError(f"{folder}: cannot be written ({describe_os_error(error)}); give another --output") from error
    finally:
        for source in staged:
            source.unlink(missing_ok=True)
    return HoldOut(str(targets[0]), str(targets[1]), counts[0], counts[1])


def check_not_existing(folder: Path, force: bool) -> None:
    """Check that no file would be overwritten.

    Raises:
        DataError: A file exists.
    """
    existing = [name for name in ("train.parquet", "validation.parquet") if (folder / name).exists()]
    if existing and not force:
        raise DataError(f"{folder / existing[0]}: exists already; give another --output, or --force to replace it")


def is_validation(rows: npt.NDArray[np.uint64], limit: int) -> npt.NDArray[np.bool_]:
    """Return a mask of the rows that are held out, from their numbers."""
    return _hash(rows) <= np.uint64(limit)


def _limit(rows: int, fraction: float) -> int:
    """Return the largest hash of a held-out row; at least one row is held out."""
    # The same hash as in `is_validation`, so the smallest one selects at least its own row.
    least = min(int(_hash(np.arange(a, min(a + _CHUNK_ROWS, rows), dtype=np.uint64)).min())
                for a in range(0, rows, _CHUNK_ROWS))  # fmt: skip
    # 2**64 - 2**12 is exact as a float. 2**64 - 1 is not: it becomes 2**64, which does not fit into uint64.
    return max(least, int(fraction * float(2**64 - 2**12)))


def _hash(rows: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Hash row numbers with SplitMix64 (Steele et al. 2014), so that neighbours are independent."""
    # Arrays of uint64 wrap around silently, as the hash needs; scalars would warn. These constants decide which rows
    # are held out: another one would move rows between the parts of a data set that was divided before.
    z = rows + np.uint64(1)
    z = z * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _write_parts(split: Split, limit: int, paths: list[Path]) -> list[int]:
    # Keeps the features of `datasets` (class names). ORIGIN belongs to the cache of converted files, and the writer
    # makes its own ARROW:schema.
    metadata = {k: v for k, v in (read_file_schema(split).metadata or {}).items() if k not in (ORIGIN, b"ARROW:schema")}
    schema = castable(split.schema).with_metadata(metadata)
    # Batches are small, and each call of the writer would begin a row group.
    parts: list[list[pa.Table]] = [[], []]
    counts = [0, 0]
    with ExitStack() as stack:
        writers = [stack.enter_context(pq.ParquetWriter(path, schema, compression="zstd")) for path in paths]
        for first, batch in _numbered_batches(split):
            is_held_out = is_validation(np.arange(first, first + batch.num_rows, dtype=np.uint64), limit)
            # A writer takes only tables of its own schema.
            table = pa.Table.from_batches([batch]).cast(schema)
            for index, chosen in enumerate((~is_held_out, is_held_out)):
                parts[index].append(table.filter(pa.array(chosen)))
                counts[index] += parts[index][-1].num_rows
                _flush(writers[index], parts[index], _GROUP_BYTES)
        for writer, held in zip(writers, parts, strict=True):
            _flush(writer, held, 0)
    if not counts[0]:
        raise DataError(f"{split.rows} rows are too few to divide; give more data, or a smaller --split")
    return counts


def _flush(writer: pq.ParquetWriter, held: list[pa.Table], at_least: int) -> None:
    """Write the held tables as row groups once they exceed a size in bytes."""
    if sum(table.nbytes for table in held) > at_least:
        table = pa.concat_tables(held)
        held.clear()
        if table.num_rows:
            writer.write_table(table, row_group_size=_GROUP_ROWS)


def _numbered_batches(split: Split) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Yield the batches of all rows in order, each with the number of its first row."""
    row = 0
    reading = small_batches(split)
    for fragment in split.fragments:
        for batch in read_batches(fragment, split.schema.names, reading):
            yield row, batch
            row += batch.num_rows
