"""Fingerprint of a model's files, so that a run is not resumed with another model of the same name. Client and head.

A changed tokenizer would encode the same rows to other tokens without any error.
"""

import hashlib
from pathlib import Path
from typing import BinaryIO

from launcher.models.pretrained import load_config
from launcher.models.remote import local_copy, open_remote_file, remote_files
from launcher.spec.hub import is_local_path
from launcher.spec.model import ModelSpec

_HASHED = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".py")
# Only their size is recorded: hashing gigabytes takes minutes, and a resumed run has the weights of its checkpoint.
# Frozen weights are in none, so samples of them are hashed: another training changes nearly all of them.
_WEIGHTS = (".safetensors", ".bin")
_SAMPLES, _SAMPLE_BYTES = 64, 4096


def fingerprint_model(model: ModelSpec) -> dict[str, str]:
    """Return the fingerprint of a model.

    Returns:
        The commit of a hub model; of a directory, by file name, sha256 of its small files and sizes of its weights, and
        of a job that freezes weights a hash of samples of them.

    Raises:
        ModelError: There is no such model.
    """
    if not is_local_path(model.name) and "://" not in model.name:
        # A commit covers all files, weights too; without one nothing is compared.
        commit = getattr(load_config(model), "_commit_hash", None)
        return {} if commit is None else {"commit": str(commit)}
    is_frozen = model.lora is not None or model.freeze is not None
    fingerprint = {}
    for path in sorted(Path(local_copy(model.name)).iterdir()):
        if path.suffix in _HASHED:
            fingerprint[path.name] = "sha256 " + hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        elif path.suffix in _WEIGHTS and "://" not in model.name:
            with path.open("rb") as stream:
                fingerprint[path.name] = _weights_fingerprint(stream, path.stat().st_size, is_frozen)
    if "://" in model.name:
        # Trap: not from the local copy, which has weights only once a worker of this node has trained.
        for info in remote_files(model.name):
            if info.path.endswith(_WEIGHTS):
                with open_remote_file(model.name, info) as stream:
                    fingerprint[info.base_name] = _weights_fingerprint(stream, info.size, is_frozen)
    return fingerprint


def _weights_fingerprint(stream: BinaryIO, size: int, is_frozen: bool) -> str:
    """Return the size of a file of weights in bytes, and of frozen weights a hash of blocks spread evenly over it."""
    if not is_frozen:
        return f"{size} bytes"
    digest = hashlib.sha256()
    for number in range(_SAMPLES):
        stream.seek(number * size // _SAMPLES)
        digest.update(stream.read(_SAMPLE_BYTES))
    return f"{size} bytes, samples {digest.hexdigest()[:16]}"
