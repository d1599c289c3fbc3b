"""A command with every process below it: their memory, and their end. Runs on the client."""

import subprocess
import threading
from pathlib import Path

import psutil

_SAMPLE_S = 0.5


def tree(pid: int) -> list[psutil.Process]:
    """Return a process and all below it."""
    try:
        top = psutil.Process(pid)
        return [top, *top.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def kill_tree(process: "subprocess.Popen[str]") -> None:
    """Send SIGKILL to the command, the Ray it started and its workers, all at once."""
    doomed = tree(process.pid)
    for victim in doomed:
        victim.suspend()  # nobody sees another die and has time to act on it
    for victim in doomed:
        victim.kill()
    psutil.wait_procs(doomed[1:], timeout=30)


def proportional_memory(pid: int) -> int:
    """Return the bytes of a process tree, pages that its processes share counted once (PSS, proc(5))."""
    total = 0
    for process in tree(pid):
        try:
            lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue  # it has ended
        total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    return total


class PeakMemory:
    """Sampler of a process tree in a thread, twice a second, for as long as its first process lives.

    Pages that processes share count once for each of them, so a figure is to be compared with another of the same
    command only.
    """

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.bytes = 0
        self._process, self._end = process, threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def close(self) -> int:
        """Return the peak in bytes; the process has ended."""
        self._end.set()
        self._thread.join()
        return self.bytes

    def _sample(self) -> None:
        while not self._end.wait(_SAMPLE_S):
            self.bytes = max(self.bytes, sum(map(_resident, tree(self._process.pid))))


def _resident(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.Error:
        return 0
