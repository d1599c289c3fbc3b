"""Stop signal: all ranks save a checkpoint and exit after the same step. Runs in train workers.

The user may request a stop, or a node may be drained. Rank 0 knows first. After each step it broadcasts its decision
asynchronously, and all ranks read the decision of the step before: no rank waits, and a step costs nothing more.
"""

import time
from collections.abc import Callable
from typing import Protocol

import ray.train
import torch
import torch.distributed as dist

from launcher.train.worker_heartbeat import Heartbeat

_POLL_CONTROL_S = 0.5
# Ray Train checks for drained nodes every 5 s, and asking it is a round trip of all workers.
_POLL_PREEMPTION_S = 2.0
_CONTINUE, _ASK_RAY, _STOP = 0, 1, 2


class ControlClient(Protocol):
    """Connection from the workers to the driver."""

    def set_training(self, training: bool) -> None:
        """Report whether steps are being made; a stop request is handled only then."""

    def send_heartbeat(self, beat: Heartbeat) -> bool:
        """Send the heartbeat of any rank; return True if that worker must dump its stacks and exit."""

    def is_stop_requested(self) -> bool:
        """Return True if the run should stop. Never blocks, so the answer may be slightly old."""


class StopSignal:
    """Decision to stop that all ranks share at the same step.

    Args:
        control: Connection to the driver, which only rank 0 uses; None if a stop cannot be requested.
        is_draining: Function that returns True if a node is being drained; all ranks call it together.
    """

    def __init__(self, control: ControlClient | None, is_draining: Callable[[], bool]) -> None:
        self._control = control if dist.get_rank() == 0 else None
        self._is_draining = is_draining
        # A gloo group with host tensors: over NCCL the broadcast would queue behind the step's kernels, and reading it
        # would sync with the device.
        self._group = dist.new_group(backend="gloo")
        self._decision = torch.zeros(1, dtype=torch.uint8)
        self._broadcast: dist.Work | None = None
        self._control_polled_at = self._preemption_polled_at = time.monotonic()
        self._is_training = False

    def should_stop(self) -> bool:
        """Return True if all ranks must save a checkpoint and exit after this step. Collective; never syncs the device.

        Rank 0's decision is broadcast asynchronously and read one step later, so that every rank stops at the same
        step.
        """
        if self._control is not None and not self._is_training:
            self._control.set_training(True)
            self._is_training = True
        # Collective, but it has had a whole step to finish: in practice nobody waits here.
        self._wait_for_broadcast()
        # Read before the buffer is used for the next broadcast.
        decision = int(self._decision)
        # On all ranks but rank 0 the broadcast overwrites this value: only rank 0's clock decides when to ask Ray.
        self._decision[0] = self._decide()
        self._broadcast = dist.broadcast(self._decision, src=0, group=self._group, async_op=True)
        # All ranks have read the same decision, so all of them ask Ray or none. Ray's workers must call
        # `get_preemption_info` equally often: it is a barrier (ray 2.60, train/v2/api/train_fn_utils.py).
        return decision == _STOP or (decision == _ASK_RAY and self._is_draining())

    def close(self) -> None:
        """Finish the last broadcast and report the end of the training. Collective."""
        # Every broadcast has a partner on all ranks: all have made the same number of steps.
        self._wait_for_broadcast()
        if self._control is not None:
            self._control.set_training(False)

    def _wait_for_broadcast(self) -> None:
        if self._broadcast is not None:
            self._broadcast.wait()
            self._broadcast = None

    def _decide(self) -> int:
        """Return this rank's decision; only rank 0's counts."""
        now = time.monotonic()
        if self._control is not None and now - self._control_polled_at >= _POLL_CONTROL_S:
            self._control_polled_at = now
            if self._control.is_stop_requested():
                return _STOP
        if now - self._preemption_polled_at >= _POLL_PREEMPTION_S:
            self._preemption_polled_at = now
            return _ASK_RAY
        return _CONTINUE


def never_stop() -> bool:
    """Return False: the scheduler of a sweep stops its trials, not their workers."""
    return False


def is_node_draining() -> bool:
    """Return True if Ray will take away a node with a worker of this run. Collective."""
    return ray.train.get_preemption_info() is not None
