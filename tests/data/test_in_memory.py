"""Train workers that read for themselves get the shards that Ray Data would deliver, and read only small data."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.data import in_memory
from launcher.data.in_memory import InMemorySource, can_read_in_workers, iter_shards_in_memory
from launcher.data.stream import StreamSource
from launcher.data.windows import TRAIN, stream_windows, train_windows
from launcher.driver.prepare import PreparedJob
from tests.support.jobs import make_job, prepared_job, write_splits
from tests.support.worker_group import share_cells


@pytest.fixture(scope="module")
def prepared(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> PreparedJob:
    folder = tmp_path_factory.mktemp("encoded")
    data = write_splits(folder / "data", 131, validation=50, row_group=37)
    return prepared_job(
        tiny_bert, {**data, "window_steps": 2}, folder, train={"epochs": 2}, evaluation={"every_steps": 5}
    )


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(0, 23), st.data())
def test_shards_built_in_a_train_worker_are_those_of_the_stream(
    prepared: PreparedJob, world_size: int, start: int, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(0, world_size - 1))
    windows = stream_windows(TRAIN, prepared.splits[TRAIN].source_rows, prepared.plan, prepared.job, start)
    shards = iter_shards_in_memory(StreamSource(prepared.job, prepared.splits, world_size), windows, rank)
    assert list(shards) == list(share_cells(prepared, world_size, rank, start))


def test_rows_that_stay_encoded_in_memory_are_those_of_the_stream(prepared: PreparedJob) -> None:
    plain = StreamSource(prepared.job, prepared.splits, 2)
    in_memory_source = InMemorySource(prepared.job, prepared.splits, 2)
    windows = list(train_windows(prepared.plan, prepared.job, 0))
    assert {window.kind for window in windows} == {"train", "validation"}
    for window in windows:
        assert list(in_memory_source.read(window)) == list(plain.read(window))


@pytest.mark.parametrize(
    ("cluster", "expected"),
    [
        ({}, True),
        ({"data_workers": 0, "workers": 8}, True),
        ({"data_workers": 1}, False),
        ({"workers": 5}, False),
        ({"gpus_per_worker": 1}, False),
    ],
)
def test_train_workers_read_small_data_by_themselves(
    prepared: PreparedJob, cluster: dict[str, Any], expected: bool
) -> None:
    job = prepared.job.model_copy(update={"cluster": prepared.job.cluster.model_copy(update=cluster)})
    assert can_read_in_workers(job, prepared.splits) is expected


def test_large_and_augmented_data_go_through_ray_data(
    prepared: PreparedJob, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    task = {"type": "image-classification", "augment": {"flip_fraction": 0.5}}
    pictures = make_job(tmp_path, {"train": "x"}, tmp_path, task=task)
    assert not can_read_in_workers(pictures, prepared.splits)
    monkeypatch.setattr(in_memory, "_SMALL_BYTES", 1000)
    assert not can_read_in_workers(prepared.job, prepared.splits)
