"""Which rows made a step: what the shards of any number of workers hold, and the inverse, the steps of a row."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from launcher.data.batch_rows import RowUse, StepRows, find_row, find_uses, read_step_rows
from launcher.data.rank_batches import deserialize_shard
from launcher.data.stream import CutWindow, StreamSource, read_batch_rows
from launcher.data.windows import TRAIN, Window, train_windows
from launcher.driver.prepare import PreparedJob
from launcher.errors import DataError
from tests.support.jobs import example_table, prepared_job, write_splits
from tests.support.worker_group import share_cells

_PACKED: dict[str, Any] = {"task": {"type": "causal-lm", "max_length": 48, "packing": True}}
# Name -> sections of the job, and of its data.
_CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "ungrouped": ({}, {"group_by_length": False}),
    "micro-batches of one": ({"parallel": {"micro_batch": 1}}, {}),
    "packed": (_PACKED, {}),
    "mixture": ({}, {"until": "repeat"}),
    "packed mixture": (_PACKED, {"until": "repeat"}),
    "bad rows": ({}, {"on_bad_row": "skip"}),
    "ends in a window": ({"train": {"max_steps": 17, "epochs": 3}}, {"shuffle_pool_mib": 1}),
}


@pytest.fixture(params=tuple(_CASES))
def job(request: pytest.FixtureRequest, tiny_models: dict[str, Path], tmp_path: Path) -> PreparedJob:
    """A job of two epochs; the second source of a mixture starts again within windows."""
    sections, data = _CASES[request.param]
    task = sections.get("task", {}).get("type", "text-classification")
    files: dict[str, Any] = write_splits(tmp_path / "data", train=131, validation=9, row_group=37, task=task)
    if "mixture" in request.param:
        pq.write_table(example_table(5, 9, task), tmp_path / "data/small.parquet")
        small = {"train": str(tmp_path / "data/small.parquet"), "weight": 0.3}
        files = {"mixture": {"large": {"train": files["train"], "weight": 0.7}, "small": small}}
    if request.param == "bad rows":
        table = pq.read_table(files["train"])
        texts = [None if i in (3, 64, 65) else text for i, text in enumerate(table.column("text").to_pylist())]
        pq.write_table(pa.table({"text": texts, "label": table.column("label")}), files["train"], row_group_size=37)
    train = {"epochs": 2, **sections.get("train", {})}
    evaluation = {"evaluation": {"every_steps": 3}} if "validation" in files else {}
    return prepared_job(tiny_models[task], {**files, **data}, tmp_path, **{**sections, **evaluation, "train": train})


def _all_steps(job: PreparedJob) -> list[StepRows]:
    return [*read_step_rows(job.job, job.plan, job.splits["train"], range(1, job.plan.total_steps + 1))]


def _delivered(job: PreparedJob, workers: int) -> dict[tuple[int, int], list[tuple[int, int]]]:
    """Return for each step and part the first row of each sequence and its number of samples, as shards hold them."""
    places: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for rank in range(workers):
        for shard in share_cells(job, workers, rank, 0):
            header, batches = deserialize_shard(shard)
            if header.kind != TRAIN:
                continue
            for step, batch in enumerate(batches, header.first_step + 1):
                for part in batch.parts:
                    for samples in part.micro_batches:
                        packed = "segments" in samples.column_names
                        counts = (
                            [len(s) for s in samples.column("segments").to_pylist()] if packed else [1] * len(samples)
                        )
                        rows = samples.column("__row").to_pylist()
                        own = [(row, count) for row, count in zip(rows, counts, strict=True) if row >= 0]
                        places.setdefault((step, part.index), []).extend(own)
    return {place: rows for place, rows in places.items() if rows}


def _named(steps: list[StepRows]) -> dict[tuple[int, int], list[tuple[int, int]]]:
    places: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for rows in steps:
        _, first = np.unique(rows.sequence, return_index=True)
        for i in first.tolist():
            sequence = (int(rows.ids[i]), int(rows.samples[i]))
            places.setdefault((rows.step, int(rows.part[i])), []).append(sequence)
    return places


def test_rows_of_each_step_and_part_are_those_that_any_number_of_workers_gets(job: PreparedJob) -> None:
    steps = _all_steps(job)
    assert [rows.step for rows in steps] == [*range(1, job.plan.total_steps + 1)]
    named = _named(steps)
    for workers in (1, 2, 3):
        assert _delivered(job, workers) == named
    headers = [deserialize_shard(shard)[0] for shard in share_cells(job, 1, 0, 0)]
    weights = [step.weight for header in headers if header.kind == TRAIN for step in header.steps]
    assert [rows.weight.sum() for rows in steps] == pytest.approx(weights)


def test_a_range_of_steps_is_a_slice_of_all_of_them(job: PreparedJob) -> None:
    train = job.splits["train"]
    whole = [rows.table(train) for rows in _all_steps(job)]
    assert [rows.table(train) for rows in read_step_rows(job.job, job.plan, train, range(4, 15))] == whole[3:14]
    assert sorted(whole[5].column("row").to_pylist()) == read_batch_rows(job.job, job.plan, job.splits, 5).tolist()


def test_steps_of_a_row_are_those_that_have_it(job: PreparedJob, monkeypatch: pytest.MonkeyPatch) -> None:
    cuts: dict[Window, CutWindow] = {}
    cut = StreamSource.cut
    # Every row asks for its windows: encoded once each, not once for each row.
    monkeypatch.setattr(
        StreamSource, "cut", lambda source, window: cuts.get(window) or cuts.setdefault(window, cut(source, window))
    )
    train = job.splits["train"]
    steps = _all_steps(job)
    expected: dict[int, list[tuple[int, int, int]]] = {}
    for rows in steps:
        for row, epoch, part in zip(rows.ids.tolist(), rows.epoch.tolist(), rows.part.tolist(), strict=True):
            expected.setdefault(row, []).append((rows.step, epoch, part))
    bad = 0
    for row in range(train.rows):
        uses = [*find_uses(job.job, job.plan, train, row)]
        found = [(use.step, use.epoch, use.part) for use in uses if use.step is not None]
        assert sorted(found) == sorted(expected.get(row, []))
        bad += len(uses) - len(found)
    if job.job.data.on_bad_row == "skip":
        assert bad == 2 * 3
        assert [*find_uses(job.job, job.plan, train, 64)] == [
            RowUse(64, epoch, None, None, "text is null") for epoch in (1, 2)
        ]
    elif train.sources:
        assert max(Counter(row for rows in steps for row in rows.ids.tolist()).values()) > 4
    elif job.plan.total_steps < 20:
        assert {len(uses) for uses in expected.values()} == {1, 2}
    else:
        assert {len(uses) for uses in expected.values()} == {2}


def test_only_windows_that_have_the_row_are_encoded(job: PreparedJob, monkeypatch: pytest.MonkeyPatch) -> None:
    cuts: list[Window] = []
    cut = StreamSource.cut

    def counted(source: StreamSource, window: Window) -> CutWindow:
        cuts.append(window)
        return cut(source, window)

    monkeypatch.setattr(StreamSource, "cut", counted)
    uses = [*find_uses(job.job, job.plan, job.splits["train"], 17)]
    windows = [window for window in train_windows(job.plan, job.job, 0) if window.kind == TRAIN]
    assert len(cuts) <= len(uses) + (job.plan.total_steps < 20)
    assert len(cuts) < len(windows)


def test_the_table_names_files_as_the_user_does(tiny_bert: Path, tmp_path: Path) -> None:
    for i in range(3):
        pq.write_table(example_table(20 + i, i), tmp_path / f"part-{i}.parquet", row_group_size=6)
    (tmp_path / "more").mkdir()
    table = example_table(13, 7)
    lines = [
        f"{text},{label}" for text, label in zip(*(table.column(c).to_pylist() for c in ("text", "label")), strict=True)
    ]
    (tmp_path / "more/part-1.csv").write_text("\n".join(["text,label", *lines]))
    files = [*(str(tmp_path / f"part-{i}.parquet") for i in range(3)), str(tmp_path / "more/part-1.csv")]
    job = prepared_job(tiny_bert, {"train": files}, tmp_path)
    train = job.splits["train"]
    tables = [rows.table(train) for rows in _all_steps(job)]
    named = [(row["file"], row["file_row"], row["row"]) for table in tables for row in table.to_pylist()]
    assert len({(file, number) for file, number, _ in named}) == 20 + 21 + 22 + 13
    texts = {
        file: (example_table(20 + i, i) if i < 3 else table).column("text").to_pylist() for i, file in enumerate(files)
    }
    read = train.read(np.array([row for _, _, row in named]), ("text",)).column("text").to_pylist()
    assert read == [texts[file][number] for file, number, _ in named]
    for file, number, row in named:
        assert find_row(train, file, number).tolist() == [row]
    assert find_row(train, "part-2.parquet", 3).tolist() == [44]
    assert find_row(train, "more/part-1.csv", 12).tolist() == [75]


@pytest.mark.parametrize(
    ("file", "number", "error"),
    [
        ("c.parquet", 0, r"--row: c\.parquet is no file of the training data; it has .*/x/a\.parquet, .*/y/a\.parquet"),
        ("arquet", 0, "--row: arquet is no file"),
        ("a.parquet", 0, r"--row: a\.parquet may be .*/x/a\.parquet, .*/y/a\.parquet; give more of its path"),
        ("x/a.parquet", 12, r"--row: .*/x/a\.parquet has no row 12; it has 12 rows, numbered from 0"),
    ],
)
def test_a_row_that_is_not_there_is_refused(
    tiny_bert: Path, tmp_path: Path, file: str, number: int, error: str
) -> None:
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        pq.write_table(example_table(12), tmp_path / folder / "a.parquet")
    job = prepared_job(tiny_bert, {"train": [str(tmp_path / "x"), str(tmp_path / "y")]}, tmp_path)
    with pytest.raises(DataError, match=error):
        find_row(job.splits["train"], file, number)


def test_a_file_that_is_named_twice_has_two_rows(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pq.write_table(example_table(12), tmp_path / "a.parquet", row_group_size=5)
    job = prepared_job(tiny_bert, {"train": [str(tmp_path / "a.parquet")] * 2}, tmp_path)
    monkeypatch.chdir(tmp_path)
    assert find_row(job.splits["train"], "./a.parquet", 7).tolist() == [7, 19]
