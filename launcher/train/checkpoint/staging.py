"""One rank's files of a checkpoint: staged in reused memory, written and hashed in one pass. Runs in train workers.

`writer.py` decides when; `reader.py` loads the files.
"""

import hashlib
import io
import os
from collections.abc import Mapping
from typing import Any  # trees of DeepSpeed's making

import torch

from launcher.rundir.directory import RunDir
from launcher.rundir.records import FileEntry
from launcher.rundir.uri import is_local, is_object_store, open_uri

States = Mapping[str, Any]
"""File name -> tree of tensors and plain values that one rank saves."""


class StagingBuffers:
    """Host memory that states are copied to, reused by every checkpoint.

    New memory would cost more than the copy: pages must be faulted in, and pinned memory is slow to allocate.
    """

    def __init__(self) -> None:
        self._buffers: list[torch.Tensor] = []

    def copy(self, states: States) -> dict[str, Any]:
        """Return a copy of the states that later optimizer steps do not change; valid until the next call."""
        old, self._buffers = self._buffers, []
        copies: dict[tuple[object, ...], torch.Tensor] = {}
        staged = {name: self._copy_tree(tree, old, copies) for name, tree in states.items()}
        if torch.cuda.is_available():
            # A host-device sync, in the writer's thread: copies to pinned memory are async, and are read next.
            torch.cuda.synchronize()
        return staged

    def _copy_tree(self, tree: Any, old: list[torch.Tensor], copies: dict[tuple[object, ...], torch.Tensor]) -> Any:
        if isinstance(tree, torch.Tensor):
            # Tied weights have two names and one storage: one copy, or `torch.save` would write them twice.
            key = (tree.data_ptr(), tree.dtype, tree.shape, tree.stride(), tree.device)
            if tree.numel() == 0 or key not in copies:
                copies[key] = self._copy_tensor(tree.detach(), old)
            return copies[key]
        if isinstance(tree, dict):
            copy = type(tree)() if type(tree).__init__ is dict.__init__ else {}
            copy.update({key: self._copy_tree(value, old, copies) for key, value in tree.items()})
            return copy
        if type(tree) in (list, tuple):
            return type(tree)(self._copy_tree(value, old, copies) for value in tree)
        return tree

    def _copy_tensor(self, tensor: torch.Tensor, old: list[torch.Tensor]) -> torch.Tensor:
        # An engine's states come in the same order every time, so the n-th tensor fits the n-th buffer.
        buffer = old[len(self._buffers)] if len(self._buffers) < len(old) else None
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            # Pinned, so that all copies are queued at once: one to pageable memory blocks until the device has made it.
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        buffer.copy_(tensor, non_blocking=True)
        self._buffers.append(buffer)
        return buffer


class _HashingStream(io.RawIOBase):
    """Stream that passes writes on and computes their size and sha256."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.size = 0
        self.digest = hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self._stream.write(view)
        # The hash of what is written. Reading the file again would cost as much as writing it, and hash a bad write.
        self.digest.update(view)
        self.size += len(view)
        return len(view)


def write_state_files(run: RunDir, directory: str, name: str, tree: object) -> FileEntry:
    """Write one file of a checkpoint.

    Args:
        run: Run directory.
        directory: Directory of the checkpoint's files in the run; created if missing.
        name: File name inside it.
        tree: Tensors and plain values, as `torch.save` accepts them.

    Raises:
        OSError: The storage rejects the write.
    """
    fs, root = open_uri(run.uri)
    path = f"{root}/{directory}/{name}"
    if not is_object_store(fs):
        fs.create_dir(path.rsplit("/", 1)[0], recursive=True)
    # pyarrow's streams cannot fsync. On a local file system a plain file is used: what a manifest names must survive a
    # power failure, so the file reaches the disk before the manifest is written.
    with open(path, "wb") if is_local(fs) else fs.open_output_stream(path) as stream:
        hashing = _HashingStream(stream)
        torch.save(tree, hashing)  # type: ignore[arg-type]  # `write` is all it needs
        if is_local(fs):
            stream.flush()
            os.fsync(stream.fileno())
    return FileEntry(path=name, size_bytes=hashing.size, sha256=hashing.digest.hexdigest())
