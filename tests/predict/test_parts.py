"""Parts of a prediction: which rows, whose turn. Pure."""

import random

import pytest
from hypothesis import given
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


@given(st.integers(1, 5000), st.integers(1, 700), st.integers(1, 90))
def test_pieces_make_up_their_part(rows: int, part_rows: int, piece_rows: int) -> None:
    layout = Layout(rows, part_rows, piece_rows)
    ids = [row for number in range(layout.parts) for piece in layout.pieces(number) for row in piece]
    assert ids == list(range(rows))
    assert all(len(piece) <= piece_rows for number in range(layout.parts) for piece in layout.pieces(number))


def test_a_known_input_is_cut_as_ever() -> None:
    """Another cut would make what is half done useless."""
    assert cut_parts(10_000_000, 600_000_000) == Layout(10_000_000, 39063, 8192)
    assert cut_parts(100_000_000, 6_000_000_000) == Layout(100_000_000, 65536, 8192)
    assert cut_parts(41, 2000) == Layout(41, 2048, 2048)
    assert cut_parts(50_000, 50_000 * (1 << 20)) == Layout(50_000, 128, 8)  # pictures of 1 MiB


@given(st.integers(0, 60), st.integers(1, 7), st.integers(0, 1 << 30))
def test_every_part_is_done_once_whoever_dies(parts: int, workers: int, seed: int) -> None:
    draw, turns, done = random.Random(seed), PartQueue(range(parts)), []
    busy: dict[int, int] = {}
    idle, born = list(range(workers)), workers
    while turns.left:
        for worker in list(idle):
            turn = turns.take(worker)
            if turn is None:
                continue
            assert turn[0] != turn[1] and turn[0] not in busy.values() and turn[0] not in done
            busy[worker] = turn[0]
            idle.remove(worker)
        assert busy  # somebody is at work as long as something is left
        worker = draw.choice(sorted(busy))
        number = busy.pop(worker)
        if draw.random() < 0.3:
            lost = turns.lost(worker)
            assert lost is not None and lost[0] == number and lost[1] >= 1
            idle.append(born)
            born += 1
        else:
            turns.done(worker)
            done.append(number)
            idle.append(worker)
    assert sorted(done) == list(range(parts))


def test_parts_are_handed_out_in_order_and_lost_ones_first() -> None:
    turns = PartQueue([4, 0, 2, 6, 7])
    assert turns.take(1) == (0, 2)
    assert turns.take(2) == (4, 6)
    assert turns.lost(1) == (0, 1)  # its next waits again too
    assert turns.take(3) == (0, None)  # alone: it may have been 2, read ahead, that took the worker down
    assert turns.lost(3) == (0, 2)
    turns.done(2)
    assert turns.take(2) == (6, None)
    assert turns.take(4) == (0, None)
    assert turns.take(5) == (2, None)
    assert turns.take(6) == (7, None)
    assert turns.take(7) is None and turns.left == 4
    turns.done(6)
    assert turns.lost(7) is None and turns.left == 3


def test_an_idle_worker_takes_what_a_busy_one_would_do_next() -> None:
    turns = PartQueue(range(3))
    assert (turns.take(1), turns.take(2), turns.take(3)) == ((0, 1), (2, None), (1, None))
    assert turns.take(4) is None and turns.left == 3
    turns.done(1)
    assert turns.take(1) is None and turns.left == 2


@pytest.mark.parametrize("worker", [0, 1])
def test_a_worker_goes_on_with_what_it_read_ahead(worker: int) -> None:
    turns = PartQueue(range(4))
    told = {key: turns.take(key) for key in (0, 1)}
    turns.done(worker)
    turn, before = turns.take(worker), told[worker]
    assert turn is not None and before is not None and turn[0] == before[1]
