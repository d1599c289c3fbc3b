"""Models that lie behind a URI: copied once to each node, beside what came from the hub. Runs anywhere.

transformers reads local files alone. A copy is named by what was listed (paths, sizes, times), so a model that changed
is fetched again; it appears whole, and the workers of a node wait for the first of them. It may be deleted at any time.
"""

import hashlib
import os
import shutil
import tempfile
from functools import lru_cache
from pathlib import Path

import pyarrow.fs as pafs
from filelock import FileLock

from launcher.errors import ModelError, RunError
from launcher.rundir.uri import open_uri, split_options, translate_errors

# What only a process that trains or scores needs; tokenizers and configs are read on every node and by `check`.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf")


@lru_cache(maxsize=16)
def local_copy(name: str, weights: bool = False) -> str:
    """A model's directory on this machine's disk: itself, or a copy of a remote one.

    Args:
        name: of the job file.
        weights: whether the weights are needed too.

    Raises:
        ModelError: nothing is there, or its storage refuses.
    """
    if "://" not in name:
        return name
    files = remote_files(name)
    facts = "\n".join(f"{info.path} {info.size} {info.mtime_ns}" for info in files)
    digest = hashlib.sha256(f"{name}\n{facts}".encode()).hexdigest()[:24]
    folder = _cache()
    whole, part = folder / digest, folder / f"{digest}-without-weights"
    for ready in (whole,) if weights else (whole, part):
        if ready.is_dir():
            return str(ready)
    target = whole if weights else part
    with FileLock(f"{target}.lock"):
        if not target.is_dir():
            _fetch(name, [i for i in files if weights or not i.path.endswith(_WEIGHTS)], target)
    return str(target)


def remote_files(name: str) -> list[pafs.FileInfo]:
    """The files of a remote model, sorted by path.

    Raises:
        ModelError: there are none, or its storage refuses.
    """
    shown = split_options(name)[0]
    try:
        with translate_errors(f"model.name: {shown}"):
            fs, path = open_uri(name)
            found = fs.get_file_info(pafs.FileSelector(path, recursive=True, allow_not_found=True))
            if not found:  # an object store lists a missing bucket like an empty directory
                fs.get_file_info(pafs.FileSelector(path))
    except RunError as error:
        raise ModelError(error.message) from error
    except FileNotFoundError:
        found = []
    files = sorted((info for info in found if info.type == pafs.FileType.File), key=lambda info: str(info.path))
    if not any(info.base_name == "config.json" for info in files):
        what = "has no config.json" if files else "is empty or does not exist"
        raise ModelError(f"model.name: {shown} {what}; give a directory that `save_pretrained` wrote")
    return files


def _fetch(name: str, files: list[pafs.FileInfo], target: Path) -> None:
    """Copy files into a directory that appears whole."""
    fs, root = open_uri(name)
    staged = Path(tempfile.mkdtemp(prefix=f"{target.name}.", dir=target.parent))
    try:
        with translate_errors(f"model.name: {split_options(name)[0]}"):
            for info in files:
                place = staged / info.path[len(root) :].lstrip("/")
                place.parent.mkdir(parents=True, exist_ok=True)
                pafs.copy_files(info.path, str(place), source_filesystem=fs, destination_filesystem=_LOCAL)
        os.replace(staged, target)
    except RunError as error:
        raise ModelError(error.message) from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)


_LOCAL = pafs.LocalFileSystem()


def _cache() -> Path:
    """HF_HOME, where this node keeps models; where that cannot be written, a directory for temporary files."""
    from huggingface_hub import constants

    for folder in (Path(constants.HF_HOME) / "launcher", Path(tempfile.gettempdir()) / f"launcher-{os.getuid()}"):
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError:
            continue  # a read-only image
        if os.access(folder, os.W_OK) and folder.stat().st_uid == os.getuid():
            return folder
    raise ModelError(f"HF_HOME: {constants.HF_HOME} cannot be written, so no remote model can be kept; name another")
