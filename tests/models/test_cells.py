"""Cells name files where the data lie, and nowhere else (`launcher/models/cells.py`)."""

import os
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from launcher.driver.prepare import with_absolute_paths
from launcher.models.cells import CellSource, read_cell
from launcher.spec.data import DataSpec
from launcher.tasks import build_task
from tests.support import jobs

_OUTSIDE = (
    "which is outside of the directories of the data; if you trust the authors of the data, add its directory to data"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Data with a file beside them, and a secret elsewhere."""
    (tmp_path / "data" / "pictures").mkdir(parents=True)
    (tmp_path / "data" / "train.parquet").touch()
    (tmp_path / "data" / "pictures" / "a.png").write_bytes(b"a")
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "b.png").write_bytes(b"b")
    return tmp_path


def _source(folder: Path, location: str = "data/train.parquet", *more: str) -> CellSource:
    return CellSource.from_data(DataSpec(train=(str(folder / location),), files_below=more))


@pytest.mark.parametrize("location", ["data/train.parquet", "data", "data/*.parquet", "data/**/x.csv"])
def test_files_below_the_directories_of_the_data_are_read(folder: Path, location: str) -> None:
    path = str(folder / "data/pictures/a.png")
    for cell in (path, f"file://{path}", {"bytes": None, "path": path}, b"a"):
        assert read_cell(cell, _source(folder, location)) == b"a"


@pytest.mark.parametrize("cell", ["secret/b.png", "data/../secret/b.png", "data/pictures/link/b.png", "database/c.png"])
@pytest.mark.parametrize("scheme", ["", "file://"])
def test_other_files_are_refused(folder: Path, cell: str, scheme: str) -> None:
    os.symlink(folder / "secret", folder / "data" / "pictures" / "link")
    (folder / "database").mkdir()
    (folder / "database" / "c.png").touch()
    with pytest.raises(ValueError, match=_OUTSIDE):
        read_cell(f"{scheme}{folder / cell}", _source(folder))


def test_files_below_allows_more_directories(folder: Path) -> None:
    source = _source(folder, "data/train.parquet", str(folder / "secret"))
    assert read_cell(str(folder / "secret/b.png"), source) == b"b"


def test_a_linked_directory_is_resolved(folder: Path) -> None:
    os.symlink(folder / "data", folder / "linked")
    assert read_cell(str(folder / "data/pictures/a.png"), _source(folder, "linked/train.parquet")) == b"a"


def test_nothing_is_read_without_directories(folder: Path) -> None:
    with pytest.raises(ValueError, match=_OUTSIDE):
        read_cell(str(folder / "data/pictures/a.png"), CellSource())


@pytest.mark.parametrize(
    "root, cell, inside",
    [
        ("s3://b/data/t.parquet", "s3://b/data/x/a.png", True),
        ("s3://b/data", "s3://b/data/a.png", True),
        ("s3://b/data/*.parquet", "s3://b/data/a.png", True),
        ("gs://b/data", "gcs://b/data/a.png", True),
        ("s3://b/data?endpoint_override=here", "s3://b/data/a.png?endpoint_override=here", True),
        ("s3://b/data?endpoint_override=here", "s3://b/data/a.png", True),
        ("s3://b/data", "s3://b/data/a.png?endpoint_override=evil", False),
        ("s3://b/data", "s3://b/database/a.png", False),
        ("s3://b/data", "s3://other/data/a.png", False),
        ("s3://b/data", "s3://key:secret@b/data/a.png", False),
        ("s3://b/data", "gs://b/data/a.png", False),
        ("hdfs://h/data", "hdfs://h/data/%2e%2e/etc/a.png", False),
        ("hdfs://h/data", "hdfs://h/data/../etc/a.png", False),
        ("hdfs://h/data", "hdfs://h:1/data/a.png", False),
        ("s3://b/data", "/etc/hostname", False),
    ],
)
def test_uris_must_be_below_the_data_on_the_same_server(root: str, cell: str, inside: bool) -> None:
    source = CellSource.from_data(DataSpec(train=(root,)))
    assert (source.holds_uri(cell) if "://" in cell else source.holds_path(cell)) == inside


@pytest.mark.parametrize(
    "cell",
    [
        "http://127.0.0.1/x", "reference::file:///x.json", "simplecache::s3://b/data/x", "zip://x.png::file:///tmp/x.zip",
        "hf://datasets/a/b.png", "file:///x.png::zip://a", "jupyter://a:1/x",
    ],
)  # fmt: skip
def test_other_protocols_are_refused_even_if_all_directories_are_allowed(cell: str) -> None:
    with pytest.raises(ValueError, match=r"files are read from paths and s3://, .* alone; copy it to one of them"):
        read_cell(cell, CellSource(("/",), (("s3://b/data", ""),)))


def test_data_sets_of_the_hub_allow_no_directory() -> None:
    assert CellSource.from_data(DataSpec(train=("hub:org/name",))) == CellSource()


def test_a_task_reads_files_below_the_directories_of_its_job(
    folder: Path, tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refuse a row with the key that would allow it, and accept it with that key as a relative path."""
    rows = jobs.example_table(2, task="image-classification")
    (folder / "secret" / "b.png").write_bytes(rows.column("image")[0].as_py()["bytes"])
    cells = jobs.pa.table({"image": [str(folder / "secret/b.png")], "label": ["a"]})
    pq.write_table(cells, folder / "data" / "train.parquet")
    task = {"type": "image-classification", "labels": ["a", "b"]}
    data = {"train": str(folder / "data" / "train.parquet")}
    model = tiny_models["image-classification"]
    encoded = build_task(jobs.make_job(model, data, folder, task=task)).encode(cells, True)
    assert len(encoded.valid_rows) == 0 and f"{_OUTSIDE}.files_below" in encoded.problems[0][1]
    monkeypatch.chdir(folder)
    trusting = with_absolute_paths(jobs.make_job(model, {**data, "files_below": "secret"}, folder, task=task))
    assert trusting.data.files_below == (str(folder / "secret"),)
    assert len(build_task(trusting).encode(cells, True).valid_rows) == 1
