"""Whatever call of the storage fails during a run: no checkpoint is lost, and the curve is that of an undisturbed run.

The real driver and the real worker run in one process without Ray. Faults replace calls of a run directory.
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
from tests.support.worker_group import run_group, share_cells, with_job

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
def _storage_faults(fails: Callable[[int], int]) -> Iterator[list[int]]:
    """Make each call of a run directory fail with the errno `fails(number)`, 0 for none; yield the count of calls."""
    count = [0]

    def wrap(name: str) -> Callable[..., Any]:
        real = getattr(RunDir, name)

        def call(self: RunDir, *args: Any, **options: Any) -> Any:
            count[0] += 1
            number = fails(count[0])
            if number:
                raise storage_error(self.path(str(args[0]) if args else ""), OSError(number, os.strerror(number)))
            return real(self, *args, **options)

        return call

    with ExitStack() as stack:
        for name in _CALLS:
            stack.enter_context(mock.patch.object(RunDir, name, wrap(name)))
        yield count


def _run_driver(prepared: PreparedJob, output: StringIO) -> list[int]:
    """Train to completion as a command does; return the steps from which workers were started."""
    from launcher.driver import controller
    from launcher.train import worker
    from launcher.train.checkpoint import writer

    control = SimpleNamespace(
        begin=lambda: None, client=None, request_restart=lambda: None, request_stop=lambda: False, hang=None,
        is_stop_requested=False,
    )  # fmt: skip
    starts: list[int] = []

    def run_worker_group(_: object, work: object, config: dict[str, Any], request_stop: object) -> None:
        starts.append(config["worker"].resume_step)
        worker.train_worker(config["worker"])

    def cells(name: str, splits: object, plan: object, job: object, start: int) -> Any:
        assert name == "train"
        return share_cells(prepared, 1, 0, start)

    with (
        mock.patch.object(controller, "run_worker_group", run_worker_group),
        mock.patch.object(controller, "interruptible_sleep", lambda *_: None),
        mock.patch.object(writer, "_FIRST_DELAY_S", 0.0),
        mock.patch.object(worker, "iter_shards", cells),
        mock.patch.object(worker, "prepare_process", lambda _: None),
        mock.patch.object(worker, "is_node_draining", lambda: False),
    ):
        lease = Lease.acquire(prepared.run)
        console = Console(file=output)
        controller.TrainController(prepared, prepared.job, console, control, lease).run()  # type: ignore[arg-type]
    return starts


def _run(prepared: PreparedJob, seed: int | None, number: int, reason: int) -> dict[str, Any]:
    """Train with call `number` failing, or 5 % of all calls drawn from `seed`; if that fails, again without a fault."""
    dice = random.Random(seed)

    def fails(count: int) -> int:
        is_faulty = count == number if seed is None else dice.random() < 0.05
        return reason if is_faulty else 0

    from launcher.train.checkpoint import catalog

    error = ""
    starts: list[int] = []
    output = StringIO()
    with _storage_faults(fails) as count:
        try:
            starts = _run_driver(prepared, output)
        except UserError as refusal:
            error = refusal.message
        except LauncherError as failure:
            error = f"{type(failure).__name__}: {failure.message}"
    complete = catalog.complete_steps(prepared.run)
    intact = [step for step in complete if catalog.find_corruption(prepared.run, step) is None]
    second_starts = _run_driver(prepared, output) if error else []
    curve = [(line.step, line.loss) for line in prepared.run.read_metrics() if isinstance(line, StepRecord)]
    model = Path(prepared.run.uri) / "model/model.safetensors"
    return {
        "error": error, "starts": starts, "complete": complete, "intact": intact, "second_starts": second_starts,
        "calls": count[0], "curve": curve, "output": output.getvalue(), "model": model.read_bytes().hex(),
    }  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(job: PreparedJob) -> dict[str, Any]:
    run: dict[str, Any] = run_group(1, _run, with_job(job, name="undisturbed"), None, 0, 0)
    assert (run["error"], run["starts"], run["intact"]) == ("", [0], run["complete"])
    return run


def _check(job: PreparedJob, undisturbed: dict[str, Any], seed: int | None, number: int, reason: int) -> None:
    """Run with faults and compare with the undisturbed run."""
    run = run_group(1, _run, with_job(job, name=f"faults-{seed}-{number}-{reason}"), seed, number, reason)
    assert run["curve"] == undisturbed["curve"], "every step once, and the same bits"
    assert run["model"] == undisturbed["model"]
    assert run["complete"] == run["intact"], "a checkpoint with a manifest and without its files"
    later = [*run["starts"][1:], *run["second_starts"]]
    goes_back = later != sorted(later) or (run["intact"] and 0 in run["second_starts"])
    # The one reason to go back: the best weights are to be exported, and their checkpoint could not be saved.
    assert not goes_back or "could not be saved and is made again" in run["output"], run["output"]


# Spread over the run: its beginning, a checkpoint, an evaluation, the export.
@pytest.mark.parametrize("position", [0.02, 0.15, 0.3, 0.45, 0.6, 0.75, 0.9, 0.98])
def test_one_failing_call_changes_nothing(job: PreparedJob, undisturbed: dict[str, Any], position: float) -> None:
    number = int(position * undisturbed["calls"]) + 1
    _check(job, undisturbed, None, number, list(_REASONS.values())[number % len(_REASONS)])


@pytest.mark.long
@pytest.mark.parametrize("reason", _REASONS)
def test_any_failing_call_changes_nothing(job: PreparedJob, undisturbed: dict[str, Any], reason: str) -> None:
    for number in range(1, undisturbed["calls"] + 1):
        _check(job, undisturbed, None, number, _REASONS[reason])


@pytest.mark.parametrize(
    "seed", [*range(1, 5), *(pytest.param(seed, marks=pytest.mark.long) for seed in range(100, 130))]
)
def test_five_percent_failing_calls_change_nothing(job: PreparedJob, undisturbed: dict[str, Any], seed: int) -> None:
    _check(job, undisturbed, seed, 0, errno.EIO)
