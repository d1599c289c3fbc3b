"""Heartbeat of a worker, and its stack dump if the whole group hangs. Runs in train workers.

A thread sends the heartbeats, so that they continue while the main thread hangs in a collective. `driver/watchdog.py`
receives them.
"""

import faulthandler
import os
import socket
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from launcher.errors import LauncherError
from launcher.rundir.directory import RunDir

# The watchdog takes a worker for frozen after 60 s of silence: a few lost heartbeats are no failure.
_INTERVAL_S = 5.0
_EXIT_CODE = 70
"""Exit code of a worker that ended itself because the group hung (EX_SOFTWARE of sysexits.h)."""


@dataclass(frozen=True)
class Heartbeat:
    """Progress of one worker.

    Args:
        rank: Rank of the worker.
        host: Host name of its node.
        step: Number of steps completed.
        forward_passes: Number of forward passes so far, which also grows during a long evaluation.
        stage: Phase of the worker: `data`, `communication`, `evaluation`, `checkpoint` or `compute`.
    """

    rank: int
    host: str
    step: int
    forward_passes: int
    stage: str


class WorkerHeartbeat:
    """Thread that sends heartbeats until it is closed.

    Args:
        run: Run directory for stack dumps.
        rank: Rank of this worker.
        read_progress: Function that returns steps completed, forward passes and stage.
        send: Function that sends a heartbeat and returns True if this worker must dump its stacks and exit; None sends
            no heartbeats.
    """

    def __init__(
        self,
        run: RunDir,
        rank: int,
        read_progress: Callable[[], tuple[int, int, str]],
        send: Callable[[Heartbeat], bool] | None,
    ) -> None:
        self._run = run
        self._rank = rank
        self._read_progress = read_progress
        self._stop = threading.Event()
        if send is not None:
            # A daemon: a training that raises does not close this, and its process must still end.
            threading.Thread(target=self._send_until_closed, args=(send,), name="heartbeat", daemon=True).start()

    def close(self) -> None:
        """Stop the heartbeats, at the end of the training."""
        self._stop.set()

    def _send_until_closed(self, send: Callable[[Heartbeat], bool]) -> None:
        host = socket.gethostname()
        # The first one is sent at once: the watchdog knows only workers that it has received one from.
        while True:
            step, forward_passes, stage = self._read_progress()
            must_exit = send(Heartbeat(self._rank, host, step, forward_passes, stage))
            # The training may have ended while the answer was on its way.
            if must_exit and not self._stop.is_set():
                self._dump_stacks(step)
                # `sys.exit` would end this thread alone; the main thread hangs and cannot be asked to exit.
                os._exit(_EXIT_CODE)
            if self._stop.wait(_INTERVAL_S):
                return

    def _dump_stacks(self, step: int) -> None:
        """Write the stacks of all threads of this process to the run directory."""
        # faulthandler needs a file descriptor, which only a local file has. The storage comes second, as it may fail.
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "stacks.txt"
            with path.open("w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
            try:
                self._run.write_bytes(f"hangs/step-{step:08d}/rank-{self._rank:05d}.txt", path.read_bytes())
            except LauncherError:
                return  # the storage may be the reason for the hang
