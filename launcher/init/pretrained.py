"""The model of a new job: a well-known one for the task, or the user's, with what its directory tells. Client.

Reads JSON files beside the weights; transformers is not loaded for it.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from launcher.errors import ModelError
from launcher.init.guess import Guess
from launcher.spec.hub import is_path

# From this share of letters on, a text is not in a Latin script.
_FOREIGN = 0.3
_CHATS = ("instruct", "chat", "-it")


@dataclass(frozen=True)
class Model:
    """A model to start from.

    Args:
        name: directory, or name on the hub.
        why: why this one.
        positions: the longest input it takes; None where that is not known.
        has_template: whether its tokenizer brings a chat template.
    """

    name: str
    why: str
    positions: int | None
    has_template: bool


def default_model(guess: Guess) -> Model:
    """A well-known model of the hub for a task, small enough to begin with."""
    foreign = max((column.foreign for column in guess.inputs), default=0.0) > _FOREIGN
    script = "texts are not in a Latin script" if foreign else ""
    if guess.task == "image-classification":
        return Model("google/vit-base-patch16-224-in21k", "a ViT pretrained on ImageNet-21k", None, False)
    if guess.task == "causal-lm" and guess.form == "text":
        name = "Qwen/Qwen2.5-0.5B" if foreign else "gpt2"
        return Model(name, script or "small; any causal language model will do", 1024, False)
    if guess.task == "causal-lm" and ("tools" in guess.beside or any(column.has_calls for column in guess.inputs)):
        return Model("Qwen/Qwen2.5-0.5B-Instruct", "small, and its template writes tools and their calls", 2048, True)
    if guess.task == "causal-lm":
        name = "Qwen/Qwen2.5-0.5B-Instruct" if foreign else "HuggingFaceTB/SmolLM2-360M-Instruct"
        return Model(name, script or "small, and already follows instructions", 2048, True)
    cased = "bert-base-cased" if guess.task == "token-classification" else "bert-base-uncased"
    why = "names are told by their capitals" if guess.task == "token-classification" else "a good first model"
    return Model("bert-base-multilingual-cased" if foreign else cased, script or why, 512, False)


def find_model(name: str) -> Model:
    """The model that the user named.

    Raises:
        ModelError: it is a path, and no model is there.
    """
    folder = Path(os.path.expanduser(name))
    if not folder.is_dir():
        if folder.exists():
            raise ModelError(f"--model {name}: is a file; give the directory it is in, or a hub name")
        if is_path(name):
            raise ModelError(f"--model {name}: there is no such directory; give one that exists, or a hub name")
        return Model(name, "as asked", None, any(word in name.lower() for word in _CHATS))
    config = _json(folder / "config.json")
    if config is None:
        raise ModelError(f"--model {name}: holds no model (it has no config.json); give a directory that has")
    length = next((config[key] for key in ("max_position_embeddings", "n_positions") if key in config), None)
    template = (folder / "chat_template.jinja").is_file() or "chat_template" in (
        _json(folder / "tokenizer_config.json") or {}
    )
    return Model(str(folder), "as asked", length if isinstance(length, int) else None, template)


def _json(path: Path) -> dict[str, object] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
