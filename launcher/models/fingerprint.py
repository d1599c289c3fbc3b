"""What tells a model from a later one of the same name. Client and head.

A run that goes on with another tokenizer would read other tokens out of the same rows, and nobody would notice.
"""

import hashlib
from pathlib import Path

from launcher.models.pretrained import load_config
from launcher.models.remote import local_copy
from launcher.spec.hub import is_path
from launcher.spec.model import ModelSpec

_READ = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".py")
_WEIGHED = (".safetensors", ".bin")
"""Weights: gigabytes, and a run that goes on has those of its checkpoint."""


def model_files(model: ModelSpec) -> dict[str, str]:
    """The commit of a model on the hub; of a directory, sha256 of what a model is described by, and sizes of weights.

    Raises:
        ModelError: there is no such model.
    """
    if not is_path(model.name) and "://" not in model.name:
        commit = getattr(load_config(model), "_commit_hash", None)
        return {} if commit is None else {"commit": str(commit)}
    found = {}
    for path in sorted(Path(local_copy(model.name)).iterdir()):
        if path.suffix in _READ:
            found[path.name] = "sha256 " + hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        elif path.suffix in _WEIGHED:
            found[path.name] = f"{path.stat().st_size} bytes"
    return found
