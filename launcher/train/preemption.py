"""Word that a run should save and stop: somebody asked for it, or a node goes away. Train workers.

Rank 0 hears it; all workers must act on it after the same step. So each step sends rank 0's word around on the side
and reads the word of the step before: nobody waits for it, and it costs the step nothing.
"""

import time
from collections.abc import Callable
from typing import Protocol

import ray.train
import torch
import torch.distributed as dist

from launcher.train.worker_heartbeat import Heartbeat

_LISTEN_EVERY_S = 0.5
# Ray Train looks for nodes that go away every 5 s, and asking it is a round trip of all workers.
_LOOK_EVERY_S = 2.0


class ControlClient(Protocol):
    """The line from rank 0 to whoever started the run."""

    def set_training(self, training: bool) -> None:
        """Tell whether a stop would be heard: only while steps are made."""

    def send_heartbeat(self, beat: Heartbeat) -> bool:
        """Tell what a worker is doing, of any rank; whether it should dump its stacks and end."""

    def is_stop_requested(self) -> bool:
        """Whether the run should stop; never waits, so the answer may be a moment old."""


_NOTHING, _LOOK, _STOP = 0, 1, 2


class StopSignal:
    """What all workers know at the same step.

    Args:
        caller: whom rank 0 asks whether to stop; None is never asked.
        preempted: whether a node goes away; called by all workers together.
    """

    def __init__(self, caller: ControlClient | None, preempted: Callable[[], bool]) -> None:
        self._control = caller if dist.get_rank() == 0 else None
        self._preempted = preempted
        # Host tensors of a group of its own: on NCCL the word would wait for the device, and the step for it.
        self._group = dist.new_group(backend="gloo")
        self._word = torch.zeros(1, dtype=torch.uint8)
        self._sending: dist.Work | None = None
        self._listened = self._looked = time.monotonic()
        self._is_training = False

    def should_stop(self) -> bool:
        """Whether to save and leave after this step, the same for all workers (a collective)."""
        if self._control is not None and not self._is_training:
            self._control.set_training(True)
            self._is_training = True
        self._receive()
        word = int(self._word)
        self._word[0] = self._own_word()
        self._sending = dist.broadcast(self._word, src=0, group=self._group, async_op=True)
        return word == _STOP or (word == _LOOK and self._preempted())

    def close(self) -> None:
        """The training is over, or left (a collective)."""
        self._receive()
        if self._control is not None:
            self._control.set_training(False)

    def _receive(self) -> None:
        if self._sending is not None:
            self._sending.wait()
            self._sending = None

    def _own_word(self) -> int:
        now = time.monotonic()
        if self._control is not None and now - self._listened >= _LISTEN_EVERY_S:
            self._listened = now
            if self._control.is_stop_requested():
                return _STOP
        if now - self._looked >= _LOOK_EVERY_S:
            self._looked = now
            return _LOOK
        return _NOTHING


def never_stop() -> bool:
    """Nobody tells these workers to leave: a trial of a sweep, whose scheduler does."""
    return False


def is_node_draining() -> bool:
    """Whether Ray says that a node with one of this run's workers will be taken away (a collective)."""
    return ray.train.get_preemption_info() is not None
