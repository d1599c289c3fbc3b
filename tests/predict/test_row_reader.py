"""Rows by range from files and row groups of any size, without decoding from the beginning again."""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from launcher.data.splits import Fragment, Reading, Split, open_split
from launcher.errors import DataError
from launcher.predict import row_reader
from launcher.predict.row_reader import RowReader


def _table(begin: int, rows: int) -> pa.Table:
    ids = np.arange(begin, begin + rows)
    return pa.table({"id": ids, "text": [f"row {i}" for i in ids]})


@pytest.fixture
def split(tmp_path: Path) -> Split:
    """Write 1000 rows: tiny row groups, one large, an Arrow file, many tiny files and one of other types."""
    pq.write_table(_table(0, 90), tmp_path / "a.parquet", row_group_size=7)
    pq.write_table(_table(90, 700), tmp_path / "b.parquet")
    with pa.OSFile(str(tmp_path / "c.arrow"), "wb") as sink, pa.ipc.new_file(sink, _table(0, 1).schema) as writer:
        writer.write_table(_table(790, 110), max_chunksize=40)
    for i in range(50):
        pq.write_table(_table(900 + i, 1), tmp_path / f"d{i:02d}.parquet")
    narrow = _table(950, 50).select(["text", "id"]).cast(pa.schema({"text": pa.large_string(), "id": pa.int32()}))
    pq.write_table(narrow, tmp_path / "e.parquet", store_schema=False)
    return open_split("input", [str(tmp_path)])


def test_ranges_are_read_in_any_order(split: Split) -> None:
    reader, draw = RowReader(split, 16), random.Random(0)
    assert split.rows == 1000
    for _ in range(200):
        begin = draw.randrange(1000)
        stop = min(1000, begin + draw.choice([1, 5, 60, 400]))
        table = reader.read(range(begin, stop))
        assert table.schema == split.schema
        assert table.column("id").to_pylist() == list(range(begin, stop))
        assert table.column("text").to_pylist() == [f"row {i}" for i in range(begin, stop)]
    assert reader.read(range(5, 5)).num_rows == 0


def test_a_large_row_group_is_decoded_once(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    original = row_reader.read_fragments

    def counted(fragments: Sequence[Fragment], names: Sequence[str], how: Reading) -> Iterator[pa.RecordBatch]:
        opened.append(Path(fragments[0].path).name)
        return original(fragments, names, how)

    monkeypatch.setattr(row_reader, "read_fragments", counted)
    reader = RowReader(split, 16)
    for begin in range(100, 790, 30):  # the ranges between belong to other workers
        reader.read(range(begin, begin + 15))
    assert opened == ["b.parquet"]
    for begin in range(0, 90, 9):
        reader.read(range(begin, begin + 9))
    assert opened == ["b.parquet", "a.parquet"]  # thirteen row groups, one stream


def test_a_file_that_changed_since_its_footer_was_read_is_refused(split: Split, tmp_path: Path) -> None:
    pq.write_table(_table(90, 600), tmp_path / "b.parquet")
    with pytest.raises(
        DataError, match=r"b\.parquet: changed while it was in use \(it had 700 rows where it has 600\)"
    ):
        RowReader(split, 16).read(range(600, 750))
    (tmp_path / "b.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match=r"b\.parquet: cannot be read \(.*\); restore the file"):
        RowReader(split, 16).read(range(600, 750))
