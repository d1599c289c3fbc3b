"""Pretrained models, loaded safely and the same on every worker. Runs in train workers and, for configs, anywhere.

No remote code, no pickles unless the job file says so. Layers the checkpoint lacks (a new head) draw their values
from the job's seed and their own name, so they do not depend on how the model was loaded or sharded.
"""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.errors import ModelError
from launcher.models.remote import local_copy, remote_files
from launcher.spec.model import ModelSpec

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
    from transformers.models.auto.auto_factory import _BaseAutoModelClass

    Processor = PreTrainedTokenizerBase | BaseImageProcessor

_DROPOUTS = (
    "hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout", "hidden_dropout", "dropout",
    "attention_dropout", "activation_dropout", "embd_pdrop", "resid_pdrop", "attn_pdrop", "seq_classif_dropout",
    "pooler_dropout", "summary_first_dropout", "classifier_dropout_prob", "embedding_dropout", "mlp_dropout",
)  # fmt: skip


def load_config(spec: ModelSpec, **overrides: object) -> "PretrainedConfig":
    """The model's configuration with dropout and `overrides` (num_labels, id2label, ...) applied.

    Raises:
        ModelError: there is no such model, or it needs remote code that is not allowed.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(
            local_copy(spec.name), revision=spec.revision, trust_remote_code=spec.trust_remote_code, **overrides
        )
    except (OSError, ValueError, KeyError) as error:
        raise _model_error(spec, error) from error
    if spec.dropout is not None:
        for name in _DROPOUTS:
            if hasattr(config, name):
                setattr(config, name, spec.dropout)
    return config  # type: ignore[no-any-return]  # AutoConfig is untyped


def load_tokenizer(spec: ModelSpec, words: bool = False) -> "PreTrainedTokenizerBase":
    """The model's tokenizer.

    Args:
        spec: which model's.
        words: whether it will be given lists of words, each of which stands behind a space.

    Raises:
        ModelError: the model has none that loads.
    """
    from transformers import AutoTokenizer

    try:
        more = {"add_prefix_space": True} if words else {}
        tokenizer = AutoTokenizer.from_pretrained(
            local_copy(spec.name), revision=spec.revision, trust_remote_code=spec.trust_remote_code, **more
        )
    except (OSError, ValueError, KeyError) as error:
        raise _model_error(spec, error) from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # transformers makes an empty one of a model type's name
        raise ModelError(f"model.name: {spec.name} has no tokenizer; put its files (tokenizer.json) beside the weights")
    return tokenizer


def load_image_processor(spec: ModelSpec) -> "BaseImageProcessor":
    """The model's image processor, on Pillow: the one backend that gives the same pixels everywhere.

    Raises:
        ModelError: the model has none that loads.
    """
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(  # type: ignore[no-any-return]  # untyped
            local_copy(spec.name), revision=spec.revision, trust_remote_code=spec.trust_remote_code, backend="pil"
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise _model_error(spec, error) from error


def load_model(auto_model: str, spec: ModelSpec, config: "PretrainedConfig", seed: int) -> "PreTrainedModel":
    """The pretrained weights under a task's head, in fp32 as the optimizer's master weights want them.

    Args:
        auto_model: name of the Auto class, AutoModelForSequenceClassification for example.
        spec: which model, and what it may do.
        config: from `load_config`.
        seed: of the new layers.

    Raises:
        ModelError: the weights cannot be loaded as the job file allows.
    """
    import torch
    from safetensors import SafetensorError

    kind = _auto_class(auto_model)
    if spec.from_config is not None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return kind.from_config(config, dtype=torch.float32)  # type: ignore[no-any-return]  # untyped
    try:
        model, info = kind.from_pretrained(
            local_copy(spec.name, weights=True),
            config=config,
            revision=spec.revision,
            trust_remote_code=spec.trust_remote_code,
            use_safetensors=None if spec.allow_pickle else True,
            dtype=torch.float32,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise _model_error(spec, error) from error
    _initialise(model, set(info["missing_keys"]), seed)
    return model  # type: ignore[no-any-return]  # from_pretrained is untyped


def count(auto_model: str, config: "PretrainedConfig") -> tuple[int, int]:
    """(parameters, BatchNorm layers) of a model of this config, counted without allocating any."""
    import torch

    from launcher.models.batch_norm import batch_norms

    with torch.device("meta"):
        model = _auto_class(auto_model).from_config(config)
    return sum(p.numel() for p in model.parameters()), len(batch_norms(model))


def _auto_class(name: str) -> "type[_BaseAutoModelClass]":
    import transformers

    return getattr(transformers, name)  # type: ignore[no-any-return]  # by name


def _initialise(model: "PreTrainedModel", missing: set[str], seed: int) -> None:
    """Give new parameters their values by seed and name: matrices N(0, initializer_range), vectors 0, norms 1."""
    import torch

    std = float(getattr(model.config, "initializer_range", 0.02))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name not in missing:
                continue
            if parameter.dim() >= 2:
                digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
                rng = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
                parameter.copy_(torch.randn(parameter.shape, generator=rng) * std)
            else:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)


def check_weights(spec: ModelSpec) -> None:
    """Look whether a local model directory has weights that may be loaded, without reading them.

    Raises:
        ModelError: it has none.
    """
    remote = "://" in spec.name
    if spec.from_config is not None or not (remote or Path(spec.name).is_dir()):
        return
    names = [i.base_name for i in remote_files(spec.name)] if remote else [f.name for f in Path(spec.name).iterdir()]
    if any(name.endswith((".safetensors", *((".bin",) if spec.allow_pickle else ()))) for name in names):
        return
    raise _model_error(spec, OSError("no file named model.safetensors"))


def _model_error(spec: ModelSpec, error: Exception) -> ModelError:
    text = " ".join(str(error).split())
    if spec.name.startswith(("/", "./", "../", "~")) and not Path(spec.name).is_dir():
        return ModelError(f"model.name: there is no directory {spec.name}; give one that exists, or a hub name")
    if "trust_remote_code" in text:
        return ModelError(
            f"model.name: {spec.name} wants to run its own code; read that code, then set model.trust_remote_code: true"
        )
    if "safetensors" in text and not spec.allow_pickle:
        return ModelError(
            f"model.name: {spec.name} has no safetensors weights; a pickle can run code when loaded: convert it, "
            "or set model.allow_pickle: true if you trust it"
        )
    return ModelError(f"model.name: {spec.name} cannot be loaded ({text[:300]}); give a model directory or a hub name")
