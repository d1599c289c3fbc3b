"""What training really used of a worker's memory, beside what the plan said. Train workers."""

import gc
import resource
from pathlib import Path

import torch

from launcher.rundir.directory import RunDir
from launcher.rundir.records import MemoryUsage

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_resident_bytes() -> int:
    """Return the largest resident memory of this process.

    `ru_maxrss` is no less than the peak of whoever started the process, as `exec` keeps it.
    """
    if _STATUS.is_file():
        return _resident("VmHWM")
    peak: int = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on macOS, which alone lacks the file
    return peak


class PeakMemoryTracker:
    """The largest use of memory from here on: of the GPU's allocator, or the growth of this process on a CPU."""

    def __init__(self) -> None:
        gc.collect()
        self._before = 0
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        elif _STATUS.is_file():
            _reset_peak()
            self._before = _resident("VmRSS")

    def used(self) -> int | None:
        """Bytes; None where the system does not tell."""
        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated()
        return max(0, _resident("VmHWM") - self._before) if _STATUS.is_file() else None

    def write(self, run: RunDir, rank: int, predicted: int | None) -> None:
        """Into the run's records."""
        record = MemoryUsage(rank=rank, predicted_bytes=predicted, used_bytes=self.used())
        run.write_record(f"workers/memory-{rank}.json", record)


def _reset_peak() -> None:
    try:
        _RESET.write_text("5")  # proc(5): the peak of the resident set begins anew
    except PermissionError:
        return  # a hardened container: the peak then counts from the process's start


def _resident(name: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024
