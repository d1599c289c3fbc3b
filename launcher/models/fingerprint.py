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
_WEIGHTS = (".safetensors", ".bin")


def fingerprint_model(model: ModelSpec) -> dict[str, str]:
    """Return the fingerprint of a model.

    Returns:
        The commit of a hub model; of a directory, sha256 of its small files and sizes of its weights, by file name.

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
            fingerprint[path.name] = f"{path.stat().st_size} bytes"
    return fingerprint
