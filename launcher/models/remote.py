"""Local copies of models at a URI (s3://, ...), as transformers only reads local files. Runs anywhere.

A model is copied once per node, into the cache of the hub. The name of the copy is a hash of the listing (paths, sizes,
times), so a changed model is copied again. A copy appears by rename when it is complete, and other processes of the
node wait for it. It may be deleted at any time.
"""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import pyarrow.fs as pafs
from filelock import FileLock

from launcher.errors import ModelError, RunError
from launcher.rundir.uri import open_uri, split_options, translate_errors

# Not copied for a process that only needs the config and the tokenizer, such as `check` or a data worker.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf")


# Cached for the life of the process: each listing is a request to the store.
@lru_cache(maxsize=16)
def local_copy(name: str, weights: bool = False) -> str:
    """Return a model's local directory, copying a remote model first. A hub name is returned unchanged.

    Args:
        name: Model name of the job: a directory, URI or hub name.
        weights: True to copy the weights too.

    Raises:
        ModelError: There is no model at the URI, or it cannot be read.
    """
    if "://" not in name:
        return name
    files = remote_files(name)
    facts = "\n".join(f"{info.path} {info.size} {info.mtime_ns}" for info in files)
    digest = hashlib.sha256(f"{name}\n{facts}".encode()).hexdigest()[:24]
    folder = _cache_dir()
    full, without_weights = folder / digest, folder / f"{digest}-without-weights"
    # Without the lock: a copy that is there is complete, as it appears by rename.
    for copy in (full,) if weights else (full, without_weights):
        if copy.is_dir():
            return str(copy)
    target = full if weights else without_weights
    # All workers of a node ask at once; one of them copies.
    with FileLock(f"{target}.lock"):
        # Asked again inside of the lock: another process may have copied while this one waited.
        if not target.is_dir():
            _copy(name, [i for i in files if weights or not i.path.endswith(_WEIGHTS)], target)
    return str(target)


def remote_files(name: str) -> list[pafs.FileInfo]:
    """Return the files of a remote model, sorted by path.

    Raises:
        ModelError: There is no model at the URI, or it cannot be listed.
    """
    shown = split_options(name)[0]
    try:
        with translate_errors(f"model.name: {shown}"):
            fs, path = open_uri(name)
            infos = fs.get_file_info(pafs.FileSelector(path, recursive=True, allow_not_found=True))
            # A missing bucket looks like an empty directory; this listing raises for it.
            if not infos:
                fs.get_file_info(pafs.FileSelector(path))
    except RunError as error:
        raise ModelError(error.message) from error
    except FileNotFoundError:
        infos = []
    files = sorted((info for info in infos if info.type == pafs.FileType.File), key=lambda info: str(info.path))
    if not any(info.base_name == "config.json" for info in files):
        problem = "has no config.json" if files else "is empty or does not exist"
        raise ModelError(f"model.name: {shown} {problem}; give a directory that `save_pretrained` wrote")
    return files


@contextmanager
def open_remote_file(name: str, info: pafs.FileInfo) -> Iterator[BinaryIO]:
    """Open a file of a remote model for reading anywhere in it.

    Args:
        name: URI of the model.
        info: File, from `remote_files`.

    Raises:
        ModelError: The file cannot be read.
    """
    try:
        with translate_errors(f"model.name: {split_options(name)[0]}"):
            fs, _ = open_uri(name)
            with fs.open_input_file(info.path) as stream:
                yield stream
    except RunError as error:
        raise ModelError(error.message) from error


def _copy(name: str, files: list[pafs.FileInfo], target: Path) -> None:
    """Copy files into a directory that appears when all of them are there."""
    fs, root = open_uri(name)
    # Next to the target: a rename works within one file system only.
    staged = Path(tempfile.mkdtemp(prefix=f"{target.name}.", dir=target.parent))
    try:
        with translate_errors(f"model.name: {split_options(name)[0]}"):
            for info in files:
                path = staged / info.path[len(root) :].lstrip("/")
                path.parent.mkdir(parents=True, exist_ok=True)
                pafs.copy_files(
                    info.path, str(path), source_filesystem=fs, destination_filesystem=pafs.LocalFileSystem()
                )
        # Last: whoever sees the directory sees all of its files.
        os.replace(staged, target)
    except RunError as error:
        raise ModelError(error.message) from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _cache_dir() -> Path:
    """Return a directory for copies: in HF_HOME, or where that cannot be written, in the temporary directory."""
    from huggingface_hub import constants

    for folder in (Path(constants.HF_HOME) / "launcher", Path(tempfile.gettempdir()) / f"launcher-{os.getuid()}"):
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError:
            # A read-only container image.
            continue
        # Its owner is checked: anyone may create this name in a shared temporary directory, and models can hold code.
        if os.access(folder, os.W_OK) and folder.stat().st_uid == os.getuid():
            return folder
    raise ModelError(f"HF_HOME: {constants.HF_HOME} cannot be written, so no remote model can be copied; set another")
