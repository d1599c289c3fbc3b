"""What a node can tell of its machine or container: disks, CPUs, memory, GPUs, Ray's own process. Runs on every node.

Travels by value like `probes.py`: nothing of the launcher, nothing beyond the standard library at its top. What a node
cannot tell is None.
"""

import os
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any  # plain JSON-like values

_GPU_FIELDS = "index,name,memory.total,memory.used,ecc.errors.uncorrected.volatile.total"
_NVIDIA_S = 15.0  # a GPU that fell off the bus makes it hang
_SLOW_FIELDS = ("hw_slowdown", "hw_thermal_slowdown", "sw_thermal_slowdown", "hw_power_brake_slowdown")


def disk(path: str) -> dict[str, Any] | None:
    """As `Disk`: of the directory, or of the nearest one above it that exists."""
    if not path:
        return None
    place = os.path.abspath(path)
    while not os.path.exists(place) and place != "/":
        place = os.path.dirname(place)
    try:
        stat = os.statvfs(place)
    except OSError:
        return None
    return {
        "path": path,
        "total_bytes": stat.f_blocks * stat.f_frsize,
        "free_bytes": stat.f_bavail * stat.f_frsize,
    }


def usable_cpus(groups: Iterable[Path] | None = None) -> float:
    """CPUs this process may use: affinity, and the container's quota where there is one."""
    seen = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    for folder in cgroup_folders() if groups is None else groups:
        period = _text(folder / "cpu.cfs_period_us")
        words = _text(folder / "cpu.max").split() or [_text(folder / "cpu.cfs_quota_us"), period]
        if words[0].isdigit() and words[1].isdigit():  # `max` and -1 are no limit
            seen = min(seen, int(words[0]) / int(words[1]))
    return seen


def host_memory(groups: Iterable[Path] | None = None) -> tuple[int | None, int | None]:
    """Bytes in all and bytes free, of the host or of the container where that has less."""
    table = _table(Path("/proc/meminfo"), 1024)
    total, free = table.get("MemTotal"), table.get("MemAvailable")
    for folder in cgroup_folders() if groups is None else groups:
        limit = _text(folder / "memory.max") or _text(folder / "memory.limit_in_bytes")
        used = _text(folder / "memory.current") or _text(folder / "memory.usage_in_bytes")
        if limit.isdigit() and used.isdigit() and total is not None and int(limit) < total:
            stat = _table(folder / "memory.stat", 1)
            # What files left in memory is given up when somebody needs it.
            cached = stat.get("inactive_file", 0) + stat.get("active_file", 0)
            total, free = int(limit), max(0, int(limit) - max(0, int(used) - cached))
    return total, free


def cgroup_folders(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> Iterator[Path]:
    """Folders with limits for this process: its group and all above it (version 2), or the container's (version 1)."""
    groups = [line[3:] for line in _text(own).splitlines() if line.startswith("0::")]
    for group in groups:
        folder = root / group.strip("/")
        yield from (place for place in (folder, *folder.parents) if place == root or root in place.parents)
    yield from (root / controller for controller in ("cpu", "memory"))


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _table(path: Path, unit: int) -> dict[str, int]:
    """Lines of a name and a number."""
    lines = [line.replace(":", " ").split() for line in _text(path).splitlines()]
    return {words[0]: int(words[1]) * unit for words in lines if len(words) > 1 and words[1].isdigit()}


def open_files() -> int | None:
    """Soft limit of open files."""
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def raylet_options() -> dict[str, str]:
    """The options Ray's own process on this node was started with; a worker is its child."""
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return {}
    return dict(word[2:].split("=", 1) for word in words if word.startswith("--") and "=" in word and " " not in word)


def raylet_environment() -> Iterator[tuple[str, str]]:
    """The environment Ray itself was started in, which a worker's may differ from."""
    try:
        words = Path(f"/proc/{os.getppid()}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return
    for word in words:
        name, _, value = word.partition("=")
        yield name, value


def store_used() -> int | None:
    """Bytes in use in this node's object store, asked of its raylet."""
    try:
        import ray
        from ray._private.internal_api import node_stats  # `ray memory` asks the same way; there is no public one

        if not ray.is_initialized():  # the calls below would start one
            return None
        mine = ray.get_runtime_context().get_node_id()
        node = next(node for node in ray.nodes() if node["NodeID"] == mine)
        stats = node_stats(node["NodeManagerAddress"], node["NodeManagerPort"], False)
        return int(stats.store_stats.object_store_bytes_used)
    except Exception:  # noqa: BLE001  # process border: another version of Ray, which `versions` tells
        return None


def token_needed() -> bool | None:
    """Whether Ray on this node asks for a token."""
    try:
        from ray._raylet import AuthenticationMode, get_authentication_mode  # type: ignore[attr-defined]  # Cython
    except ImportError:
        return None
    return bool(get_authentication_mode() == AuthenticationMode.TOKEN)


def nvidia_gpus() -> tuple[list[dict[str, Any]], str]:
    """The GPUs as `nvidia-smi` tells them, and why it could not; neither where there is no such command."""
    slow = ",".join(f"clocks_throttle_reasons.{name}" for name in _SLOW_FIELDS)
    command = ["nvidia-smi", f"--query-gpu={_GPU_FIELDS},{slow}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_NVIDIA_S)
    except FileNotFoundError:
        return [], ""
    except subprocess.TimeoutExpired:
        return [], f"nvidia-smi gave no answer within {_NVIDIA_S:.0f} s"
    except OSError as error:
        return [], f"nvidia-smi: {error}"
    if done.returncode:
        return [], " ".join((done.stdout + done.stderr).split())[:300]
    return [gpu_of(line) for line in done.stdout.splitlines() if line.strip()], ""


def gpu_of(line: str) -> dict[str, Any]:
    """As `Gpu`: one line of nvidia-smi's table; `[N/A]` stands for what a GPU does not tell."""
    index, name, total, used, ecc, *slowed = (word.strip() for word in line.split(","))
    return {
        "index": int(index),
        "name": name,
        "memory_bytes": int(total) * 2**20 if total.isdigit() else 0,
        "memory_used_bytes": int(used) * 2**20 if used.isdigit() else 0,
        "ecc_errors": int(ecc) if ecc.isdigit() else None,
        "slowed_by": [why for why, state in zip(_SLOW_FIELDS, slowed, strict=False) if state == "Active"],
    }
