"""Makes the faults of `--chaos` happen, in train workers and in the driver; `spec/fault_injection.py` lists them."""

import errno
import math
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from launcher.rundir.directory import RunDir
from launcher.spec.fault_injection import Fault
from launcher.train.checkpoint import catalog

_WRITTEN_S = 30.0


class FaultInjector:
    """The faults of one worker, or of the driver. Each happens once in a run: what has happened stands in `chaos/`.

    Args:
        run: the run.
        faults: all of them; () for peace.
        rank: of this worker; None in the driver.
    """

    def __init__(self, run: RunDir, faults: Sequence[Fault] = (), rank: int | None = None) -> None:
        self._run, self._rank = run, rank
        self._faults = [(number, fault) for number, fault in enumerate(faults) if not _is_over(run, number, fault)]
        self._writes = 0
        self._step = 0
        self._node_goes = False

    def at_step(self, done: int) -> None:
        """So many steps are done."""
        self._step = done
        for number, fault in [*self._faults]:
            if fault.step is None or fault.step > done:
                continue
            if fault.whom == self._me and fault.kind in ("kill", "freeze", "term"):
                self._happens(number, fault)
            elif fault.kind == "term" and fault.whom == "node" and self._rank is not None:
                self._note(number, fault)
                self._node_goes = True
            elif fault.kind == "corrupt" and self._rank == 0 and self._run.list("checkpoints"):
                self._note(number, fault)
                _harm(self._run)

    def at(self, place: str) -> None:
        """Here is one of the places."""
        for number, fault in [*self._faults]:
            if fault.place == place and fault.whom == self._me:
                self._happens(number, fault)

    def is_node_draining(self) -> bool:
        """Whether the workers' node was told to go; the same on all of them after the same step."""
        goes, self._node_goes = self._node_goes, False
        return goes

    def inject_nan(self, step: int, loss: torch.Tensor) -> torch.Tensor:
        """Return the loss of the step after `step` completed steps; NaN where a fault asks for it."""
        bad = any(fault.kind == "nan" and fault.step == step + 1 for _, fault in self._faults)
        return loss * math.nan if bad else loss

    def before_write(self, step: int) -> None:
        """A file of the checkpoint of this step is about to be written.

        Raises:
            OSError: the disk is full, or the storage fails.
        """
        self._writes += 1
        for number, fault in [*self._faults]:
            if fault.step is None or fault.step > step:
                continue
            if fault.kind == "disk_full":
                self._note(number, fault)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if fault.kind == "flaky" and self._writes % 3 == 0:
                raise OSError(errno.EIO, os.strerror(errno.EIO))

    @property
    def _me(self) -> int | str:
        return "driver" if self._rank is None else self._rank

    def _happens(self, number: int, fault: Fault) -> None:
        self._note(number, fault)
        signals = {"kill": signal.SIGKILL, "freeze": signal.SIGSTOP, "term": signal.SIGTERM}
        os.kill(os.getpid(), signals[fault.kind])

    def _note(self, number: int, fault: Fault) -> None:
        self._faults.remove((number, fault))
        self._run.write_bytes(_place(number, fault), f"after step {self._step}\n".encode())


def _place(number: int, fault: Fault) -> str:
    return f"chaos/{number:03d}-{fault}"


def _is_over(run: RunDir, number: int, fault: Fault) -> bool:
    return run.exists(_place(number, fault))


def _harm(run: RunDir) -> None:
    """Turn a bit of the newest checkpoint over, once it is whole; only where it is a local file."""
    if run.local is None:
        return
    until = time.monotonic() + _WRITTEN_S
    while run.list("checkpoints")[-1] != Path(catalog.checkpoint_dir(catalog.latest_step(run))).name:
        if time.monotonic() > until:
            break
        time.sleep(0.05)
    folder = run.local / catalog.checkpoint_dir(catalog.latest_step(run))
    shard = max(folder.glob("*/state/*"), key=lambda path: Path(path).stat().st_size)
    with shard.open("r+b") as file:
        file.seek(shard.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
