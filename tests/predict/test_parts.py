"""Parts of a prediction: their rows, and the worker that does each."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.predict.parts import Layout, PartQueue, cut_parts

_ROWS = st.integers(1, 3_000_000_000)
_SIZES = st.integers(0, 1 << 50)


@given(_ROWS, _SIZES)
def test_parts_cover_every_row_once_and_are_neither_tiny_nor_huge(rows: int, size: int) -> None:
    layout = cut_parts(rows, size)
    assert layout == cut_parts(rows, size)
    assert 1 <= layout.piece_rows <= layout.part_rows <= 65536
    last = layout.parts - 1
    assert layout.part(0).start == 0 and layout.part(last).stop == rows and len(layout.part(last)) > 0
    for number in {0, last // 2, max(0, last - 1)} - {last}:
        assert len(layout.part(number)) == layout.part_rows
        assert layout.part(number).stop == layout.part(number + 1).start
    row_bytes = max(1.0, size / rows)
    assert layout.part_rows == 1 or layout.part_rows * row_bytes <= 128 << 20
    assert layout.piece_rows == 1 or layout.piece_rows * row_bytes <= 8 << 20
    assert layout.part_rows >= min(2048, int((128 << 20) / row_bytes), 65536)


@settings(deadline=None)  # thousands of rows take longer on a busy machine
@given(st.integers(1, 5000), st.integers(1, 700), st.integers(1, 90))
def test_pieces_make_up_their_part(rows: int, part_rows: int, piece_rows: int) -> None:
    layout = Layout(rows, part_rows, piece_rows)
    ids = [row for number in range(layout.parts) for piece in layout.pieces(number) for row in piece]
    assert ids == list(range(rows))
    assert all(len(piece) <= piece_rows for number in range(layout.parts) for piece in layout.pieces(number))


def test_the_cut_of_known_inputs_never_changes() -> None:
    """Compare with fixed layouts: another cut would make unfinished outputs useless."""
    assert cut_parts(10_000_000, 600_000_000) == Layout(10_000_000, 39063, 8192)
    assert cut_parts(100_000_000, 6_000_000_000) == Layout(100_000_000, 65536, 8192)
    assert cut_parts(41, 2000) == Layout(41, 2048, 2048)
    assert cut_parts(50_000, 50_000 * (1 << 20)) == Layout(50_000, 128, 8)  # pictures of 1 MiB


@given(st.integers(0, 60), st.integers(1, 7), st.integers(0, 1 << 30))
def test_every_part_is_done_once_when_random_workers_die(parts: int, workers: int, seed: int) -> None:
    draw, queue, done = random.Random(seed), PartQueue(range(parts)), []
    busy: dict[int, int] = {}
    idle, born = list(range(workers)), workers
    while queue.left:
        for worker in list(idle):
            turn = queue.take(worker)
            if turn is None:
                continue
            assert turn[0] != turn[1] and turn[0] not in busy.values() and turn[0] not in done
            busy[worker] = turn[0]
            idle.remove(worker)
        assert busy  # at least one worker is busy while parts are left
        worker = draw.choice(sorted(busy))
        number = busy.pop(worker)
        if draw.random() < 0.3:
            lost = queue.requeue(worker)
            assert lost is not None and lost[0] == number and lost[1] >= 1
            idle.append(born)
            born += 1
        else:
            queue.mark_written(worker)
            done.append(number)
            idle.append(worker)
    assert sorted(done) == list(range(parts))


def test_parts_are_assigned_in_order_and_lost_ones_first() -> None:
    queue = PartQueue([4, 0, 2, 6, 7])
    assert queue.take(1) == (0, 2)
    assert queue.take(2) == (4, 6)
    assert queue.requeue(1) == (0, 1)  # its next part goes back too
    assert queue.take(3) == (0, None)  # alone: part 2, read ahead, may have killed the worker
    assert queue.requeue(3) == (0, 2)
    queue.mark_written(2)
    assert queue.take(2) == (6, None)
    assert queue.take(4) == (0, None)
    assert queue.take(5) == (2, None)
    assert queue.take(6) == (7, None)
    assert queue.take(7) is None and queue.left == 4
    queue.mark_written(6)
    assert queue.requeue(7) is None and queue.left == 3


def test_an_idle_worker_takes_the_next_part_of_a_busy_one() -> None:
    queue = PartQueue(range(3))
    assert (queue.take(1), queue.take(2), queue.take(3)) == ((0, 1), (2, None), (1, None))
    assert queue.take(4) is None and queue.left == 3
    queue.mark_written(1)
    assert queue.take(1) is None and queue.left == 2


@pytest.mark.parametrize("worker", [0, 1])
def test_a_worker_continues_with_the_part_it_read_ahead(worker: int) -> None:
    queue = PartQueue(range(4))
    first = {key: queue.take(key) for key in (0, 1)}
    queue.mark_written(worker)
    second, before = queue.take(worker), first[worker]
    assert second is not None and before is not None and second[0] == before[1]
