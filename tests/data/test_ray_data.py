"""The order of the stream through Ray Data, its segments, and data workers that are interrupted."""

import subprocess
import sys
from collections.abc import Iterator
from io import StringIO
from itertools import islice
from pathlib import Path
from threading import Thread

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from launcher.data.ray_data import DeterministicDataConfig, receive_shards, split_stream
from launcher.data.stream import StreamSource
from launcher.data.windows import FIRST_SEGMENT, NEXT_SEGMENTS, TRAIN, Window, stream_segments, train_windows
from launcher.driver.prepare import PreparedJob
from launcher.driver.run import run_job
from launcher.rundir.plan import Plan
from launcher.rundir.records import StepRecord
from tests.support.jobs import make_job, prepared_job, write_splits
from tests.support.worker_group import share_cells


def _consume_together(shards: list[Iterator[pa.Buffer]]) -> list[list[bytes]]:
    """Return the shards of all ranks, consumed at the same time as a worker group does."""
    contents: list[list[bytes]] = [[] for _ in shards]

    def consume(rank: int) -> None:
        contents[rank] = [shard.to_pybytes() for shard in shards[rank]]

    threads = [Thread(target=consume, args=(rank,)) for rank in range(len(shards))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return contents


def _expected(prepared: PreparedJob, world_size: int, start: int) -> list[list[bytes]]:
    return [
        [shard.to_pybytes() for shard in share_cells(prepared, world_size, rank, start)] for rank in range(world_size)
    ]


@pytest.mark.ray
@pytest.mark.parametrize("world_size", [2, 3])
def test_each_rank_gets_its_shard_of_every_window_in_order(
    ray_cluster: None, tiny_bert: Path, tmp_path: Path, world_size: int
) -> None:
    """Fail if a version of Ray merges blocks, reorders them, or does not assign them to the ranks in turn."""
    data = write_splits(tmp_path / "data", 331, validation=50, row_group=37)
    prepared = prepared_job(tiny_bert, data, tmp_path, data={**data, "window_steps": 2})
    source = StreamSource(prepared.job, prepared.splits, world_size)
    iterators = split_stream(source, list(train_windows(prepared.plan, prepared.job, 5)))
    contents = _consume_together([receive_shards(iterator) for iterator in iterators])
    assert contents == _expected(prepared, world_size, 5)


_CLUSTER = {"data_workers": 1}


def _job_of_two_segments(tiny_bert: Path, tmp_path: Path) -> PreparedJob:
    data = write_splits(tmp_path / "data", 150, validation=0)
    return prepared_job(
        tiny_bert, data, tmp_path, data={**data, "window_steps": 1}, train={"batch_size": 1}, cluster=_CLUSTER
    )


@pytest.mark.ray
def test_segments_of_a_long_stream_follow_each_other(ray_cluster: None, tiny_bert: Path, tmp_path: Path) -> None:
    prepared = _job_of_two_segments(tiny_bert, tmp_path)
    assert len(list(stream_segments(TRAIN, (150,), prepared.plan, prepared.job, 3))) == 2
    data = DeterministicDataConfig(prepared.job, prepared.plan, prepared.splits, 3)
    first, later = data.names([TRAIN])
    shards = {name: data.configure({name: None}, 2, None, None) for name in (first, later)}  # type: ignore[dict-item]

    def both_segments(rank: int) -> Iterator[pa.Buffer]:
        yield from receive_shards(shards[first][rank][first])
        yield from receive_shards(shards[later][rank][later].segment(1))  # type: ignore[attr-defined]

    assert _consume_together([both_segments(0), both_segments(1)]) == _expected(prepared, 2, 3)


@pytest.mark.ray
@pytest.mark.slow
def test_run_continues_into_the_next_segment(ray_cluster: None, tiny_bert: Path, tmp_path: Path) -> None:
    data = _job_of_two_segments(tiny_bert, tmp_path).job.data.model_dump(exclude_none=True)
    job = make_job(tiny_bert, data, tmp_path, train={"batch_size": 1}, cluster=_CLUSTER, name="segments")
    run = run_job(job, Console(file=StringIO()))
    steps = [record for record in run.read_metrics() if isinstance(record, StepRecord)]
    assert [record.step for record in steps] == list(range(1, 151))
    assert {record.samples for record in steps} == {1}


def _make_plan(steps_per_epoch: int, epochs: int, window_steps: int, every: int | None) -> Plan:
    return Plan(
        task="t", train_rows=steps_per_epoch, validation_rows=5, test_rows=0, fingerprint="f", batch_size=1,
        window_steps=window_steps, steps_per_epoch=steps_per_epoch, epochs=epochs,
        total_steps=steps_per_epoch * epochs, evaluate_every_steps=every, metric="loss", metric_mode="min", workers=1,
        zero=0, samples_per_worker=1, micro_batch=1, accumulation=1, model={}, parameters=1, state_bytes_per_worker=1,
    )  # fmt: skip


_JOB = make_job(Path("model"), {"train": "train.parquet"}, Path("runs"))


@given(st.integers(1, 40), st.integers(1, 4), st.integers(1, 9), st.one_of(st.none(), st.integers(1, 30)), st.data())
def test_resumed_windows_are_the_rest_of_the_uninterrupted_ones(
    steps: int, epochs: int, window_steps: int, every: int | None, data: st.DataObject
) -> None:
    plan = _make_plan(steps, epochs, window_steps, every)
    start = data.draw(st.integers(0, steps * epochs))

    def batches_of(windows: Iterator[Window]) -> list[tuple[str, int, int, int]]:
        """Return (kind, step, epoch, window) of each batch in order; an evaluation has the step before it."""
        return [
            (window.kind, window.first_step + (batch if window.kind == TRAIN else 0), window.epoch, window.index)
            for window in windows
            for batch in range(window.begin, window.end)
        ]

    whole = batches_of(train_windows(plan, _JOB, 0))
    assert [step for kind, step, *_ in whole if kind == TRAIN] == list(range(steps * epochs))
    rest = [batch for batch in whole if (batch[1] >= start if batch[0] == TRAIN else batch[1] > start)]
    assert batches_of(train_windows(plan, _JOB, start)) == rest
    segments = list(stream_segments(TRAIN, (steps,), plan, _JOB, start))
    assert [window for segment in segments for window in segment] == list(train_windows(plan, _JOB, start))
    assert len(segments[0]) <= FIRST_SEGMENT and all(len(segment) <= NEXT_SEGMENTS for segment in segments[1:])


def test_windows_of_ten_thousand_million_rows_are_generated_lazily() -> None:
    plan = _make_plan(10**10 // 32, 3, 64, 10**6)
    start = plan.total_steps - 10**6
    assert next(train_windows(plan, _JOB, start)).epoch == 2
    segments = islice(stream_segments(TRAIN, (10**10,), plan, _JOB, start), 2)
    assert [len(segment) for segment in segments] == [FIRST_SEGMENT, NEXT_SEGMENTS]


_TASKS = """
from launcher.data.ray_data import whole_imports
for is_interrupted in {interrupted}:
    try:
        with whole_imports():
            if is_interrupted:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        print("interrupted", flush=True)
print("alive", flush=True)
"""


@pytest.mark.parametrize(
    ("interrupted", "exit_code", "lines"),
    [((True, False), 1, []), ((False, True, False), 0, ["interrupted", "alive"])],
)
def test_data_worker_exits_if_its_first_task_is_interrupted(
    interrupted: tuple[bool, ...], exit_code: int, lines: list[str]
) -> None:
    """Guard against incomplete imports; after the first task an interrupt ends the task alone."""
    code = _TASKS.format(interrupted=interrupted)
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (process.returncode, process.stdout.split("\n")[:-1]) == (exit_code, lines)
