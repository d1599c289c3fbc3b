"""Actors that examine a node: `Probe` for the machine, `RankProbe` for all-reduces. Runs on every node.

The code travels by value (`probes.by_value`), because a node may have another launcher or none. So this module imports
nothing of the launcher, and at its top only the standard library and psutil, which Ray ships. The answers are plain
values; `facts.py` has their types.
"""

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any  # plain JSON-like values, pyarrow's file systems, NVML's handles and torch's stores

import psutil

OpenUri = Callable[[str], tuple[Any, str]]
_NVML_S = 15.0  # a GPU that fell off the bus blocks NVML
_LATENCY_ROUNDS = 30
_WARM_UP_ROUNDS = 3
_FIRST_BYTES = 2**18
_ROUNDS = 3
# For a new process: here the libraries may be loaded already, and one that crashes the interpreter must not end the
# probe. sys.exit at import is an answer as well, hence BaseException.
_IMPORTS = """
import json, sys, time
seconds, errors, gpus = {}, {}, None
for name in sys.argv[1:]:
    start = time.perf_counter()
    try:
        __import__(name)
    except BaseException as error:
        errors[name] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    seconds[name] = time.perf_counter() - start
if "torch" in sys.modules:
    gpus = sys.modules["torch"].cuda.device_count()
print(json.dumps({"seconds": seconds, "errors": errors, "torch_gpus": gpus}))
"""


class Probe:
    """An examiner of one node. A Ray actor with several threads, so that a call that hangs blocks no other."""

    def ready(self) -> None:
        """Return when the process has started."""

    def facts(self) -> dict[str, Any]:
        """Return the fields of `NodeFacts`."""
        options = raylet_options()
        temp = options.get("temp_dir", "")
        memory_bytes, free_bytes = host_memory()
        gpus, gpu_error = nvidia_gpus()
        return {
            "software": software(),
            "cpus": usable_cpus(),
            "memory_bytes": memory_bytes,
            "memory_free_bytes": free_bytes,
            "open_files": open_files(),
            "temp": disk(temp) if temp else None,
            "spill": disk(options.get("fallback_directory") or options.get("session_dir") or temp),
            "shm": disk("/dev/shm") if os.path.isdir("/dev/shm") else None,
            "store_directory": options.get("plasma_directory", ""),
            "store_used_bytes": store_used(),
            "gpus": gpus,
            "gpu_error": gpu_error,
            "token_needed": token_needed(),
        }

    def clock(self) -> float:
        """Return the node's time in seconds since 1970."""
        return time.time()

    def imports(self, names: list[str], timeout_s: float) -> dict[str, Any]:
        """Return the fields of `Imports`, measured in a new process with the GPUs that Ray was started with."""
        # Ray may hide the GPUs from an actor that reserves none. The raylet's own environment has the value from
        # outside, or none.
        environment = {key: value for key, value in os.environ.items() if key != "CUDA_VISIBLE_DEVICES"}
        environment |= {key: value for key, value in raylet_environment().items() if key == "CUDA_VISIBLE_DEVICES"}
        if not os.path.exists("/dev/nvidiactl"):
            environment.setdefault("DS_ACCELERATOR", "cpu")
        command = [sys.executable, "-c", _IMPORTS, *names]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, env=environment)
            # The last line: libraries print at import too.
            return dict(json.loads(done.stdout.splitlines()[-1]))
        except subprocess.TimeoutExpired:
            reason = f"not done after {timeout_s:.0f} s"
        except (IndexError, ValueError):  # a native library ended the process
            reason = " ".join(done.stderr.split())[-300:] or f"the process ended with {done.returncode}"
        return {"seconds": {}, "errors": {", ".join(names): reason}, "torch_gpus": None}

    def missing(self, open_uri: OpenUri, place: str) -> list[str]:
        """Return the local directories that `write` would create, outermost first."""
        fs, path = open_uri(place)
        missing: list[str] = []
        while fs.type_name == "local" and not os.path.isdir(path):
            missing.insert(0, path)
            path = os.path.dirname(path)
        return missing

    def write(self, open_uri: OpenUri, place: str, name: str, content: str) -> dict[str, Any]:
        """Write a file into the storage; return why that failed, and the file system of the storage."""
        try:
            fs, root = open_uri(place)
            fs.create_dir(root, recursive=True)
            with fs.open_output_stream(f"{root}/{name}") as stream:
                stream.write(content.encode())
            return {"wrote": "", "disk": disk(root) if fs.type_name == "local" else None}
        except Exception as error:  # noqa: BLE001  # process border: any error of a driver is the answer
            number = getattr(error, "errno", None)
            reason = os.strerror(number) if number else " ".join(f"{type(error).__name__}: {error}".split())[:300]
            return {"wrote": reason, "disk": disk(place) if "://" not in place else None}

    def read(self, open_uri: OpenUri, place: str, contents: dict[str, str], patience_s: float) -> list[str]:
        """Return the names of the files with the right content, waiting for files that do not exist yet."""
        right: list[str] = []
        deadline = time.monotonic() + patience_s
        while len(right) < len(contents):
            for name in contents.keys() - set(right):
                try:
                    fs, root = open_uri(place)
                    with fs.open_input_stream(f"{root}/{name}") as stream:
                        if stream.read().decode() == contents[name]:
                            right.append(name)
                except Exception:  # noqa: BLE001  # process border: unreadable is the answer
                    continue
            if time.monotonic() > deadline:
                break
            time.sleep(0.2 if len(right) < len(contents) else 0)
        return right

    def clean(self, open_uri: OpenUri, place: str, names: list[str], made: list[str]) -> None:
        """Delete the files, the directory if it is empty then, and the directories that this node had created."""
        try:
            fs, root = open_uri(place)
            for name in names:
                try:
                    fs.delete_file(f"{root}/{name}")
                except OSError:  # another node deleted it first, or it was never written
                    continue
            if fs.type_name == "local":
                # Innermost first, and only what is empty: a run may have written there in the meantime.
                for directory in (root, *reversed(made)):
                    if os.path.isdir(directory) and not os.listdir(directory):
                        os.rmdir(directory)
            else:
                fs.delete_dir(root)
        except OSError:  # another node deleted it first
            return


class RankProbe:
    """One rank of the doctor's all-reduces: a Ray actor on a node, or on one GPU of it.

    It joins one group after another and times all-reduces as training does them; `probes.py` forms the groups.
    """

    def __init__(self) -> None:
        import torch.distributed  # slow from a cold disk; the driver waits for `ready` meanwhile

        self._store: Any = None
        self._device = "cuda" if torch.cuda.is_available() else "cpu"

    def ready(self) -> str:
        """Return the device of this rank."""
        return self._device

    def open(self, timeout_s: float) -> tuple[str, int]:
        """Start the store of a group as its rank 0; return the store's address and port."""
        from datetime import timedelta

        import ray
        import torch.distributed as dist

        address = ray.util.get_node_ip_address()
        timeout = timedelta(seconds=timeout_s)
        # Port 0: the system chooses a free port, and no other process can take it in between.
        # Without waiting: the other ranks learn the address only from the answer of this call.
        self._store = dist.TCPStore(address, 0, is_master=True, wait_for_workers=False, timeout=timeout)  # type: ignore[attr-defined]
        return address, self._store.port

    def join(self, meeting: tuple[str, int], rank: int, world: int, timeout_s: float) -> None:
        """Join a group. Collective; raises what torch raises when the other ranks cannot be reached."""
        from datetime import timedelta

        import torch
        import torch.distributed as dist

        timeout = timedelta(seconds=timeout_s)
        if rank > 0:
            self._store = dist.TCPStore(*meeting, is_master=False, timeout=timeout)  # type: ignore[attr-defined]
        # From an earlier group that was never complete: torch allows one default group per process.
        if dist.is_initialized():
            dist.destroy_process_group()
        backend = "nccl" if self._device == "cuda" else "gloo"
        # Collective: blocks until all ranks have joined, or until the time limit.
        dist.init_process_group(backend, store=self._store, rank=rank, world_size=world, timeout=timeout)
        # Collective. NCCL connects at its first collective only: without this one, the measurement would include that.
        dist.all_reduce(torch.ones(1, device=self._device))

    def measure(self, budget_s: float, max_bytes: int) -> dict[str, Any]:
        """Return the times of small and of growing messages. Collective.

        The message grows until it takes a good part of the time budget.
        """
        # Collective, as is `_slowest` below: the number of rounds must be the same on all ranks.
        latencies = [self._all_reduce_s(4) for _ in range(_WARM_UP_ROUNDS + _LATENCY_ROUNDS)][_WARM_UP_ROUNDS:]
        size = _FIRST_BYTES
        while True:
            # The fastest round: other load on nodes and network can only make one slower.
            seconds = self._slowest(min(self._all_reduce_s(size) for _ in range(_ROUNDS)))
            # The next size takes about four times as long, in each of the rounds.
            if size * 4 > max_bytes or seconds * 4 * _ROUNDS > budget_s:
                break
            size *= 4
        return {"num_bytes": size, "seconds": seconds, "latency_s": statistics.median(latencies)}

    def leave(self) -> None:
        """Leave the group, if in one."""
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()
        self._store = None

    def _all_reduce_s(self, num_bytes: int) -> float:
        """Return the seconds of one all-reduce of float32 values."""
        import torch
        import torch.distributed as dist

        tensor = torch.zeros(num_bytes // 4, device=self._device)
        # Collective: without it, the first rank's time would include waiting for the last.
        dist.barrier()
        self._synchronize()
        start = time.perf_counter()
        dist.all_reduce(tensor)
        # Host-device sync: on a GPU, all_reduce returns as soon as it is queued.
        self._synchronize()
        return time.perf_counter() - start

    def _slowest(self, seconds: float) -> float:
        """Return the slowest rank's time. Collective: all ranks must decide alike whether to grow the message."""
        import torch
        import torch.distributed as dist

        tensor = torch.tensor([seconds], dtype=torch.float64, device=self._device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return float(tensor.item())

    def _synchronize(self) -> None:
        import torch

        if self._device == "cuda":
            torch.cuda.synchronize()


def software() -> dict[str, Any]:
    """Return the fields of `Software`: what this process could import."""
    packages: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"]
        if name:  # the remains of a broken uninstall have none
            # The first of a name wins, as in an import: distributions() follows sys.path.
            packages.setdefault(re.sub(r"[-_.]+", "-", name).lower(), distribution.version)
    return {"python": platform.python_version(), "packages": packages, "launcher_sha256": source_hash("launcher")}


def source_hash(package: str) -> str | None:
    """Return the SHA-256 of the .py files of a package that an import would find, without importing it."""
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return None
    if spec is None or not spec.submodule_search_locations:
        return None
    digest = hashlib.sha256()
    for folder in spec.submodule_search_locations:
        for path in sorted(Path(folder).rglob("*.py")):
            digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def disk(path: str) -> dict[str, Any] | None:
    """Return the fields of `Disk` for a directory, or for the nearest parent that exists."""
    if not path:
        return None
    existing = os.path.abspath(path)
    while not os.path.exists(existing) and existing != "/":
        existing = os.path.dirname(existing)
    try:
        usage = psutil.disk_usage(existing)
    except OSError:
        return None
    return {"path": path, "total_bytes": usage.total, "free_bytes": usage.free}


def usable_cpus(groups: Iterable[Path] | None = None) -> float:
    """Return the CPUs this process may use: affinity, and the container's quota, which psutil does not read."""
    cpus = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    for folder in cgroup_folders() if groups is None else groups:
        period = _text(folder / "cpu.cfs_period_us")
        # Version 2 of cgroups has quota and period in one file, version 1 in two.
        words = _text(folder / "cpu.max").split() or [_text(folder / "cpu.cfs_quota_us"), period]
        if words[0].isdigit() and words[1].isdigit():  # `max` and -1 mean no limit
            cpus = min(cpus, int(words[0]) / int(words[1]))
    return cpus


def host_memory(groups: Iterable[Path] | None = None) -> tuple[int, int]:
    """Return total and free bytes of the host, or of the container where its limit is lower."""
    memory = psutil.virtual_memory()
    total, free = int(memory.total), int(memory.available)
    for folder in cgroup_folders() if groups is None else groups:
        limit = _text(folder / "memory.max") or _text(folder / "memory.limit_in_bytes")
        used = _text(folder / "memory.current") or _text(folder / "memory.usage_in_bytes")
        if limit.isdigit() and used.isdigit() and int(limit) < total:
            # The kernel frees the page cache when memory is needed.
            lines = [line.split() for line in _text(folder / "memory.stat").splitlines()]
            cached = sum(int(words[1]) for words in lines if words[0] in ("inactive_file", "active_file"))
            total = int(limit)
            free = max(0, total - max(0, int(used) - cached))
    return total, free


def cgroup_folders(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> Iterator[Path]:
    """Yield the folders with limits of this process: its group and the parents (v2), or the container's (v1)."""
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


def open_files() -> int | None:
    """Return the soft limit of open files."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def raylet_options() -> dict[str, str]:
    """Return the options of the raylet on this node, the parent of every worker process."""
    try:
        words = psutil.Process(os.getppid()).cmdline()
    except psutil.Error:
        return {}
    return dict(word[2:].split("=", 1) for word in words if word.startswith("--") and "=" in word and " " not in word)


def raylet_environment() -> dict[str, str]:
    """Return the environment that Ray was started in, from which a worker's may differ."""
    try:
        return dict(psutil.Process(os.getppid()).environ())
    except psutil.Error:
        return {}


def store_used() -> int | None:
    """Return the bytes in use in this node's object store, as its raylet reports them."""
    try:
        # node_stats is what `ray memory` calls in Ray 2.60; there is no public API.
        import ray
        from ray._private.internal_api import node_stats

        if not ray.is_initialized():  # the calls below would start a Ray
            return None
        node_id = ray.get_runtime_context().get_node_id()
        node = next(node for node in ray.nodes() if node["NodeID"] == node_id)
        stats = node_stats(node["NodeManagerAddress"], node["NodeManagerPort"], False)
        return int(stats.store_stats.object_store_bytes_used)
    except Exception:  # noqa: BLE001  # process border: another version of Ray, which the check `versions` reports
        return None


def token_needed() -> bool | None:
    """Return whether Ray on this node requires a token."""
    try:
        from ray._raylet import AuthenticationMode, get_authentication_mode  # type: ignore[attr-defined]  # Cython
    except ImportError:
        return None
    return bool(get_authentication_mode() == AuthenticationMode.TOKEN)


def nvidia_gpus() -> tuple[list[dict[str, Any]], str]:
    """Return the fields of `Gpu` for each GPU, and why NVML failed; ([], "") where there is no driver."""
    answers: list[tuple[list[dict[str, Any]], str]] = []
    # A thread, because a call of NVML cannot be interrupted; it ends with the actor.
    thread = threading.Thread(target=lambda: answers.append(_query_nvml()), daemon=True)
    thread.start()
    thread.join(_NVML_S)
    return answers[0] if answers else ([], f"NVML gave no answer within {_NVML_S:.0f} s")


def _query_nvml() -> tuple[list[dict[str, Any]], str]:
    try:
        import pynvml
    except ImportError:  # a node without launcher's packages
        return [], ""
    try:
        pynvml.nvmlInit()
        try:
            return [_gpu(pynvml, index) for index in range(pynvml.nvmlDeviceGetCount())], ""
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError as error:
        return [], "" if error.value == pynvml.NVML_ERROR_LIBRARY_NOT_FOUND else f"NVML: {error}"


def _gpu(nvml: Any, index: int) -> dict[str, Any]:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)

    def query(function: Callable[..., Any], *arguments: int) -> Any:
        try:
            return function(handle, *arguments)
        except nvml.NVMLError as error:
            if error.value != nvml.NVML_ERROR_NOT_SUPPORTED:
                raise
            return None  # this GPU does not report it

    memory = query(nvml.nvmlDeviceGetMemoryInfo)
    reasons = query(nvml.nvmlDeviceGetCurrentClocksThrottleReasons) or 0
    slowdowns = {
        "hw_slowdown": nvml.nvmlClocksThrottleReasonHwSlowdown,
        "hw_thermal_slowdown": nvml.nvmlClocksThrottleReasonHwThermalSlowdown,
        "sw_thermal_slowdown": nvml.nvmlClocksThrottleReasonSwThermalSlowdown,
        "hw_power_brake_slowdown": nvml.nvmlClocksThrottleReasonHwPowerBrakeSlowdown,
    }
    return {
        "index": index,
        "name": nvml.nvmlDeviceGetName(handle),
        "memory_bytes": memory.total if memory is not None else 0,
        "memory_used_bytes": memory.used if memory is not None else 0,
        "ecc_errors": query(
            nvml.nvmlDeviceGetTotalEccErrors, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
        ),
        "slowed_by": [name for name, bit in slowdowns.items() if reasons & bit],
    }
