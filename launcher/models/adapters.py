"""LoRA adapters, by peft: put around a model, and taken off or merged for export. Runs in train workers."""

from pathlib import Path
from typing import TYPE_CHECKING

from launcher.errors import ModelError
from launcher.spec.model import ModelSpec

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel

# The kinds of head that peft knows, and trains whole beside the adapters.
_HEADS = {
    "AutoModelForSequenceClassification": "SEQ_CLS",
    "AutoModelForTokenClassification": "TOKEN_CLS",
    "AutoModelForCausalLM": "CAUSAL_LM",
}

# Their names in transformers; peft trains them whole.
_HEAD_LAYERS = ["classifier", "score"]


def add_adapters(model: "PreTrainedModel", auto_model: str, spec: ModelSpec, seed: int) -> "PeftModel":
    """The model with adapters; all its own weights but the head's are frozen.

    Args:
        model: as the task built it.
        auto_model: its Auto class, which tells where the head is.
        spec: with a `lora`.
        seed: of the adapters' first values.

    Raises:
        ModelError: no layer has one of `target_modules`' names.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    assert spec.lora is not None
    lora = spec.lora
    config = LoraConfig(
        task_type=_HEADS.get(auto_model),
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # peft only divides it, so a float does
        lora_dropout=lora.dropout,
        target_modules="all-linear" if lora.target_modules is None else list(lora.target_modules),
        exclude_modules=None if auto_model == "AutoModelForCausalLM" else _HEAD_LAYERS,
        base_model_name_or_path=spec.name,
        revision=spec.revision,
    )
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            adapted = get_peft_model(model, config)
    except ValueError as error:
        raise ModelError(
            f"model.lora.target_modules: {' '.join(str(error).split())[:200]}; name other layers"
        ) from error
    return adapted


def save_adapters(model: "PeftModel", state: "dict[str, torch.Tensor]", folder: Path) -> None:
    """The adapters and the head alone, as `PeftModel.from_pretrained` loads them upon the base model."""
    model.save_pretrained(str(folder), state_dict=state)


def merged(model: "PeftModel", state: "dict[str, torch.Tensor]") -> "tuple[torch.nn.Module, dict[str, torch.Tensor]]":
    """A plain model with the adapters added into its weights, in fp32.

    Args:
        model: of which the configuration and the adapters' scales are taken; it is not changed.
        state: all weights, whole.

    Returns:
        The plain model (whose own tensors may be shards) and its merged weights, by their plain names.
    """
    from peft.tuners.lora import LoraLayer

    plain: dict[str, torch.Tensor] = {}
    base = model.get_base_model()
    for name, tensor in state.items():
        if ".lora_" in name or ".original_module." in name:
            continue
        inner = name.removeprefix("base_model.model.")
        plain[inner.replace(".base_layer.", ".").replace(".modules_to_save.default.", ".")] = tensor
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer) and "default" in layer.scaling:
            up, down = state[f"{name}.lora_B.default.weight"], state[f"{name}.lora_A.default.weight"]
            delta = (up.float() @ down.float()) * layer.scaling["default"]
            delta = delta.T if getattr(layer, "fan_in_fan_out", False) else delta
            target = f"{name.removeprefix('base_model.model.')}.weight"
            plain[target] = plain[target] + delta.to(plain[target].dtype)
    return base, plain
