"""Ray Data deals blocks as we rely on, and a long stream in segments; its windows are never all made."""

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

from launcher.data.ray_data import DeterministicDataConfig, split_stream
from launcher.data.ray_data import build_shards as ray_cells
from launcher.data.stream import StreamSource
from launcher.data.windows import FIRST_SEGMENT, NEXT_SEGMENTS, TRAIN, Window, segments_of, train_windows
from launcher.driver.prepare import PreparedJob
from launcher.driver.run import run_job
from launcher.rundir.plan import Plan
from launcher.rundir.records import StepRecord
from launcher.spec.job import JobSpec
from tests.support.jobs import make_job, prepared_job, write_splits
from tests.support.worker_group import share_cells


def _consumed(cells: list[Iterator[pa.Buffer]]) -> list[list[bytes]]:
    """What all ranks get, which take it at the same time."""
    found: list[list[bytes]] = [[] for _ in cells]

    def consume(rank: int) -> None:
        found[rank] = [cell.to_pybytes() for cell in cells[rank]]

    threads = [Thread(target=consume, args=(rank,)) for rank in range(len(cells))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.ray
@pytest.mark.parametrize("world_size", [2, 3])
def test_ray_data_deals_one_share_per_worker_in_order(
    ray_cluster: None, tiny_bert: Path, tmp_path: Path, world_size: int
) -> None:
    """Fails if a Ray version merges blocks, reorders them, or balances them over the splits."""
    data = write_splits(tmp_path / "data", 331, validation=50, row_group=37)
    prepared = prepared_job(tiny_bert, data, tmp_path, data={**data, "window_steps": 2})
    source = StreamSource(prepared.job, prepared.splits, world_size)
    iterators = split_stream(source, list(train_windows(prepared.plan, prepared.job, 5)))
    found = _consumed([ray_cells(iterator) for iterator in iterators])
    for rank in range(world_size):
        expected = [cell.to_pybytes() for cell in share_cells(prepared, world_size, rank, 5)]
        assert found[rank] == expected, f"rank {rank}"


_DEALT = {"data_workers": 1}


def _long(tiny_bert: Path, tmp_path: Path) -> PreparedJob:
    """More windows than the first segment has."""
    data = write_splits(tmp_path / "data", 150, validation=0)
    return prepared_job(
        tiny_bert, data, tmp_path, data={**data, "window_steps": 1}, train={"batch_size": 1}, cluster=_DEALT
    )


@pytest.mark.ray
def test_a_long_stream_is_dealt_in_segments(ray_cluster: None, tiny_bert: Path, tmp_path: Path) -> None:
    prepared = _long(tiny_bert, tmp_path)
    assert len(list(segments_of(TRAIN, 150, prepared.plan, prepared.job, 3))) == 2
    data = DeterministicDataConfig(prepared.job, prepared.plan, prepared.splits, 3)
    first, later = data.names([TRAIN])

    def both(rank: int) -> Iterator[pa.Buffer]:
        yield from ray_cells(dealt[first][rank][first])
        yield from ray_cells(dealt[later][rank][later].segment(1))  # type: ignore[attr-defined]

    dealt = {name: data.configure({name: None}, 2, None, None) for name in (first, later)}  # type: ignore[dict-item]
    found = _consumed([both(0), both(1)])
    for rank in range(2):
        assert found[rank] == [cell.to_pybytes() for cell in share_cells(prepared, 2, rank, 3)], f"rank {rank}"


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_goes_on_into_the_next_segment(ray_cluster: None, tiny_bert: Path, tmp_path: Path) -> None:
    job = _long(tiny_bert, tmp_path).job
    data = job.data.model_dump(exclude_none=True)
    one = run_job(
        make_job(tiny_bert, data, tmp_path, train={"batch_size": 1}, cluster=_DEALT, name="segments"), _silent()
    )
    steps = [line for line in one.read_metrics() if isinstance(line, StepRecord)]
    assert [line.step for line in steps] == list(range(1, 151))
    assert {line.samples for line in steps} == {1}


def _silent() -> Console:
    return Console(file=StringIO())


def _planned(job: JobSpec, steps_per_epoch: int, epochs: int, window_steps: int, every: int | None) -> Plan:
    return Plan(
        task="t", train_rows=steps_per_epoch, validation_rows=5, test_rows=0, fingerprint="f", batch_size=1,
        window_steps=window_steps, steps_per_epoch=steps_per_epoch, epochs=epochs,
        total_steps=steps_per_epoch * epochs, evaluate_every_steps=every, metric="loss", metric_mode="min", workers=1,
        zero=0, samples_per_worker=1, micro_batch=1, accumulation=1, model={}, parameters=1, state_bytes_per_worker=1,
    )  # fmt: skip


_JOB = make_job(Path("model"), {"train": "train.parquet"}, Path("runs"))


@given(st.integers(1, 40), st.integers(1, 4), st.integers(1, 9), st.one_of(st.none(), st.integers(1, 30)), st.data())
def test_a_resumed_stream_is_the_rest_of_the_whole_one(
    steps: int, epochs: int, window_steps: int, every: int | None, data: st.DataObject
) -> None:
    plan = _planned(_JOB, steps, epochs, window_steps, every)
    start = data.draw(st.integers(0, steps * epochs))

    def events(windows: Iterator[Window]) -> list[tuple[str, int, int, int]]:
        """(kind, step, epoch, window) of all that is done, in order; an evaluation belongs to the steps behind it."""
        return [
            (w.kind, w.first_step + (b if w.kind == TRAIN else 0), w.epoch, w.index)
            for w in windows
            for b in range(w.begin, w.end)
        ]

    whole = events(train_windows(plan, _JOB, 0))
    assert [step for kind, step, *_ in whole if kind == TRAIN] == list(range(steps * epochs))
    rest = [one for one in whole if (one[1] >= start if one[0] == TRAIN else one[1] > start)]
    assert events(train_windows(plan, _JOB, start)) == rest
    pieces = list(segments_of(TRAIN, steps, plan, _JOB, start))
    assert [window for piece in pieces for window in piece] == list(train_windows(plan, _JOB, start))
    assert len(pieces[0]) <= FIRST_SEGMENT and all(len(piece) <= NEXT_SEGMENTS for piece in pieces[1:])


def test_the_windows_of_ten_thousand_million_rows_are_not_made() -> None:
    plan = _planned(_JOB, 10**10 // 32, 3, 64, 10**6)
    start = plan.total_steps - 10**6
    assert next(train_windows(plan, _JOB, start)).epoch == 2
    assert [len(piece) for piece in islice(segments_of(TRAIN, 10**10, plan, _JOB, start), 2)] == [
        FIRST_SEGMENT,
        NEXT_SEGMENTS,
    ]
