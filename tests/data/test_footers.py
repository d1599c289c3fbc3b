"""Footers are read once: the second opening takes them from the cache, but for files that changed."""

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
from launcher.data.fragments import Fragments
from launcher.data.splits import open_files
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


def _files(folder: Path) -> list[DataFile]:
    return list_files("train", str(folder / "data"))


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Paths whose footers were read."""
    seen: list[str] = []
    tried = footers._tried

    def note(file: DataFile, schemas: dict[bytes, bytes]) -> object:
        seen.append(Path(file.path).stem)
        return tried(file, schemas)

    monkeypatch.setattr(footers, "_tried", note)
    return seen


def test_the_second_opening_reads_what_changed_alone(folder: Path, read: list[str]) -> None:
    cache = str(folder / ".cache/footers/x.arrow")
    told: list[tuple[int, int]] = []
    first = open_files("train", _files(folder), cache, lambda done, total: told.append((done, total)))
    assert sorted(read) == sorted(f"{n:03d}" for n in range(_FILES)) and told[-1] == (_FILES, _FILES)
    read.clear()
    second = open_files("train", _files(folder), cache)
    assert not read and second.fingerprint == first.fingerprint and list(second.fragments) == list(first.fragments)
    assert second.schema == first.schema
    _write(folder / "data/007.parquet", 9)
    info = (folder / "data/008.parquet").stat()
    os.utime(folder / "data/008.parquet", ns=(info.st_atime_ns, info.st_mtime_ns + 1))
    third = open_files("train", _files(folder), cache)
    assert sorted(read) == ["007", "008"] and third.rows == first.rows + 5
    assert third.fingerprint == open_files("train", _files(folder)).fingerprint != first.fingerprint
    assert sorted(os.listdir(folder / ".cache/footers")) == ["x.arrow"]


@pytest.mark.parametrize("damage", ["cut", "garbage", "empty"])
def test_a_torn_cache_is_made_anew(
    folder: Path, read: list[str], damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    cache = folder / ".cache/footers/x.arrow"
    whole = open_files("train", _files(folder), str(cache)).fingerprint
    content = cache.read_bytes()
    cache.write_bytes({"cut": content[: len(content) // 2], "garbage": os.urandom(999), "empty": b""}[damage])
    read.clear()
    assert open_files("train", _files(folder), str(cache)).fingerprint == whole
    assert len(read) == _FILES and "footers are read anew" in caplog.text
    read.clear()
    assert open_files("train", _files(folder), str(cache)).fingerprint == whole and not read


def test_few_files_leave_no_cache(folder: Path) -> None:
    open_files("train", _files(folder)[:5], str(folder / ".cache/footers/x.arrow"))
    assert not (folder / ".cache").exists()


def test_the_first_broken_file_is_named(folder: Path) -> None:
    for number in (11, 60):
        (folder / f"data/{number:03d}.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"011\.parquet: not a readable parquet file \(.*\); restore or remove it"):
        open_files("train", _files(folder), str(folder / ".cache/footers/x.arrow"))


def test_a_hundred_thousand_fragments_travel_light() -> None:
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
    began = time.perf_counter()
    sent = pickle.dumps(fragments, protocol=5)
    back = pickle.loads(sent)
    assert time.perf_counter() - began < 1 and len(sent) < 110 * count
    assert back[99_999] == fragments[99_999] and back[99_999].path.endswith("part-099999.parquet")
    assert [f.path for f in back[2:4]] == ["/data/part-000002.parquet", "/data/part-000003.parquet"]
