"""One worker's part of a checkpoint: copied out of the way of training, then written and hashed in one pass.

Train workers. `train/checkpoint/writer.py` decides when; `train/checkpoint/reader.py` reads what is written here.
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
"""What a worker has to save: trees of tensors and plain values, by the name of their file."""


class StagingBuffers:
    """Copies states into memory of its own, which is used again the next time: new pages cost more than the copy."""

    def __init__(self) -> None:
        self._kept: list[torch.Tensor] = []

    def copy(self, states: States) -> dict[str, Any]:
        """The same states, which no later step changes; valid until the next call."""
        old, self._kept = self._kept, []
        done: dict[tuple[object, ...], torch.Tensor] = {}
        copied = {name: self._tree(tree, old, done) for name, tree in states.items()}
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # copies into pinned memory are under way until then
        return copied

    def _tree(self, tree: Any, old: list[torch.Tensor], done: dict[tuple[object, ...], torch.Tensor]) -> Any:
        if isinstance(tree, torch.Tensor):
            # Tied weights stand under two names.
            key = (tree.data_ptr(), tree.dtype, tree.shape, tree.stride(), tree.device)
            if tree.numel() == 0 or key not in done:
                done[key] = self._tensor(tree.detach(), old)
            return done[key]
        if isinstance(tree, dict):
            whole = type(tree)() if type(tree).__init__ is dict.__init__ else {}
            whole.update({key: self._tree(value, old, done) for key, value in tree.items()})
            return whole
        if type(tree) in (list, tuple):
            return type(tree)(self._tree(value, old, done) for value in tree)
        return tree

    def _tensor(self, tensor: torch.Tensor, old: list[torch.Tensor]) -> torch.Tensor:
        # The states of one engine come in the same order every time.
        room = old[len(self._kept)] if len(self._kept) < len(old) else None
        if room is None or room.shape != tensor.shape or room.dtype != tensor.dtype:
            room = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        room.copy_(tensor, non_blocking=True)
        self._kept.append(room)
        return room


class _Hashed(io.RawIOBase):
    """Writes through to a stream, and knows size and sha256 of what passed."""

    def __init__(self, stream: Any) -> None:
        self._stream, self.size, self.digest = stream, 0, hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self._stream.write(view)
        self.digest.update(view)
        self.size += len(view)
        return len(view)


def write_state_files(run: RunDir, directory: str, name: str, tree: object) -> FileEntry:
    """Write one file of a checkpoint.

    Args:
        run: whose checkpoint it is.
        directory: of the checkpoint in the run; is made.
        name: of the file below it.
        tree: tensors and plain values, as `torch.save` takes them.

    Raises:
        OSError: the storage refuses.
    """
    fs, root = open_uri(run.uri)
    path = f"{root}/{directory}/{name}"
    if not is_object_store(fs):
        fs.create_dir(path.rsplit("/", 1)[0], recursive=True)
    # A plain file where it can be had: it is forced to the disk, so that what a manifest names survives a power cut.
    with open(path, "wb") if is_local(fs) else fs.open_output_stream(path) as stream:
        hashed = _Hashed(stream)
        torch.save(tree, hashed)  # type: ignore[arg-type]  # writing is all it needs
        if is_local(fs):
            stream.flush()
            os.fsync(stream.fileno())
    return FileEntry(path=name, size_bytes=hashed.size, sha256=hashed.digest.hexdigest())
