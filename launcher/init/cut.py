"""Validation rows set aside from training data: two Parquet files, the same ones every time. Runs on the client."""

import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from launcher.data.footers import ORIGIN
from launcher.data.splits import Split, first_rows, read_batches, schema_of
from launcher.errors import DataError
from launcher.rundir.uri import describe_os_error

_AT_ONCE = 1 << 20
_GROUP_ROWS = 16384
_GROUP_BYTES = 16 << 20


@dataclass(frozen=True)
class HoldOut:
    """Where the parts are, and how many rows they have."""

    train: str
    validation: str
    train_rows: int
    validation_rows: int


def hold_out(split: Split, fraction: float, folder: Path, force: bool) -> HoldOut:
    """Write a split's rows into `train.parquet` and `validation.parquet`; which row goes where depends on its number.

    Args:
        split: what to cut.
        fraction: share of rows for validation.
        folder: where the files go; it is made.
        force: whether files that are there may be replaced.

    Raises:
        DataError: a file is there, cannot be written, or there are too few rows.
    """
    check_room(folder, force)
    if split.rows < 2:
        raise DataError(f"--split {fraction:g}: there is {split.rows} row, too few to cut; give more data")
    limit = _limit(split.rows, fraction)
    targets = (folder / "train.parquet", folder / "validation.parquet")
    staged = [target.with_name(f".{target.name}.{os.getpid()}.tmp") for target in targets]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        counts = _write(split, limit, staged)
        for source, target in zip(staged, targets, strict=True):
            os.replace(source, target)
    except OSError as error:
        raise DataError(f"{folder}: cannot be written ({describe_os_error(error)}); give another --output") from error
    finally:
        for source in staged:
            source.unlink(missing_ok=True)
    return HoldOut(str(targets[0]), str(targets[1]), counts[0], counts[1])


def check_room(folder: Path, force: bool) -> None:
    """Refuse to write over files.

    Raises:
        DataError: there are some.
    """
    there = [name for name in ("train.parquet", "validation.parquet") if (folder / name).exists()]
    if there and not force:
        raise DataError(f"{folder / there[0]}: is there already; give another --output, or --force to replace it")


def is_validation(rows: npt.NDArray[np.uint64], limit: int) -> npt.NDArray[np.bool_]:
    """Whether rows are set aside, by their numbers."""
    return _mixed(rows) <= np.uint64(limit)


def _limit(rows: int, fraction: float) -> int:
    """The largest hash that is set aside; at least one row's, however few there are."""
    least = min(int(_mixed(np.arange(a, min(a + _AT_ONCE, rows), dtype=np.uint64)).min())
                for a in range(0, rows, _AT_ONCE))  # fmt: skip
    return max(least, int(fraction * float(2**64 - 2**12)))


def _mixed(rows: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SplitMix64 (Steele et al. 2014): neighbours get numbers that have nothing to do with each other."""
    z = rows + np.uint64(1)
    z = z * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _write(split: Split, limit: int, paths: list[Path]) -> list[int]:
    metadata = {k: v for k, v in (schema_of(split).metadata or {}).items() if k not in (ORIGIN, b"ARROW:schema")}
    schema = split.schema.with_metadata(metadata)
    parts: list[list[pa.Table]] = [[], []]
    counts = [0, 0]
    with ExitStack() as stack:
        writers = [stack.enter_context(pq.ParquetWriter(path, schema, compression="zstd")) for path in paths]
        for first, batch in _numbered(split):
            aside = is_validation(np.arange(first, first + batch.num_rows, dtype=np.uint64), limit)
            table = pa.Table.from_batches([batch]).cast(split.schema).replace_schema_metadata(metadata)
            for index, chosen in enumerate((~aside, aside)):
                parts[index].append(table.filter(pa.array(chosen)))
                counts[index] += parts[index][-1].num_rows
                _flush(writers[index], parts[index], _GROUP_BYTES)
        for writer, held in zip(writers, parts, strict=True):
            _flush(writer, held, 0)
    if not counts[0]:
        raise DataError(f"{split.rows} rows are too few to cut; give more data, or a smaller --split")
    return counts


def _flush(writer: pq.ParquetWriter, held: list[pa.Table], at_least: int) -> None:
    """Write what is held as one row group, once it is worth one."""
    if sum(table.nbytes for table in held) > at_least:
        table = pa.concat_tables(held)
        held.clear()
        if table.num_rows:
            writer.write_table(table, row_group_size=_GROUP_ROWS)


def _numbered(split: Split) -> Iterator[tuple[int, pa.RecordBatch]]:
    """All rows in order, with the number of each batch's first."""
    row, how = 0, first_rows(split)
    for fragment in split.fragments:
        for batch in read_batches(fragment, split.schema.names, how):
            yield row, batch
            row += batch.num_rows
