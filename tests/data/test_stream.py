"""The stream: every row once per epoch, and the same global batches for any number of ranks."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from launcher.data import row_order
from launcher.data.fragments import Fragment
from launcher.data.rank_batches import deserialize_shard
from launcher.data.row_order import epoch_sampler, read_ranges, row_ranges
from launcher.data.sampler import RowIds
from launcher.data.splits import Reading, read_rows
from launcher.data.stream import StreamSource
from launcher.data.windows import train_windows
from launcher.driver.prepare import PreparedJob
from launcher.errors import DataError
from tests.support.jobs import example_table, prepared_job, write_splits
from tests.support.worker_group import share_cells


def _rows_by_step(prepared: PreparedJob, world_size: int, start: int = 0) -> dict[int, list[list[int]]]:
    """Return the row ids of each step, one list per rank, without fillers."""
    steps: dict[int, list[list[int]]] = {}
    for rank in range(world_size):
        for shard in share_cells(prepared, world_size, rank, start):
            header, batches = deserialize_shard(shard)
            if header.kind != "train":
                continue
            for offset, batch in enumerate(batches):
                rows = [row for part in batch.micro_batches for row in part.column("__row").to_pylist() if row >= 0]
                assert {len(part.micro_batches) for part in batch.parts} == {batch.global_batch.micro_batches}
                steps.setdefault(header.first_step + offset, []).append(rows)
    return steps


def _global_batches(prepared: PreparedJob, world_size: int, start: int = 0) -> dict[int, list[int]]:
    steps = _rows_by_step(prepared, world_size, start)
    return {step: sorted(row for rows in ranks for row in rows) for step, ranks in steps.items()}


def _write_layout(folder: Path, layout: str) -> int:
    """Write data in one of four layouts; return the number of rows."""
    folder.mkdir()
    if layout == "one big file":
        pq.write_table(example_table(5003), folder / "all.parquet", row_group_size=5003)
        return 5003
    if layout == "thousand small files":
        for i in range(1000):
            pq.write_table(example_table(1 + i % 3, i), folder / f"part-{i:04d}.parquet")
        return sum(1 + i % 3 for i in range(1000))
    if layout == "uneven row groups":
        sizes = [1, 700, 3, 251, 2, 90, 1]
        table = example_table(sum(sizes))
        with pq.ParquetWriter(folder / "all.parquet", table.schema) as writer:
            begin = 0
            for size in sizes:
                writer.write_table(table.slice(begin, size), row_group_size=size)
                begin += size
        return sum(sizes)
    pq.write_table(example_table(7), folder / "all.parquet")
    return 7


@pytest.mark.parametrize("layout", ["one big file", "thousand small files", "uneven row groups", "less than a batch"])
def test_every_row_comes_once_per_epoch_for_any_layout(tiny_bert: Path, tmp_path: Path, layout: str) -> None:
    rows = _write_layout(tmp_path / "data", layout)
    prepared = prepared_job(tiny_bert, {"train": str(tmp_path / "data")}, tmp_path, train={"epochs": 2})
    per_epoch = -(-rows // 11)
    assert prepared.plan.total_steps == 2 * per_epoch
    batches = _global_batches(prepared, 2)
    for epoch in range(2):
        seen = [row for step in range(epoch * per_epoch, (epoch + 1) * per_epoch) for row in batches[step]]
        assert sorted(seen) == list(range(rows))
    sizes = sorted(map(len, batches.values()), reverse=True)
    assert sizes[: 2 * (rows // 11)] == [11] * (2 * (rows // 11))


def test_global_batches_do_not_depend_on_the_number_of_workers(tiny_bert: Path, tmp_path: Path) -> None:
    prepared = prepared_job(tiny_bert, write_splits(tmp_path / "data", 331, row_group=37), tmp_path)
    batches = {w: _global_batches(prepared, w) for w in (1, 2, 3, 5)}
    assert batches[1] == batches[2] == batches[3] == batches[5]
    assert _global_batches(prepared, 3, start=17) == {s: rows for s, rows in batches[1].items() if s >= 17}


def test_pool_is_read_once_and_gives_the_rows_of_the_sampler(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    texts = [f"w{i % 200} " * 500 + str(i) for i in range(3000)]  # 6 MB in six row groups, sorted by label
    table = pa.table({"text": texts, "label": [i // 1500 for i in range(3000)]})
    pq.write_table(table, tmp_path / "data/all.parquet", row_group_size=500)
    prepared = prepared_job(tiny_bert, {"train": str(tmp_path / "data"), "shuffle_pool_mib": 1}, tmp_path)
    split = prepared.splits["train"]
    source = StreamSource(prepared.job, prepared.splits, 2)
    opened: list[int] = []

    def counted(fragment: Fragment, rows: RowIds, columns: Sequence[str], *how: Reading) -> pa.Table:
        if not how:  # not a sample, which sets its own limits
            opened.append(fragment.index)
        return read_rows(fragment, rows, columns, *how)

    columns = ("text", "label")
    windows = [window for window in train_windows(prepared.plan, prepared.job, 0) if window.kind == "train"]
    expected = [split.read(source.row_ids(window), columns) for window in windows]
    monkeypatch.setattr("launcher.data.splits.read_rows", counted)
    ranges = [row_ranges(prepared.job, split, window) for window in windows]
    assert [read_ranges(parts, columns) for parts in ranges] == expected
    pools = len(epoch_sampler(prepared.job, split, 0).pool_starts) - 1
    assert 4 < pools < len(windows) / 5
    assert len(opened) <= 6 * (pools + 1)  # each row group once for each pool, not for each window


def test_trials_that_read_one_split_hold_one_pool_together(tiny_bert: Path, tmp_path: Path) -> None:
    data = write_splits(tmp_path / "data", 40)
    for seed in (1, 2, 3):
        prepared = prepared_job(tiny_bert, data, tmp_path, seed=seed)
        split, columns = prepared.splits["train"], ("text", "label")
        window = next(train_windows(prepared.plan, prepared.job, 0))
        rows = read_ranges(row_ranges(prepared.job, split, window), columns)
        assert rows == split.read(StreamSource(prepared.job, prepared.splits, 1).row_ids(window), columns)
    assert len(row_order._held_pools(split.version, columns)) == 1


def test_skipped_rows_are_counted_once_and_all_others_come_once(tiny_bert: Path, tmp_path: Path) -> None:
    table = example_table(100)
    texts = table.column("text").to_pylist()
    texts[13] = texts[57] = None
    pq.write_table(pa.table({"text": texts, "label": table.column("label")}), tmp_path / "bad.parquet")
    skip = prepared_job(tiny_bert, {"train": str(tmp_path / "bad.parquet"), "on_bad_row": "skip"}, tmp_path)
    seen = sorted(row for rows in _global_batches(skip, 2).values() for row in rows)
    assert seen == [i for i in range(100) if i not in (13, 57)]
    headers = [deserialize_shard(shard)[0] for rank in range(2) for shard in share_cells(skip, 2, rank, 0)]
    assert sum(header.skipped_rows for header in headers) == 2
    stop = prepared_job(tiny_bert, {"train": str(tmp_path / "bad.parquet")}, tmp_path)
    with pytest.raises(DataError, match=r"bad\.parquet: row (13|57): text is null; fix the row, or set data\.on_bad"):
        _global_batches(stop, 1)


def test_length_grouping_saves_padding(tiny_bert: Path, tmp_path: Path) -> None:
    data = write_splits(tmp_path / "data", 331)

    def padded_tokens(group_by_length: bool) -> int:
        prepared = prepared_job(tiny_bert, data, tmp_path, data={**data, "group_by_length": group_by_length})
        total = 0
        for shard in share_cells(prepared, 1, 0, 0):
            for batch in deserialize_shard(shard)[1]:
                for samples in batch.micro_batches:
                    lengths = np.array([len(ids) for ids in samples.column("input_ids").to_pylist()])
                    total += int(lengths.max() * len(lengths))
        return total

    assert padded_tokens(True) < 0.9 * padded_tokens(False)


def _parts(prepared: PreparedJob, world_size: int) -> dict[tuple[int, int], list[list[int]]]:
    """Return the row ids of each micro-batch by step and part, -1 for a filler."""
    found: dict[tuple[int, int], list[list[int]]] = {}
    for rank in range(world_size):
        for shard in share_cells(prepared, world_size, rank, 0):
            header, batches = deserialize_shard(shard)
            for offset, batch in enumerate(batches):
                for part in batch.parts:
                    rows = [samples.column("__row").to_pylist() for samples in part.micro_batches]
                    if part.index >= 0:
                        assert found.setdefault((header.first_step + offset, part.index), rows) is rows
                    else:
                        assert rows == [[-1]] * len(rows)
    return found


@pytest.mark.parametrize("micro_batch", [None, 1])
@pytest.mark.parametrize("group_by_length", [True, False])
def test_parts_do_not_depend_on_the_number_of_workers(
    tiny_bert: Path, tmp_path: Path, group_by_length: bool, micro_batch: int | None
) -> None:
    # Three workers do not divide eight parts, and nine are more than there are.
    data = {**write_splits(tmp_path / "data", 71), "group_by_length": group_by_length}
    train, parallel = {"virtual_ranks": 8}, {"micro_batch": micro_batch}
    prepared = prepared_job(tiny_bert, data, tmp_path, train=train, parallel=parallel)
    alone = _parts(prepared, 1)
    assert {part for _, part in alone} == set(range(8))
    for workers in (2, 3, 4, 8, 9):
        assert _parts(prepared, workers) == alone


def test_workers_get_about_as_many_tokens(tiny_bert: Path, tmp_path: Path) -> None:
    train = {"batch_size": 64, "virtual_ranks": 8}
    prepared = prepared_job(tiny_bert, write_splits(tmp_path / "data", 640), tmp_path, train=train)
    for workers in (2, 4):
        tokens = []
        for rank in range(workers):
            batches = [b for shard in share_cells(prepared, workers, rank, 0) for b in deserialize_shard(shard)[1]]
            columns = [samples.column("input_ids") for batch in batches for samples in batch.micro_batches]
            tokens.append(sum(len(ids) for column in columns for ids in column.to_pylist()))
        assert max(tokens) < 1.05 * min(tokens)
