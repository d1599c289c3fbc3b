"""Out of memory on one worker alone: smaller micro-batches, the same curve."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from launcher.data.rank_batches import GlobalBatch
from launcher.rundir.recovery import read_reductions
from launcher.train.loop import forward_backward
from launcher.train.oom import is_out_of_memory
from tests.support.jobs import prepared_job, write_splits
from tests.support.worker_group import run_group, train_here, with_job

_FITS = 2
_JOB: dict[str, Any] = {
    "train": {"learning_rate": 5e-3, "max_steps": 8, "virtual_ranks": 2},
    "checkpoint": {"every_steps": 3, "every_minutes": None},
}


def _small_rank_1(engine: Any, broken: tuple[int, ...] = (0, 5)) -> None:
    """Rank 1 asks torch for a pebibyte in the backward pass of what is larger than two samples, at some steps."""
    forward, seed, now = engine.forward, engine.seed, [0]

    def seeded(step: int, part: int, micro_batch: int) -> None:
        now[0] = step
        seed(step, part, micro_batch)

    def outputs(task: Any, batch: Any, part: int = -1) -> Any:
        found = forward(task, batch, part)
        if dist.get_rank() == 1 and len(batch.labels) > _FITS and now[0] in broken:
            found["logits"].register_hook(lambda gradient: torch.empty(2**50))
        return found

    engine.seed, engine.forward = seeded, outputs


def _healed(prepared: Any) -> Any:
    return train_here(prepared, on_engine=_small_rank_1)["lines"]


def _undisturbed(prepared: Any) -> Any:
    return train_here(prepared)["lines"]


def _same(lines: Any, reference: Any) -> bool:
    expected = dict(map(tuple, reference))
    return all(abs(loss - expected[step]) < 1e-6 for step, loss in lines)


@pytest.mark.parametrize("zero", [0, pytest.param(1, marks=pytest.mark.long)])
def test_a_step_that_does_not_fit_is_made_again_in_smaller_parts(tiny_bert: Path, tmp_path: Path, zero: int) -> None:
    data = write_splits(tmp_path / "data", train=100, row_group=37)
    whole = prepared_job(tiny_bert, data, tmp_path / "whole", parallel={"zero": zero}, **_JOB)
    reference = run_group(2, _undisturbed, whole)
    small = prepared_job(tiny_bert, data, tmp_path / "small", parallel={"zero": zero}, **_JOB)
    lines = run_group(2, _healed, small)
    assert len(lines) == len(reference) == 8 and _same(lines, reference)
    told = [(h.step, h.micro_batch, h.reduced, h.restarted) for h in read_reductions(small.run)]
    assert told == [(1, 5, 3, False), (1, 3, 2, False)]  # said once each, though step 6 would have failed as well
    assert with_job(small).plan.micro_batch == 2  # and it is taken when the run goes on


@pytest.mark.parametrize("zero", [2, pytest.param(3, marks=pytest.mark.long)])
def test_workers_start_again_where_a_step_cannot_be_repeated(tiny_bert: Path, tmp_path: Path, zero: int) -> None:
    """The other worker waits in a collective: the group ends, and goes on from the checkpoint as the driver has it."""
    data = write_splits(tmp_path / "data", train=100, row_group=37)
    whole = prepared_job(tiny_bert, data, tmp_path / "whole", parallel={"zero": zero}, **_JOB)
    reference = run_group(2, _undisturbed, whole)
    small = prepared_job(tiny_bert, data, tmp_path / "small", parallel={"zero": zero, "micro_batch": 4}, **_JOB)
    with pytest.raises(RuntimeError):  # of either worker: of the other one, that its peer is gone
        run_group(2, _late, small)
    (told,) = read_reductions(small.run)
    assert told.sentence().startswith("out of memory in step 6: micro-batches of 2 instead of 4")
    again = with_job(small)
    assert again.plan.micro_batch == again.job.parallel.micro_batch == 2
    lines = run_group(2, _healed, again)
    assert [step for step, _ in lines] == [4, 5, 6, 7, 8] and _same(lines, reference)


def _late(prepared: Any) -> Any:
    return train_here(prepared, on_engine=_small_at_step_6)["lines"]


def _small_at_step_6(engine: Any) -> None:
    _small_rank_1(engine, (5,))


def test_what_counts_as_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50)
    assert (
        is_out_of_memory(caught.value)
        and is_out_of_memory(MemoryError())
        and is_out_of_memory(torch.OutOfMemoryError())
    )
    assert not is_out_of_memory(RuntimeError("shapes do not match"))

    def failing(error: Exception) -> Any:
        raise error
        yield  # a generator: it raises where the loop asks for the first part

    engine: Any = SimpleNamespace(virtual_ranks=1, device="cpu")
    task: Any = SimpleNamespace(couples=False)
    batch = GlobalBatch(1, 1.0, 1)
    with pytest.raises(RuntimeError, match="shapes"):
        forward_backward(engine, task, failing(RuntimeError("shapes do not match")), batch, 0)
    assert forward_backward(engine, task, failing(MemoryError()), batch, 0) is None
