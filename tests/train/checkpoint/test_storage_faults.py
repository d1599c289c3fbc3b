"""Whatever call of the storage fails while a run goes on: no checkpoint is lost, and the curve is the undisturbed one.

The real driver and the real worker, in one process without Ray. A fault is put before one call of a run directory.
"""

import errno
import os
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from rich.console import Console

from launcher.driver.prepare import PreparedJob
from launcher.errors import LauncherError, UserError
from launcher.rundir.directory import RunDir
from launcher.rundir.lease import Lease
from launcher.rundir.records import StepRecord
from launcher.rundir.uri import storage_error
from tests.support.jobs import prepared_job, write_splits
from tests.support.worker_group import run_group, share_cells

_STEPS = 8
_CALLS = ("exists", "list", "read_bytes", "write_bytes", "delete", "append_metrics")
_REASONS = {name: getattr(errno, name) for name in ("EIO", "ESTALE", "ETIMEDOUT", "ENOSPC", "EACCES")}


@pytest.fixture(scope="module")
def job(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> PreparedJob:
    folder = tmp_path_factory.mktemp("faults")
    data = write_splits(folder / "data", train=11 * _STEPS, validation=20, row_group=37)
    return prepared_job(
        tiny_bert, data, folder / "runs", cluster={"workers": 1}, parallel={"zero": 0},
        checkpoint={"every_steps": 2, "every_minutes": None}, evaluation={"every_steps": 4},
        fault_tolerance={"max_failures": 1000, "same_step": 1000},
    )  # fmt: skip


@contextmanager
def _faults(fails: Callable[[int, str], int]) -> Iterator[list[int]]:
    """Before each call of a run directory ask whether it fails, and how; yields their number so far."""
    count = [0]

    def wrap(name: str) -> Callable[..., Any]:
        real = getattr(RunDir, name)

        def call(self: RunDir, *args: Any, **options: Any) -> Any:
            count[0] += 1
            number = fails(count[0], name)
            if number:
                raise storage_error(self.path(str(args[0]) if args else ""), OSError(number, os.strerror(number)))
            return real(self, *args, **options)

        return call

    with ExitStack() as stack:
        for name in _CALLS:
            stack.enter_context(mock.patch.object(RunDir, name, wrap(name)))
        yield count


def _drive(prepared: PreparedJob, said: StringIO) -> list[int]:
    """Train to the end as a command does; the steps from which workers were started."""
    from launcher.driver import controller
    from launcher.train import worker
    from launcher.train.checkpoint import writer

    line = SimpleNamespace(
        begin=lambda: None,
        client=None,
        request_restart=lambda: None,
        request_stop=lambda: False,
        hang=None,
        is_stop_requested=False,
    )
    starts: list[int] = []

    def fit(_: object, work: object, config: dict[str, Any], ask_stop: object) -> None:
        starts.append(config["order"].resume_step)
        worker.run_worker({"order": config["order"]})

    def cells(name: str, splits: object, plan: object, job: object, start: int) -> Any:
        assert name == "train"
        return share_cells(prepared, 1, 0, start)

    with (
        mock.patch.object(controller, "run_worker_group", fit),
        mock.patch.object(controller, "interruptible_sleep", lambda *_: None),
        mock.patch.object(writer, "_FIRST_DELAY_S", 0.0),
        mock.patch.object(worker, "iter_shards", cells),
        mock.patch.object(worker, "prepare_process", lambda _: None),
        mock.patch.object(worker, "is_node_draining", lambda: False),
    ):
        lease = Lease.acquire(prepared.run)
        controller.TrainController(prepared, prepared.job, Console(file=said), line, lease).run()  # type: ignore[arg-type]
    return starts


def _try(prepared: PreparedJob, seed: int | None, number: int, reason: int) -> dict[str, Any]:
    """Train with call `number` failing, or 5 % of them; then, where that has stopped it, without a fault."""
    dice = random.Random(seed)

    def fails(count: int, _: str) -> int:
        if seed is None:
            return reason if count == number else 0
        return reason if dice.random() < 0.05 else 0

    from launcher.train.checkpoint import catalog

    told, starts, said = "", [], StringIO()
    with _faults(fails) as count:
        try:
            starts = _drive(prepared, said)
        except UserError as error:
            told = error.message
        except LauncherError as error:
            told = f"{type(error).__name__}: {error.message}"
    left = catalog.complete_steps(prepared.run)
    whole = [step for step in left if catalog.find_corruption(prepared.run, step) is None]
    again = _drive(prepared, said) if told else []
    curve = [(line.step, line.loss) for line in prepared.run.read_metrics() if isinstance(line, StepRecord)]
    model = Path(prepared.run.uri) / "model/model.safetensors"
    return {"told": told, "starts": starts, "left": left, "whole": whole, "again": again, "calls": count[0],
            "curve": curve, "said": said.getvalue(), "model": model.read_bytes().hex()}  # fmt: skip


def _named(prepared: PreparedJob, name: str) -> PreparedJob:
    from dataclasses import replace

    from launcher.rundir.uri import join, parent

    job = prepared.job.model_copy(update={"name": name})
    return replace(prepared, job=job, run=RunDir(join(parent(prepared.run.uri), name)))


@pytest.fixture(scope="module")
def undisturbed(job: PreparedJob) -> dict[str, Any]:
    found = run_group(1, _try, _named(job, "undisturbed"), None, 0, 0)
    assert (found["told"], found["starts"], found["whole"]) == ("", [0], found["left"])
    return found


def _holds(found: dict[str, Any], undisturbed: dict[str, Any]) -> None:
    assert found["curve"] == undisturbed["curve"], "every step once, and the same bits"
    assert found["model"] == undisturbed["model"]
    assert found["left"] == found["whole"], "a checkpoint with a manifest and without its files"
    later = [*found["starts"][1:], *found["again"]]
    back = later != sorted(later) or (found["whole"] and 0 in found["again"])
    # The one way back: the best weights are to be exported, and their checkpoint could not be saved.
    assert not back or "could not be saved and is made again" in found["said"], found["said"]


# Spread over the run: its beginning, a checkpoint, an evaluation, the export.
@pytest.mark.parametrize("share", [0.02, 0.15, 0.3, 0.45, 0.6, 0.75, 0.9, 0.98])
def test_one_call_fails(job: PreparedJob, undisturbed: dict[str, Any], share: float) -> None:
    number = int(share * undisturbed["calls"]) + 1
    reason = list(_REASONS)[number % len(_REASONS)]
    _holds(run_group(1, _try, _named(job, f"one-{number}"), None, number, _REASONS[reason]), undisturbed)


@pytest.mark.long
@pytest.mark.parametrize("reason", _REASONS)
def test_each_call_fails(job: PreparedJob, undisturbed: dict[str, Any], reason: str) -> None:
    for number in range(1, undisturbed["calls"] + 1):
        found = run_group(1, _try, _named(job, f"{reason}-{number}"), None, number, _REASONS[reason])
        _holds(found, undisturbed)


@pytest.mark.parametrize("seed", range(1, 5))
def test_five_calls_of_a_hundred_fail(job: PreparedJob, undisturbed: dict[str, Any], seed: int) -> None:
    _holds(run_group(1, _try, _named(job, f"many-{seed}"), seed, 0, errno.EIO), undisturbed)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(100, 130))
def test_many_times_five_calls_of_a_hundred_fail(job: PreparedJob, undisturbed: dict[str, Any], seed: int) -> None:
    _holds(run_group(1, _try, _named(job, f"many-{seed}"), seed, 0, errno.EIO), undisturbed)
