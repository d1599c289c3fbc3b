"""Fault injection of `--chaos`: kills, hangs, storage errors and corrupt files. Runs in train workers and the driver.

`spec/fault_injection.py` parses the option and lists the faults.
"""

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

_CHECKPOINT_TIMEOUT_S = 30.0
_SIGNALS = {"kill": signal.SIGKILL, "freeze": signal.SIGSTOP, "term": signal.SIGTERM}


class FaultInjector:
    """Faults of one worker or of the driver. Each happens once in a run; `chaos/` records those that have happened.

    Args:
        run: Run directory.
        faults: All faults of the run; () for none.
        rank: Rank of this worker; None in the driver.
    """

    def __init__(self, run: RunDir, faults: Sequence[Fault] = (), rank: int | None = None) -> None:
        self._run = run
        self._rank = rank
        # Numbered before those that have happened are dropped, so that a number means the same in every attempt.
        numbered = enumerate(faults)
        self._faults = [(number, fault) for number, fault in numbered if not run.exists(_record_name(number, fault))]
        self._writes = 0
        self._step = 0
        self._is_node_draining = False

    def inject_at_step(self, done: int) -> None:
        """Inject the faults that are due after `done` steps."""
        self._step = done
        # A copy, as `_mark_done` removes from the list.
        for number, fault in [*self._faults]:
            if fault.step is None or fault.step > done:
                continue
            if fault.target == self._target and fault.kind in _SIGNALS:
                self._send_signal(number, fault)
            elif fault.kind == "term" and fault.target == "node" and self._rank is not None:
                self._mark_done(number, fault)
                self._is_node_draining = True
            elif fault.kind == "corrupt" and self._rank == 0 and self._run.list("checkpoints"):
                self._mark_done(number, fault)
                _corrupt_newest_checkpoint(self._run)

    def inject_at_place(self, place: str) -> None:
        """Inject the faults of a place, one of `spec.fault_injection.PLACES`."""
        for number, fault in [*self._faults]:
            if fault.place == place and fault.target == self._target:
                self._send_signal(number, fault)

    def is_node_draining(self) -> bool:
        """Return True once after a `term=node` fault, after the same step on all ranks."""
        is_draining = self._is_node_draining
        self._is_node_draining = False
        return is_draining

    def inject_nan(self, step: int, loss: torch.Tensor) -> torch.Tensor:
        """Return the loss of the step after `step` completed ones; NaN if a fault asks for it."""
        is_nan = any(fault.kind == "nan" and fault.step == step + 1 for _, fault in self._faults)
        # Multiplied on the device, without a host-device sync. The gradient was computed before and stays finite.
        return loss * math.nan if is_nan else loss

    def inject_at_write(self, step: int) -> None:
        """Inject the faults of writing a file of the checkpoint of `step`.

        Raises:
            OSError: The disk is full, or the storage fails temporarily.
        """
        self._writes += 1
        for number, fault in [*self._faults]:
            if fault.step is None or fault.step > step:
                continue
            if fault.kind == "disk_full":
                self._mark_done(number, fault)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            # Every third write fails: the writer's next attempt succeeds (`writer.py` makes three).
            if fault.kind == "flaky" and self._writes % 3 == 0:
                raise OSError(errno.EIO, os.strerror(errno.EIO))

    @property
    def _target(self) -> int | str:
        return "driver" if self._rank is None else self._rank

    def _send_signal(self, number: int, fault: Fault) -> None:
        # Recorded first: nothing runs after SIGKILL, and a fault without a record would happen in every attempt.
        self._mark_done(number, fault)
        os.kill(os.getpid(), _SIGNALS[fault.kind])

    def _mark_done(self, number: int, fault: Fault) -> None:
        self._faults.remove((number, fault))
        self._run.write_bytes(_record_name(number, fault), f"after step {self._step}\n".encode())


def _record_name(number: int, fault: Fault) -> str:
    return f"chaos/{number:03d}-{fault}"


def _corrupt_newest_checkpoint(run: RunDir) -> None:
    """Flip a bit of the largest file of the newest checkpoint, once it is complete. Local storages only."""
    if run.local is None:
        return
    # A thread of rank 0 writes the checkpoint: its directory is there before its manifest. A corrupt file without a
    # manifest would be replaced or removed, and the fault would have no effect.
    deadline = time.monotonic() + _CHECKPOINT_TIMEOUT_S
    while run.list("checkpoints")[-1] != Path(catalog.checkpoint_dir(catalog.latest_step(run))).name:
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    folder = run.local / catalog.checkpoint_dir(catalog.latest_step(run))
    # The size stays the same, so that only the hash of the file can find it.
    shard = max(folder.glob("*/state/*"), key=lambda path: Path(path).stat().st_size)
    with shard.open("r+b") as file:
        file.seek(shard.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
