"""LoRA adapters (Hu et al. 2021, arXiv:2106.09685) by peft: added to a model, and saved or merged for the export.

Runs in train workers, and on the head where memory is measured on a meta model.
"""

import difflib
import fnmatch
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.errors import ModelError
from launcher.models.pretrained import new_parameters, new_token_ids
from launcher.spec.model import LoraSpec, ModelSpec

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer
    from transformers import PreTrainedModel

# peft's task types: the class that `AutoPeftModel` loads an adapter with. peft has none for masked language models.
_TASK_TYPES = {
    "AutoModel": "FEATURE_EXTRACTION",
    "AutoModelForCausalLM": "CAUSAL_LM",
    "AutoModelForQuestionAnswering": "QUESTION_ANS",
    "AutoModelForSeq2SeqLM": "SEQ_2_SEQ_LM",
    "AutoModelForSequenceClassification": "SEQ_CLS",
    "AutoModelForTokenClassification": "TOKEN_CLS",
}
# Layers that peft trains in full for a task type, new or not (PeftModelForSequenceClassification and others).
_HEADS_OF_TYPE = {
    "QUESTION_ANS": ("qa_outputs",),
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
}
# Conv1D is GPT-2's linear layer, Linear4bit one of `quantization.py`.
_LINEAR = ("Linear", "Linear4bit", "Conv1D")
_CONVOLUTIONS = ("Conv1d", "Conv2d", "Conv3d")


def add_adapters(model: "PreTrainedModel", auto_model: str, spec: ModelSpec, seed: int) -> "PeftModel":
    """Return the model with trainable adapters; of its own weights only new layers, such as a head, are trained.

    Args:
        model: Model with the task's head.
        auto_model: Name of its Auto class.
        spec: Model section with a `lora`.
        seed: Seed of the initial values; the global random state is left as it was.

    Raises:
        ModelError: No layer matches one of `target_modules`, or peft cannot train the new tokens of this model.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    assert spec.lora is not None
    lora = spec.lora
    new_layers = _new_layers(model, new_parameters(auto_model, model))
    kind = _task_type(model, auto_model, new_layers)
    # peft adds its own names to those that are given, and warns of a name that it has twice.
    heads = _HEADS_OF_TYPE.get(kind or "", ())
    targets = find_targets(lora, model, new_layers)
    config = LoraConfig(
        task_type=kind,
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # declared as int; peft only divides it
        lora_dropout=lora.dropout,
        use_rslora=lora.rank_stabilized,
        use_dora=lora.dora,
        # Whole names: peft has no globs, and its `all-linear` knows only some of the names that heads have.
        target_modules=targets,
        # Weights of GPT-2's layers are (in, out).
        fan_in_fan_out=all(type(model.get_submodule(name)).__name__ == "Conv1D" for name in targets),
        modules_to_save=[name for name in new_layers if name not in heads] or None,
        trainable_token_indices=_trained_rows(model, spec),
        base_model_name_or_path=spec.name,
        revision=spec.revision,
    )
    try:
        # peft draws lora_A from the global generator: all ranks must seed it alike, or their adapters would differ.
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return get_peft_model(model, config)
    except ValueError as error:
        raise ModelError(
            f"model.lora.target_modules: {' '.join(str(error).split())[:200]}; name other layers"
        ) from error


def find_targets(lora: LoraSpec, model: "PreTrainedModel", new_layers: Collection[str] = ()) -> list[str]:
    """Return the names of the layers that get an adapter.

    Args:
        lora: Section with `target_modules`.
        model: Model on any device, meta too.
        new_layers: Names of layers that are trained in full, and get none.

    Raises:
        ModelError: A pattern matches no layer, or none that can have an adapter.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    kinds = {name: type(module).__name__ for name, module in modules.items()}
    usable = {name for name, module in modules.items() if _takes_adapter(module, lora.dora)}
    output = model.get_output_embeddings()
    embeddings = model.get_input_embeddings() if output is not None else None
    if output is not None and getattr(embeddings, "weight", None) is output.weight:
        # An adapter would be merged into the embeddings too, to which it was not added.
        usable -= {name for name, module in modules.items() if module is output}
    new = {name for name in modules if any(name == layer or name.startswith(f"{layer}.") for layer in new_layers)}
    linear = [name for name in modules if name in usable - new and kinds[name] in _LINEAR]
    if lora.target_modules is None:
        return [name for name in linear if modules[name] is not output]
    targets: dict[str, None] = {}
    for pattern in lora.target_modules:
        # By the end of the name, as peft matches plain names: `query` is any layer's.
        matches = [n for n in modules if any(fnmatch.fnmatchcase(n, p) for p in (pattern, f"*.{pattern}"))]
        found = [name for name in matches if name in usable - new]
        if not found:
            raise ModelError(_explain_no_match(pattern, matches, kinds, new, linear, model))
        targets |= dict.fromkeys(found)
    return list(targets)


def _explain_no_match(
    pattern: str,
    matches: list[str],
    kinds: dict[str, str],
    new: Collection[str],
    linear: list[str],
    model: "PreTrainedModel",
) -> str:
    problem = f"not a layer of this {model.config.model_type} model"
    if matches:
        kind = kinds[matches[0]]
        problem = f"a{'n' * (kind[0] in 'AEIOU')} {kind}, which takes no adapter"
        if all(name in new for name in matches):
            problem = "new, so it is trained in full"
    names = sorted({name.rpartition(".")[2] for name in linear})
    near = difflib.get_close_matches(pattern, names, 1)
    remedy = f"did you mean {near[0]}?" if near else f"its linear layers are {', '.join(names)}"
    return f"model.lora.target_modules: {pattern} is {problem}; {remedy}"


def _takes_adapter(module: "torch.nn.Module", dora: bool) -> bool:
    """Return True if `merge_adapters` can merge an adapter of this layer."""
    kind = type(module).__name__
    # Convolutions of groups have adapters of groups, and DoRA a norm for each kernel.
    return kind in _LINEAR or (kind in _CONVOLUTIONS and not dora and getattr(module, "groups", 1) == 1)


def _new_layers(model: "PreTrainedModel", new: Collection[str]) -> list[str]:
    """Return the names of the largest modules of which all parameters are new."""
    by_id = {id(parameter): name in new for name, parameter in model.named_parameters()}
    layers: list[str] = []
    waiting = list(model.named_children())
    while waiting:
        name, module = waiting.pop(0)
        # By identity: a new head may share the embeddings' pretrained weights.
        are_new = [by_id[id(parameter)] for parameter in module.parameters()]
        if are_new and all(are_new):
            layers.append(name)
        elif any(are_new):
            waiting += [(f"{name}.{child}", inner) for child, inner in module.named_children()]
    return layers


def _task_type(model: "PreTrainedModel", auto_model: str, new_layers: Collection[str]) -> str | None:
    """Return peft's task type; None where it has none, or would train a pretrained head in full."""
    if model.main_input_name != "input_ids":
        return None  # peft's classes pass on token ids, which a model of pictures does not take
    kind = _TASK_TYPES.get(auto_model)
    heads = _HEADS_OF_TYPE.get(kind or "", ())
    own = [name for name, _ in model.named_modules() if name.rpartition(".")[2] in heads]
    return kind if all(name in new_layers for name in own) else None


def _trained_rows(model: "PreTrainedModel", spec: ModelSpec) -> dict[str, list[int]] | None:
    """Return the rows of new tokens by the name of their layer: the embeddings, and an output layer of its own.

    Raises:
        ModelError: peft cannot train these rows.
    """
    ids = new_token_ids(spec)
    if not ids:
        return None
    embeddings, output = model.get_input_embeddings(), model.get_output_embeddings()
    # peft 0.21 computes the outputs without it (tuners/trainable_tokens/layer.py, forward_adapters).
    if output is not None and getattr(output, "bias", None) is not None:
        raise ModelError(
            f"model.add_tokens: the output layer of a {model.config.model_type} model has a bias, with which peft "
            "cannot train new tokens; drop model.lora or add_tokens"
        )
    layers = [embeddings] if output is None or output.weight is embeddings.weight else [embeddings, output]
    return {name: ids for name, module in model.named_modules() if any(module is layer for layer in layers)}


def borrowed_parameters(model: "PeftModel") -> "list[tuple[torch.nn.Module, torch.nn.Parameter]]":
    """Return the parameters that a module's forward pass reads of other modules, with that module.

    ZeRO-3 gathers a module's own parameters alone unless it is told of these: DoRA computes norms of a layer's weight,
    and new tokens replace rows of the embeddings.
    """
    from peft.tuners.lora.dora import DoraLinearLayer
    from peft.tuners.lora.layer import LoraLayer
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    borrowed: list[tuple[torch.nn.Module, torch.nn.Parameter]] = []
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            lenders = (layer.get_base_layer(), *layer.lora_A.values(), *layer.lora_B.values())
            doras = [inner for inner in layer.lora_magnitude_vector.values() if isinstance(inner, DoraLinearLayer)]
            borrowed += [(dora, p) for dora in doras for lender in lenders for p in lender.parameters(recurse=False)]
        if isinstance(layer, TrainableTokensLayer):
            borrowed += [(layer, p) for p in (layer.base_layer.weight, *layer.trainable_tokens_delta.values())]
    return borrowed


def save_adapters(model: "PeftModel", state: "dict[str, torch.Tensor]", folder: Path) -> None:
    """Save the adapters and the trained layers without the base model, for `PeftModel.from_pretrained`.

    Args:
        model: Model with adapters; its own weights may be shards.
        state: All weights by name, gathered.
        folder: Directory to write to.
    """
    # Without whole embeddings, which peft saves where the model has other ones than its source: of new tokens the
    # trained rows are enough.
    model.save_pretrained(str(folder), state_dict=state, save_embedding_layers=False)


def merge_adapters(
    model: "PeftModel", state: "dict[str, torch.Tensor]"
) -> "tuple[torch.nn.Module, dict[str, torch.Tensor]]":
    """Merge the adapters into the weights of the base model, in fp32: W + scaling * B A, with DoRA's norms.

    peft's own `merge_and_unload` works on the parameters of the model, which are shards under ZeRO-3, or have 4 bits.

    Args:
        model: Model with adapters, which has their scales; it is not changed.
        state: All weights by name, gathered.

    Returns:
        Base model (its own parameters may be shards) and its merged weights by their plain names.
    """
    from peft.tuners.lora import LoraLayer
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    plain: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        # `original_module` is the head as it was before training; merging it would undo what the head learned.
        if not any(part in name for part in (".lora_", ".original_module.", ".trainable_tokens_delta.")):
            plain[_plain_name(name)] = tensor
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer) and "default" in layer.scaling:
            target = _plain_name(f"{name}.weight")
            plain[target] = _merge_layer(layer, name, plain[target], state)
        rows = f"{name}.trainable_tokens_delta.default"
        if isinstance(layer, TrainableTokensLayer) and rows in state:
            target = _plain_name(f"{name}.base_layer.weight")
            plain[target] = plain[target].clone()
            plain[target][layer.token_indices["default"]] = state[rows].to(plain[target].dtype)
    return model.get_base_model(), plain


def _plain_name(name: str) -> str:
    """Return a weight's name in the base model, from its name in a peft model (peft 0.21)."""
    name = name.removeprefix("base_model.model.")
    # `base_layer` is a layer with adapters, `modules_to_save` the trained copy of a head, `token_adapter` an embedding.
    for old, new in ((".token_adapter.", "."), (".base_layer.", "."), (".modules_to_save.default.", ".")):
        name = name.replace(old, new)
    return name


def _merge_layer(
    layer: "LoraLayer", name: str, weight: "torch.Tensor", state: "dict[str, torch.Tensor]"
) -> "torch.Tensor":
    """Return a layer's weight with its adapter."""
    up, down = (state[f"{name}.lora_{part}.default.weight"].float() for part in "BA")
    # Flattened, as the adapters of a convolution are convolutions. In fp32, even if the weights are not.
    delta = (up.flatten(1) @ down.flatten(1)) * layer.scaling["default"]
    base = layer.get_base_layer()
    # GPT-2's Conv1D stores its weight as (in, out); a quantized layer knows what it was.
    is_transposed = getattr(base, "source_cls", type(base)).__name__ == "Conv1D"
    rows = weight.T if is_transposed else weight
    merged = rows.float() + delta.reshape(rows.shape)
    magnitude = state.get(f"{name}.lora_magnitude_vector.default.weight")
    if magnitude is not None:
        merged *= (magnitude.float() / merged.norm(dim=1)).unsqueeze(1)
    whole: torch.Tensor = merged.T.contiguous() if is_transposed else merged
    return whole.to(weight.dtype)
