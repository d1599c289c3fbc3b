"""What a worker is doing, told every few seconds; where the whole group stands still, a stack dump. Train workers.

A thread of its own tells, so that it goes on telling while the worker waits for ever. `driver/watchdog.py` listens.
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

_EVERY_S = 5.0
_EXIT = 70
"""Exit code of a worker that ended itself because the group stood still (EX_SOFTWARE of sysexits.h)."""


@dataclass(frozen=True)
class Heartbeat:
    """What one worker is doing.

    Args:
        rank: of the worker.
        host: it runs on.
        step: steps it has done.
        calls: forward passes so far: what moves in a long evaluation, too.
        stage: `data`, `communication`, `evaluation`, `checkpoint`, or `compute`.
    """

    rank: int
    host: str
    step: int
    forward_passes: int
    stage: str


class WorkerHeartbeat:
    """Tells until it is closed.

    Args:
        run: where stacks are dumped.
        rank: of this worker.
        look: what it is doing now: step, forward passes, stage.
        tell: passes a beat on; answers whether to dump and end.
    """

    def __init__(
        self, run: RunDir, rank: int, look: Callable[[], tuple[int, int, str]], tell: Callable[[Heartbeat], bool] | None
    ) -> None:
        self._run, self._rank, self._look, self._tell = run, rank, look, tell
        self._stop = threading.Event()
        if tell is not None:
            threading.Thread(target=self._beat, name="pulse", daemon=True).start()

    def close(self) -> None:
        """The training is over, or left."""
        self._stop.set()

    def _beat(self) -> None:
        host = socket.gethostname()
        while True:  # at once: who freezes in the first seconds must have been heard of
            step, calls, stage = self._look()
            assert self._tell is not None
            if self._tell(Heartbeat(self._rank, host, step, calls, stage)) and not self._stop.is_set():
                self._dump(step)
                os._exit(_EXIT)  # the thread that hangs cannot be asked to
            if self._stop.wait(_EVERY_S):
                return

    def _dump(self, step: int) -> None:
        """Stacks of all threads of this process."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "stacks.txt"
            with path.open("w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
            try:
                self._run.write_bytes(f"hangs/step-{step:08d}/rank-{self._rank:05d}.txt", path.read_bytes())
            except LauncherError:
                return  # the storage may be what hangs
