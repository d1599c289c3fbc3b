"""What the doctor asks a node, and the actor that answers. Runs on every node, and in part on the client.

This module and `host.py` travel by value, as a node may have another launcher or none: they import nothing else of
it, nothing beyond the standard library at their top, and answer in plain values (`facts.py` has their types).
"""

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any  # plain JSON-like values and pyarrow's file systems, which have no types

from launcher.submit.doctor.host import (
    disk,
    host_memory,
    nvidia_gpus,
    open_files,
    raylet_environment,
    raylet_options,
    store_used,
    token_needed,
    usable_cpus,
)

OpenUri = Callable[[str], tuple[Any, str]]
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
    """One node's answers. A Ray actor; its calls run beside each other, so that one that hangs stops no other."""

    def ready(self) -> None:
        """The process is there."""

    def facts(self) -> dict[str, Any]:
        """As `NodeFacts`."""
        started = raylet_options()
        temp = started.get("temp_dir", "")
        memory, free = host_memory()
        gpus, gpu_error = nvidia_gpus()
        return {
            "software": software(),
            "cpus": usable_cpus(),
            "memory_bytes": memory,
            "memory_free_bytes": free,
            "open_files": open_files(),
            "temp": disk(temp) if temp else None,
            "spill": disk(started.get("fallback_directory") or started.get("session_dir") or temp),
            "shm": disk("/dev/shm") if os.path.isdir("/dev/shm") else None,
            "store_directory": started.get("plasma_directory", ""),
            "store_used_bytes": store_used(),
            "gpus": gpus,
            "gpu_error": gpu_error,
            "token_needed": token_needed(),
        }

    def clock(self) -> float:
        """Seconds since 1970, here and now."""
        return time.time()

    def imports(self, names: list[str], timeout_s: float) -> dict[str, Any]:
        """As `Imports`: in a process of its own, with the GPUs that Ray itself was started with."""
        environment = {key: value for key, value in os.environ.items() if key != "CUDA_VISIBLE_DEVICES"}
        environment |= {key: value for key, value in raylet_environment() if key == "CUDA_VISIBLE_DEVICES"}
        if not os.path.exists("/dev/nvidiactl"):
            environment.setdefault("DS_ACCELERATOR", "cpu")
        command = [sys.executable, "-c", _IMPORTS, *names]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, env=environment)
            return dict(json.loads(done.stdout.splitlines()[-1]))
        except subprocess.TimeoutExpired:
            why = f"not done after {timeout_s:.0f} s"
        except (IndexError, ValueError):  # a native library took the process down
            why = " ".join(done.stderr.split())[-300:] or f"the process ended with {done.returncode}"
        return {"seconds": {}, "errors": {", ".join(names): why}, "torch_gpus": None}

    def missing(self, open_uri: OpenUri, place: str) -> list[str]:
        """Local directories that a `write` would make, outermost first."""
        fs, root = open_uri(place)
        return missing_directories(root) if fs.type_name == "local" else []

    def write(self, open_uri: OpenUri, place: str, name: str, content: str) -> dict[str, Any]:
        """Put a file into the storage; why that failed, and the file system it is on."""
        try:
            fs, root = open_uri(place)
            fs.create_dir(root, recursive=True)
            with fs.open_output_stream(f"{root}/{name}") as stream:
                stream.write(content.encode())
            return {"wrote": "", "disk": disk(root) if fs.type_name == "local" else None}
        except Exception as error:  # noqa: BLE001  # process border: any driver's error is what is to be told
            where = disk(place) if "://" not in place else None
            return {"wrote": why(error), "disk": where}

    def read(self, open_uri: OpenUri, place: str, contents: dict[str, str], patience_s: float) -> list[str]:
        """Names of the files that hold what they should; a file that is not there yet is waited for."""
        right: list[str] = []
        end = time.monotonic() + patience_s
        while len(right) < len(contents):
            for name in contents.keys() - set(right):
                try:
                    fs, root = open_uri(place)
                    with fs.open_input_stream(f"{root}/{name}") as stream:
                        if stream.read().decode() == contents[name]:
                            right.append(name)
                except Exception:  # noqa: BLE001  # process border: unreadable is the answer
                    continue
            if time.monotonic() > end:
                break
            time.sleep(0.2 if len(right) < len(contents) else 0)
        return right

    def clean(self, open_uri: OpenUri, place: str, names: list[str], made: list[str]) -> None:
        """Take away the files, the directory if nothing is left in it, and the directories this node had made."""
        try:
            fs, root = open_uri(place)
            for name in names:
                try:
                    fs.delete_file(f"{root}/{name}")
                except OSError:  # another node was quicker, or it was never there
                    continue
            if fs.type_name == "local":
                for directory in (root, *reversed(made)):
                    if os.path.isdir(directory) and not os.listdir(directory):
                        os.rmdir(directory)
            else:
                fs.delete_dir(root)
        except OSError:  # another node was quicker
            return


def why(error: Exception) -> str:
    """An error in a few words, the system's own where it is the system's."""
    number = getattr(error, "errno", None)
    return os.strerror(number) if number else " ".join(f"{type(error).__name__}: {error}".split())[:300]


def software() -> dict[str, Any]:
    """As `Software`: what this process could import."""
    packages: dict[str, str] = {}
    for found in importlib.metadata.distributions():
        name = found.metadata["Name"]
        if name:  # what is left of a broken uninstall has none
            packages.setdefault(re.sub(r"[-_.]+", "-", name).lower(), found.version)
    return {"python": platform.python_version(), "packages": packages, "launcher_sha256": source_hash("launcher")}


def source_hash(package: str) -> str | None:
    """SHA-256 over the .py files of a package that an import would find, without importing it."""
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


def missing_directories(path: str) -> list[str]:
    """Directories on the way to `path` that do not exist, outermost first."""
    missing: list[str] = []
    while not os.path.isdir(path):
        missing.insert(0, path)
        path = os.path.dirname(path)
    return missing
