"""Footers are read once: later commands take them from the cache, except those of changed files."""

import os
import pickle
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from launcher.data import footers
from launcher.data.files import DataFile, list_files
from launcher.data.footers import OnProgress
from launcher.data.fragments import Fragments
from launcher.data.splits import Split, open_files
from launcher.errors import DataError

_FILES = 70


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(_FILES):
        _write(tmp_path / f"data/{number:03d}.parquet", 3 + number % 2)
    return tmp_path


def _write(path: Path, rows: int) -> None:
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table({"text": [f"{path.stem} {i}" for i in range(rows)]}), path, row_group_size=2)


def _open(folder: Path, files: int = _FILES, on_progress: OnProgress | None = None) -> Split:
    cache = str(folder / ".cache/footers/x.arrow")
    return open_files("train", list_files("train", str(folder / "data"))[:files], cache, on_progress)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the names of the files whose footers are read."""
    names: list[str] = []
    read_footer = footers._read_footer

    def recording(file: DataFile, schemas: dict[bytes, bytes]) -> object:
        names.append(Path(file.path).stem)
        return read_footer(file, schemas)

    monkeypatch.setattr(footers, "_read_footer", recording)
    return names


def test_second_opening_reads_only_changed_files(folder: Path, read: list[str]) -> None:
    progress: list[tuple[int, int]] = []
    first = _open(folder, on_progress=lambda done, total: progress.append((done, total)))
    assert sorted(read) == sorted(f"{n:03d}" for n in range(_FILES)) and progress[-1] == (_FILES, _FILES)
    read.clear()
    second = _open(folder)
    assert not read and second.fingerprint == first.fingerprint and list(second.fragments) == list(first.fragments)
    assert second.schema == first.schema
    _write(folder / "data/007.parquet", 9)
    info = (folder / "data/008.parquet").stat()
    os.utime(folder / "data/008.parquet", ns=(info.st_atime_ns, info.st_mtime_ns + 1))
    third = _open(folder)
    assert sorted(read) == ["007", "008"] and third.rows == first.rows + 5
    uncached = open_files("train", list_files("train", str(folder / "data")))
    assert third.fingerprint == uncached.fingerprint != first.fingerprint
    assert sorted(os.listdir(folder / ".cache/footers")) == ["x.arrow"]


@pytest.mark.parametrize("damage", ["cut", "garbage", "empty"])
def test_damaged_cache_is_written_again(
    folder: Path, read: list[str], damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    cache = folder / ".cache/footers/x.arrow"
    fingerprint = _open(folder).fingerprint
    content = cache.read_bytes()
    cache.write_bytes({"cut": content[: len(content) // 2], "garbage": os.urandom(999), "empty": b""}[damage])
    read.clear()
    assert _open(folder).fingerprint == fingerprint
    assert len(read) == _FILES and "all footers are read again" in caplog.text
    read.clear()
    assert _open(folder).fingerprint == fingerprint and not read


def test_footers_of_few_files_are_not_cached(folder: Path) -> None:
    _open(folder, files=5)
    assert not (folder / ".cache").exists()


def test_error_names_the_first_broken_file(folder: Path) -> None:
    for number in (11, 60):
        (folder / f"data/{number:03d}.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"011\.parquet: not a readable parquet file \(.*\); restore or remove it"):
        _open(folder)


def test_hundred_thousand_fragments_pickle_fast_and_small() -> None:
    count = 100_000
    files = pa.table(
        {
            "path": pa.array([f"/data/part-{i:06d}.parquet" for i in range(count)], pa.large_string()),
            "format": pa.array(["parquet"] * count, pa.large_string()),
            "origin": pa.array([""] * count, pa.large_string()),
        }
    )
    ones = np.ones(count, np.int64)
    fragments = Fragments.of(files, ones, 3 * ones, 100 * ones)
    assert fragments.starts[-1] == 3 * count
    started = time.perf_counter()
    content = pickle.dumps(fragments, protocol=5)
    copy = pickle.loads(content)
    assert time.perf_counter() - started < 1 and len(content) < 110 * count
    assert copy[99_999] == fragments[99_999] and copy[99_999].path.endswith("part-099999.parquet")
    assert [f.path for f in copy[2:4]] == ["/data/part-000002.parquet", "/data/part-000003.parquet"]
