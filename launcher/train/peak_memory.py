"""Peak memory of a worker, recorded next to the estimate of the plan. Runs in train workers."""

import gc
import resource
from pathlib import Path

import torch

from launcher.rundir.directory import RunDir
from launcher.rundir.records import MemoryUsage

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


def peak_resident_bytes() -> int:
    """Return the peak resident memory of this process.

    `ru_maxrss` is inherited over `exec`, so it is at least the peak of the parent process; VmHWM is not.
    """
    if _STATUS.is_file():
        return _read_status("VmHWM")
    # In bytes on macOS, the only system without /proc here.
    peak: int = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak


class PeakMemoryTracker:
    """Peak memory since creation: of the GPU's allocator, or on a CPU the growth of this process."""

    def __init__(self) -> None:
        # Garbage of the imports would count in the start value, and hide as much growth once its memory is reused.
        gc.collect()
        self._resident_before = 0
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        elif _STATUS.is_file():
            _reset_peak()
            self._resident_before = _read_status("VmRSS")

    def used_bytes(self) -> int | None:
        """Return the peak in bytes; None if the system does not report it."""
        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated()
        return max(0, _read_status("VmHWM") - self._resident_before) if _STATUS.is_file() else None

    def write(self, run: RunDir, rank: int, predicted: int | None) -> None:
        """Write the peak and the plan's estimate, in bytes, to the run's records."""
        record = MemoryUsage(rank=rank, predicted_bytes=predicted, used_bytes=self.used_bytes())
        run.write_record(f"workers/memory-{rank}.json", record)


def _reset_peak() -> None:
    try:
        # Resets VmHWM (proc(5)). Otherwise the peak of the imports would count.
        _CLEAR_REFS.write_text("5")
    # A hardened container: the peak counts from the start of the process.
    except PermissionError:
        return


def _read_status(name: str) -> int:
    """Return a field of /proc/self/status in bytes."""
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024
