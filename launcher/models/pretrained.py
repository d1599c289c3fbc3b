"""Loading of pretrained models, tokenizers and image processors by transformers.

Models are loaded in train and predict workers, configs and processors anywhere. No remote code and no pickles are
loaded unless the job file allows it. New layers (a head) are initialised from the job's seed and the parameter's name,
so their values do not depend on how the model is loaded or sharded; so are the rows of tokens that the job adds
(`model.add_tokens`). Read `weights.py` next for the checks of the files.
"""

import hashlib
import itertools
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.errors import ModelError
from launcher.models.remote import local_copy
from launcher.models.weights import check_loaded, check_place
from launcher.spec.hub import is_local_path
from launcher.spec.model import ModelSpec

if TYPE_CHECKING:
    import torch
    from transformers import BaseImageProcessor, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
    from transformers.models.auto.auto_factory import _BaseAutoModelClass

    Processor = PreTrainedTokenizerBase | BaseImageProcessor


# Names of dropout probabilities in the configurations of transformers.
_DROPOUTS = (
    "hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout", "hidden_dropout", "dropout",
    "attention_dropout", "activation_dropout", "embd_pdrop", "resid_pdrop", "attn_pdrop", "seq_classif_dropout",
    "pooler_dropout", "summary_first_dropout", "classifier_dropout_prob", "embedding_dropout", "mlp_dropout",
    "dropout_rate",
)  # fmt: skip

# Auto classes without a head of the task's own: their weights must be complete. Only a pooler may be new.
_WHOLE = frozenset(("AutoModel", "AutoModelForCausalLM", "AutoModelForSeq2SeqLM"))


def load_config(spec: ModelSpec, **overrides: object) -> "PretrainedConfig":
    """Load the configuration of a model, with the job's dropout.

    Args:
        spec: Model section of the job.
        overrides: Entries to replace (`num_labels`, `id2label`, ...).

    Raises:
        ModelError: There is no such model, or it needs remote code that is not allowed.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, PreTrainedConfig

    check_place(spec)
    try:
        config = AutoConfig.from_pretrained(
            local_copy(spec.name), revision=spec.revision, trust_remote_code=spec.trust_remote_code, **overrides
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StrictDataclassError) as error:
        raise _model_error(spec, error) from error
    for name, value in overrides.items():
        # transformers 5.23 drops what the class does not declare, such as T5's decoder_start_token_id.
        if not hasattr(config, name):
            setattr(config, name, value)
    if spec.dropout is not None:
        # An encoder-decoder made of two models has the probabilities in the configurations of these.
        parts = [config, *(value for value in vars(config).values() if isinstance(value, PreTrainedConfig))]
        for part, name in itertools.product(parts, _DROPOUTS):
            # Only names that the model has: others would be saved with the config and do nothing.
            if hasattr(part, name):
                setattr(part, name, spec.dropout)
    return config  # type: ignore[no-any-return]  # AutoConfig is untyped


def load_tokenizer(spec: ModelSpec, words: bool = False) -> "PreTrainedTokenizerBase":
    """Load the tokenizer of a model, with the job's new tokens. It has a padding token, if it has any special token.

    Args:
        spec: Model section of the job.
        words: True to tokenize lists of words: byte-level tokenizers (GPT-2, RoBERTa) then add the space before each.

    Raises:
        ModelError: The model has no tokenizer that can be loaded.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoTokenizer

    check_place(spec)
    try:
        options = {"add_prefix_space": True} if words else {}
        tokenizer = AutoTokenizer.from_pretrained(
            local_copy(spec.name), revision=spec.revision, trust_remote_code=spec.trust_remote_code, **options
        )
    except StrictDataclassError as error:
        raise _model_error(spec, error) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if Path(spec.name).is_dir() and "trust_remote_code" not in str(error):
            raise ModelError(
                f"model.name: the tokenizer of {spec.name} cannot be loaded ({_reason(error)}); copy its files again"
            ) from error
        raise _model_error(spec, error) from error
    # Without tokenizer files transformers 5 makes an empty tokenizer of the model type's class.
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise ModelError(
            f"model.name: {spec.name} has no tokenizer; put its files (tokenizer.json) next to the weights"
        )
    if spec.add_tokens:
        # Without those that it has: as added tokens they would be found inside other words too.
        known = tokenizer.get_vocab()
        tokenizer.add_tokens([token for token in dict.fromkeys(spec.add_tokens) if token not in known])
    if tokenizer.pad_token_id is None:
        # Padding with token 0 would be padding with a word ("!" in GPT-2's vocabulary): models that classify from the
        # last token before the padding would skip it at the end of a text.
        ends = (tokenizer.eos_token, tokenizer.sep_token, tokenizer.unk_token, tokenizer.bos_token)
        tokenizer.pad_token = next((token for token in ends if token is not None), None)
    return tokenizer


def load_image_processor(spec: ModelSpec) -> "BaseImageProcessor":
    """Load the image processor of a model with the Pillow backend, the only one with the same pixels on any machine.

    Raises:
        ModelError: The model has no image processor that can be loaded.
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
                f"model.name: {spec.name} has no image processor; put its preprocessor_config.json next to the weights"
            ) from error
        raise _model_error(spec, error) from error


def load_model(auto_model: str, spec: ModelSpec, config: "PretrainedConfig", seed: int) -> "PreTrainedModel":
    """Load the pretrained weights with a task's head in fp32, which the optimizer's master weights are made from.

    Args:
        auto_model: Name of the Auto class, such as `AutoModelForSequenceClassification`.
        spec: Model section of the job; with `from_config` all weights are new.
        config: Result of `load_config`.
        seed: Seed of the new layers; the global random state is left as it was.

    Raises:
        ModelError: The weights cannot be loaded as the job file allows, or do not fit the configuration.
    """
    import torch
    from safetensors import SafetensorError

    kind = _auto_class(auto_model)
    if spec.from_config is not None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            # Every rank draws the same weights, as the seed is the job's.
            model = kind.from_config(config, dtype=torch.float32)
        add_embeddings(model, spec, seed)
        return model  # type: ignore[no-any-return]  # untyped
    options = {}
    if spec.quantization is not None:
        from launcher.models.quantization import nf4_config  # imports torch

        options["quantization_config"] = nf4_config(without_weights(auto_model, spec, config))
    try:
        model, info = kind.from_pretrained(
            local_copy(spec.name, weights=True),
            config=config,
            revision=spec.revision,
            trust_remote_code=spec.trust_remote_code,
            # True raises where there are only pickles; None takes them.
            use_safetensors=None if spec.allow_pickle else True,
            # Without it transformers 5 takes the dtype of the checkpoint, often bf16: master weights would start
            # rounded.
            dtype=torch.float32,
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise _model_error(spec, error) from error
    if spec.quantization is not None:
        from launcher.models.quantization import finish_loading

        finish_loading(model)
    missing = frozenset(info["missing_keys"])
    check_loaded(spec, model, missing, is_whole=auto_model in _WHOLE)
    # transformers has drawn them already, from the global generator: overwritten, or a head would depend on what else
    # drew before.
    _initialise(model, missing, seed)
    # Read by `new_parameters`: what the files lack is known only now.
    model.launcher_new_parameters = missing
    add_embeddings(model, spec, seed)
    return model  # type: ignore[no-any-return]  # from_pretrained is untyped


def new_parameters(auto_model: str, model: "PreTrainedModel") -> frozenset[str]:
    """Return the names of the parameters that the weights lack, such as a new head's.

    Args:
        auto_model: Name of the Auto class.
        model: Result of `load_model`; of another model, such as one on the meta device, a head counts as new unless it
            is a language model's.
    """
    known: frozenset[str] | None = getattr(model, "launcher_new_parameters", None)
    if known is not None:
        return known
    names = [name for name, _ in model.named_parameters()]
    prefix = f"{model.base_model_prefix}."
    has_new_head = not auto_model.endswith("LM") and any(name.startswith(prefix) for name in names)
    return frozenset(name for name in names if has_new_head and not name.startswith(prefix))


def new_token_ids(spec: ModelSpec) -> list[int]:
    """Return the ids of the job's tokens that the model's own tokenizer lacks."""
    if not spec.add_tokens:
        return []
    known = load_tokenizer(spec.model_copy(update={"add_tokens": ()})).get_vocab()
    vocabulary = load_tokenizer(spec).get_vocab()
    return [vocabulary[token] for token in dict.fromkeys(spec.add_tokens) if token not in known]


def add_embeddings(model: "PreTrainedModel", spec: ModelSpec, seed: int) -> None:
    """Add a row to the embeddings, and to the output layer, for each new token; in place.

    A model with more embeddings than tokens, as many have, uses its spare rows first.

    Args:
        model: Model on any device; on the meta device only the shapes change.
        spec: Model section of the job.
        seed: Seed of the new rows; the global random state is left as it was.

    Raises:
        ModelError: The model reads no tokens.
    """
    import torch

    if not spec.add_tokens:
        return
    embeddings = model.get_input_embeddings()
    if not isinstance(embeddings, torch.nn.Embedding):
        raise ModelError(
            f"model.add_tokens: a {model.config.model_type} model has no embeddings of tokens; drop add_tokens"
        )
    size = max(new_token_ids(spec), default=-1) + 1
    if size <= embeddings.num_embeddings:
        return
    is_real = not embeddings.weight.is_meta
    with torch.random.fork_rng():
        # All ranks and attempts must draw the same rows: transformers draws them around the mean of the others, from
        # the global generator.
        torch.manual_seed(seed)
        model.resize_token_embeddings(size, mean_resizing=is_real)


def check_trained_rows(model: "PreTrainedModel", spec: ModelSpec) -> None:
    """Refuse frozen embeddings of new tokens, which would stay random.

    Args:
        model: Model after `layers.freeze`.
        spec: Model section of the job.

    Raises:
        ModelError: The embeddings are frozen.
    """
    if spec.add_tokens and not any(p.requires_grad for p in model.get_input_embeddings().parameters()):
        raise ModelError(
            "model.freeze: freezes the embeddings, and those of model.add_tokens must be trained; freeze less, or use "
            "model.lora, which trains the new rows alone"
        )


def without_weights(auto_model: str, spec: ModelSpec, config: "PretrainedConfig") -> "PreTrainedModel":
    """Return a model of a configuration on the meta device: layers and shapes without storage.

    Raises:
        ModelError: The configuration is invalid, or transformers has no such model for the task.
    """
    import torch

    try:
        with torch.device("meta"):
            return untrained_model(auto_model, config)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError, ArithmeticError) as error:
        is_new, kind = spec.from_config is not None, config.model_type
        key = "model.from_config" if is_new else "model.name"
        if "Unrecognized configuration class" in str(error):
            problem = f"{'it' if is_new else spec.name} is a {kind} model, of which transformers has no {auto_model}"
            raise ModelError(f"{key}: {problem}; give a model that can do the task") from error
        subject = "it" if is_new else f"the configuration of {spec.name}"
        raise ModelError(f"{key}: {subject} makes no valid {kind} model ({_reason(error)}); fix its keys") from error


def usable_positions(model: "PreTrainedModel") -> int | None:
    """Return the longest input in tokens that the model has positions for; None if there is no limit."""
    embeddings = _position_embeddings(model)
    if embeddings is not None:
        return embeddings.num_embeddings - first_position(model)
    limit = getattr(model.config, "max_position_embeddings", None)
    return limit if isinstance(limit, int) else None


def first_position(model: "PreTrainedModel") -> int:
    """Return the number of the first position: 0, but padding_idx + 1 in RoBERTa and its relatives."""
    padding = getattr(_position_embeddings(model), "padding_idx", None)
    return 0 if padding is None else padding + 1


def _position_embeddings(model: "PreTrainedModel") -> "torch.nn.Embedding | None":
    import torch

    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, torch.nn.Embedding):
            return module
    return None


def untrained_model(auto_model: str, config: "PretrainedConfig") -> "PreTrainedModel":
    """Return a model of a configuration with untrained weights, on torch's default device."""
    return _auto_class(auto_model).from_config(config)  # type: ignore[no-any-return]  # untyped


def _auto_class(name: str) -> "type[_BaseAutoModelClass]":
    import transformers

    return getattr(transformers, name)  # type: ignore[no-any-return]  # looked up by name


def _initialise(model: "PreTrainedModel", missing: frozenset[str], seed: int) -> None:
    """Initialise new parameters from seed and name: matrices N(0, initializer_range), biases 0, norm weights 1."""
    import torch

    std = float(getattr(model.config, "initializer_range", 0.02))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name not in missing:
                continue
            if parameter.dim() >= 2:
                # `hash()` of a string differs from process to process. Seven bytes fit into a signed 64-bit seed.
                digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
                rng = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
                # Drawn on the CPU: generators of GPUs give other numbers for the same seed.
                parameter.copy_(torch.randn(parameter.shape, generator=rng) * std)
            else:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)


def _model_error(spec: ModelSpec, error: Exception) -> ModelError:
    text = " ".join(str(error).split())
    if is_local_path(spec.name) and "://" not in spec.name and not Path(spec.name).is_dir():
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
        any(part in text for part in ("couldn't connect", "offline mode", "Can't load"))
        and not Path(spec.name).is_dir()
    ):
        return ModelError(
            f"model.name: {spec.name} is not a directory of this machine, and neither the hub nor its cache has it; "
            "give a directory, fix the name, or check the network"
        )
    return ModelError(
        f"model.name: {spec.name} cannot be loaded ({_reason(error)}); give a model directory or a hub name"
    )


def _reason(error: Exception) -> str:
    """Return the first sentence of a library's error; of a KeyError, whose text is a bare key, with the type."""
    text = " ".join(str(error).split()).split(". ")[0].rstrip(".")[:200]
    return f"{type(error).__name__}: {text}" if isinstance(error, KeyError) else text
