"""Fingerprint of a model's files, so that a run is not resumed with another model of the same name. Client and head.

A changed tokenizer would encode the same rows to other tokens without any error.
"""

import hashlib
from pathlib import Path

from launcher.models.pretrained import load_config
from launcher.models.remote import local_copy
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
    fingerprint = {}
    # Trap: `local_copy` prefers a copy with weights where a worker of this node has made one, so for a remote model the
    # sizes of weights are in the fingerprint only from then on.
    for path in sorted(Path(local_copy(model.name)).iterdir()):
        if path.suffix in _HASHED:
            fingerprint[path.name] = "sha256 " + hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        elif path.suffix in _WEIGHTS:
            is_frozen = model.lora is not None or model.freeze is not None
            fingerprint[path.name] = f"{path.stat().st_size} bytes" + (f", {_hash_samples(path)}" if is_frozen else "")
    return fingerprint


def _hash_samples(path: Path) -> str:
    """Return a hash of blocks that are spread evenly over a file."""
    size, digest = path.stat().st_size, hashlib.sha256()
    with path.open("rb") as stream:
        for number in range(_SAMPLES):
            stream.seek(number * size // _SAMPLES)
            digest.update(stream.read(_SAMPLE_BYTES))
    return f"samples {digest.hexdigest()[:16]}"
