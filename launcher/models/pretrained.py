"""Pretrained models, loaded safely and the same on every worker. Runs in train workers and, for configs, anywhere.

No remote code, no pickles unless the job file says so. Layers the checkpoint lacks (a new head) draw their values
from the job's seed and their own name, so they do not depend on how the model was loaded or sharded.
"""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.errors import ModelError
from launcher.models.remote import local_copy
from launcher.models.weights import check_loaded, check_place
from launcher.spec.hub import is_path
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
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    check_place(spec)
    try:
        config = AutoConfig.from_pretrained(
            local_copy(spec.name), revision=spec.revision, trust_remote_code=spec.trust_remote_code, **overrides
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StrictDataclassError) as error:
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
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoTokenizer

    check_place(spec)
    try:
        more = {"add_prefix_space": True} if words else {}
        tokenizer = AutoTokenizer.from_pretrained(
            local_copy(spec.name), revision=spec.revision, trust_remote_code=spec.trust_remote_code, **more
        )
    except StrictDataclassError as error:
        raise _model_error(spec, error) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if Path(spec.name).is_dir() and "trust_remote_code" not in str(error):
            raise ModelError(
                f"model.name: the tokenizer of {spec.name} cannot be loaded ({_named(error)}); copy its files again"
            ) from error
        raise _model_error(spec, error) from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # transformers makes an empty one of a model type's name
        raise ModelError(f"model.name: {spec.name} has no tokenizer; put its files (tokenizer.json) beside the weights")
    if tokenizer.pad_token_id is None:
        # Token 0, which transformers would pad with, is a word of many vocabularies ("!" of GPT-2's): models that pool
        # the last token before the padding would look past it.
        ends = (tokenizer.eos_token, tokenizer.sep_token, tokenizer.unk_token, tokenizer.bos_token)
        tokenizer.pad_token = next((token for token in ends if token is not None), None)
    return tokenizer


def load_image_processor(spec: ModelSpec) -> "BaseImageProcessor":
    """The model's image processor, on Pillow: the one backend that gives the same pixels everywhere.

    Raises:
        ModelError: the model has none that loads.
    """
    from transformers import AutoImageProcessor

    check_place(spec)
    try:
        return AutoImageProcessor.from_pretrained(  # type: ignore[no-any-return]  # untyped
            local_copy(spec.name), revision=spec.revision, trust_remote_code=spec.trust_remote_code, backend="pil"
        )
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        if Path(spec.name).is_dir():
            raise ModelError(
                f"model.name: {spec.name} has no image processor; put its preprocessor_config.json beside the weights"
            ) from error
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
    check_loaded(spec, model, info["missing_keys"], is_whole=auto_model == "AutoModelForCausalLM")
    _initialise(model, set(info["missing_keys"]), seed)
    return model  # type: ignore[no-any-return]  # from_pretrained is untyped


def without_weights(auto_model: str, spec: ModelSpec, config: "PretrainedConfig") -> "PreTrainedModel":
    """A model of this config without storage: its layers and the shapes of its parameters.

    Raises:
        ModelError: the configuration describes no such model.
    """
    import torch

    try:
        with torch.device("meta"):
            return empty_model(auto_model, config)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError, ArithmeticError) as error:
        scratch = spec.from_config is not None
        at, whose = ("model.from_config", "it") if scratch else ("model.name", f"the configuration of {spec.name}")
        kind = config.model_type
        if "Unrecognized configuration class" in str(error):
            what = f"{'it' if scratch else spec.name} is a {kind} model, of which transformers has no {auto_model}"
            raise ModelError(f"{at}: {what}; give a model that can do the task") from error
        raise ModelError(f"{at}: {whose} makes no {kind} model ({_named(error)}); mend its keys") from error


def usable_positions(model: "PreTrainedModel") -> int | None:
    """Longest input that the model's position embeddings reach; None where it has no such limit."""
    import torch

    for name, module in model.named_modules():
        # RoBERTa's kind counts positions from behind the padding's.
        if name.endswith("position_embeddings") and isinstance(module, torch.nn.Embedding):
            return module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    has = getattr(model.config, "max_position_embeddings", None)
    return has if isinstance(has, int) else None


def empty_model(auto_model: str, config: "PretrainedConfig") -> "PreTrainedModel":
    """A model of this config with whatever values its layers begin with, on torch's default device."""
    return _auto_class(auto_model).from_config(config)  # type: ignore[no-any-return]  # untyped


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


def _model_error(spec: ModelSpec, error: Exception) -> ModelError:
    text = " ".join(str(error).split())
    if is_path(spec.name) and "://" not in spec.name and not Path(spec.name).is_dir():
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
    if (
        any(said in text for said in ("couldn't connect", "offline mode", "Can't load"))
        and not Path(spec.name).is_dir()
    ):
        return ModelError(
            f"model.name: {spec.name} is no directory here, and neither the hub nor its cache has it now; give a "
            "directory, mend the name, or look at the network"
        )
    return ModelError(
        f"model.name: {spec.name} cannot be loaded ({_named(error)}); give a model directory or a hub name"
    )


def _named(error: Exception) -> str:
    """What a library said, with the kind of error where that alone tells what it is about."""
    text = " ".join(str(error).split()).split(". ")[0].rstrip(".")[:200]
    return f"{type(error).__name__}: {text}" if isinstance(error, KeyError) else text
