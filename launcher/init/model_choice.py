"""The model that `init` writes: a usual one for a task, or what is known of the one that the user names. Client."""

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path

from launcher.errors import ModelError
from launcher.init.guess import Guess
from launcher.spec.hub import is_local_path

T5_LANGUAGES = {"en": "English", "de": "German", "fr": "French", "ro": "Romanian"}
"""Languages that T5 was pretrained to translate, by its prefix."""
# Fraction of letters from which a text counts as non-Latin.
_FOREIGN = 0.3
_ENCODERS = ("bert", "electra", "mpnet")
"""Parts of the names of encoders, and of their types in config.json."""
# A model of the hub is not downloaded to guess: its name has to tell whether it has a chat template.
_CHAT_WORDS = ("instruct", "chat", "-it")


@dataclass(frozen=True)
class Model:
    """Pretrained model to start from."""

    name: str
    """Local directory, or name on the hub."""
    why: str
    """Reason for this model."""
    positions: int | None
    """Longest input in tokens; None if unknown."""
    has_template: bool
    """True if its tokenizer has a chat template."""
    is_encoder: bool = False
    """True if it reads a text as a whole and cannot continue it."""


def default_model(guess: Guess) -> Model:
    """Return a well-known, small model of the hub for a task."""
    is_foreign = max((column.foreign for column in guess.inputs), default=0.0) > _FOREIGN
    script = "texts are not in a Latin script" if is_foreign else ""
    if guess.task == "image-classification":
        return Model("google/vit-base-patch16-224-in21k", "a ViT pretrained on ImageNet-21k", None, False)
    if guess.task == "seq2seq":
        return _default_pair_model(guess, is_foreign)
    if guess.task == "causal-lm" and guess.form == "text":
        name = "Qwen/Qwen2.5-0.5B" if is_foreign else "gpt2"
        return Model(name, script or "small; any causal language model will do", 1024, False)
    if guess.task == "causal-lm" and ("tools" in guess.beside or any(column.has_calls for column in guess.inputs)):
        return Model("Qwen/Qwen2.5-0.5B-Instruct", "small, and its template writes tools and their calls", 2048, True)
    if guess.task in ("causal-lm", "preference", "reward"):
        name = "Qwen/Qwen2.5-0.5B-Instruct" if is_foreign else "HuggingFaceTB/SmolLM2-360M-Instruct"
        return Model(name, script or "small, and already follows instructions", 2048, True)
    if guess.task == "sentence-embedding":
        name = "paraphrase-multilingual-MiniLM-L12-v2" if is_foreign else "all-MiniLM-L6-v2"
        return Model(f"sentence-transformers/{name}", script or "small, and already embeds sentences", 512, False)
    if guess.task == "reranking":
        name = "BAAI/bge-reranker-base" if is_foreign else "cross-encoder/ms-marco-MiniLM-L6-v2"
        return Model(name, script or "small, and already ranks passages", 512, False)
    cased = "bert-base-cased" if guess.task == "token-classification" else "bert-base-uncased"
    why = "capitals help to recognise names" if guess.task == "token-classification" else "a good first model"
    return Model("bert-base-multilingual-cased" if is_foreign else cased, script or why, 512, False)


def _default_pair_model(guess: Guess, is_foreign: bool) -> Model:
    """Return a small encoder-decoder."""
    is_foreign = is_foreign or (guess.label is not None and guess.label.foreign > _FOREIGN)
    if is_foreign or not {*pair_languages(guess)} <= {"", *T5_LANGUAGES}:
        return Model("google/mt5-small", "reads and writes many languages", None, False)
    if guess.form == "summary":
        return Model("facebook/bart-base", "small, and pretrained to restore texts", 1024, False)
    return Model("google-t5/t5-small", "small, and has learned to translate", None, False)


def pair_languages(guess: Guess) -> tuple[str, str]:
    """Return the languages of source and target by their names in the data, "" for unknown ones."""
    names = guess.inputs[0].keys[:2] if guess.label is None else (guess.inputs[0].name, guess.label.name)
    first, second = (name.lower()[:2] if guess.form != "summary" and len(name) == 2 else "" for name in names)
    return first, second


def find_model(name: str) -> Model:
    """Return the model that the user named.

    Raises:
        ModelError: The name is a path without a model.
    """
    folder = Path(os.path.expanduser(name))
    if not folder.is_dir():
        if folder.exists():
            raise ModelError(f"--model {name}: is a file; give the directory it is in, or a hub name")
        if is_local_path(name):
            raise ModelError(f"--model {name}: there is no such directory; give one that exists, or a hub name")
        has_template = any(word in name.lower() for word in _CHAT_WORDS)
        return Model(name, "as asked", None, has_template, _is_encoder(name))
    config = _read_json(folder / "config.json")
    if config is None:
        raise ModelError(f"--model {name}: holds no model (it has no config.json); give a directory that has one")
    # GPT-2 calls it n_positions.
    length = next((config[key] for key in ("max_position_embeddings", "n_positions") if key in config), None)
    tokenizer = _read_json(folder / "tokenizer_config.json") or {}
    # Newer versions of transformers save the template as a file, older ones inside of the JSON.
    has_template = (folder / "chat_template.jinja").is_file() or "chat_template" in tokenizer
    is_encoder = _is_encoder(str(config.get("model_type")))
    return Model(str(folder), "as asked", length if isinstance(length, int) else None, has_template, is_encoder)


def _is_encoder(name: str) -> bool:
    return any(part in name.lower() for part in _ENCODERS)


def fit_task(guess: Guess, model: Model) -> Guess:
    """Return the guess for plain texts with the task that a model can learn them by: an encoder fills masks."""
    if guess.task == "causal-lm" and guess.form == "text" and model.is_encoder:
        return replace(guess, task="masked-lm", notes=(), why=f"{guess.why}, and the model is an encoder")
    return guess


def _read_json(path: Path) -> dict[str, object] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
