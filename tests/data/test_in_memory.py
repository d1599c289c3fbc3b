"""Train workers that read for themselves get what Ray Data would deal them, and do so where that is cheap."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.data import in_memory
from launcher.data.in_memory import can_read_in_workers, iter_shards_in_memory
from launcher.data.stream import StreamSource
from launcher.data.windows import TRAIN, windows_of
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
def test_the_stream_is_the_same(prepared: PreparedJob, world_size: int, start: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, world_size - 1))
    windows = windows_of(TRAIN, prepared.splits[TRAIN].rows, prepared.plan, prepared.job, start)
    found = iter_shards_in_memory(StreamSource(prepared.job, prepared.splits, world_size), windows, rank)
    assert list(found) == list(share_cells(prepared, world_size, rank, start))


@pytest.mark.parametrize(
    ("cluster", "reads"),
    [
        ({}, True),
        ({"data_workers": 0, "workers": 8}, True),
        ({"data_workers": 1}, False),
        ({"workers": 5}, False),
        ({"gpus_per_worker": 1}, False),
    ],
)
def test_workers_read_small_data(prepared: PreparedJob, cluster: dict[str, Any], reads: bool) -> None:
    job = prepared.job.model_copy(update={"cluster": prepared.job.cluster.model_copy(update=cluster)})
    assert can_read_in_workers(job, prepared.splits) is reads


def test_large_and_augmented_data_go_through_ray_data(
    prepared: PreparedJob, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pictures = make_job(
        tmp_path, {"train": "x"}, tmp_path, task={"type": "image-classification", "augment": {"flip_fraction": 0.5}}
    )
    assert not can_read_in_workers(pictures, prepared.splits)
    monkeypatch.setattr(in_memory, "_SMALL_BYTES", 1000)
    assert not can_read_in_workers(prepared.job, prepared.splits)
