"""LoRA adapters (Hu et al. 2021, arXiv:2106.09685) by peft: added to a model, and saved or merged for the export.

Runs in train workers, and on the head where memory is measured on a meta model.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from launcher.errors import ModelError
from launcher.spec.model import ModelSpec

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel

# Task types whose head peft trains in full, next to the adapters.
_HEADS = {
    "AutoModelForSequenceClassification": "SEQ_CLS",
    "AutoModelForTokenClassification": "TOKEN_CLS",
    "AutoModelForCausalLM": "CAUSAL_LM",
    "AutoModelForSeq2SeqLM": "SEQ_2_SEQ_LM",
}

# Names of heads in transformers: they are trained in full, so they get no adapters.
_HEAD_LAYERS = ["classifier", "score"]


def add_adapters(model: "PreTrainedModel", auto_model: str, spec: ModelSpec, seed: int) -> "PeftModel":
    """Return the model with trainable adapters; all of its own weights except the head's are frozen.

    Args:
        model: Model with the task's head.
        auto_model: Name of its Auto class, which says what the head is.
        spec: Model section with a `lora`.
        seed: Seed of the initial values; the global random state is left as it was.

    Raises:
        ModelError: No layer has one of the names of `target_modules`.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    assert spec.lora is not None
    lora = spec.lora
    config = LoraConfig(
        task_type=_HEADS.get(auto_model),
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # declared as int; peft only divides it
        lora_dropout=lora.dropout,
        target_modules="all-linear" if lora.target_modules is None else list(lora.target_modules),
        # peft leaves out the output layer of a language model by itself. peft 0.21 warns where an excluded name does
        # not exist, so a language model, which has neither name, excludes none.
        exclude_modules=None if auto_model.endswith("LM") else _HEAD_LAYERS,
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


def save_adapters(model: "PeftModel", state: "dict[str, torch.Tensor]", folder: Path) -> None:
    """Save the adapters and the head without the base model, for `PeftModel.from_pretrained`.

    Args:
        model: Model with adapters; its own weights may be shards.
        state: All weights by name, gathered.
        folder: Directory to write to.
    """
    model.save_pretrained(str(folder), state_dict=state)


def merge_adapters(
    model: "PeftModel", state: "dict[str, torch.Tensor]"
) -> "tuple[torch.nn.Module, dict[str, torch.Tensor]]":
    """Merge the adapters into the weights of the base model, in fp32: W + scaling * B A.

    peft's own `merge_and_unload` works on the parameters of the model, which are shards under ZeRO-3.

    Args:
        model: Model with adapters, which has their scales; it is not changed.
        state: All weights by name, gathered.

    Returns:
        Base model (its own parameters may be shards) and its merged weights by their plain names.
    """
    from peft.tuners.lora import LoraLayer

    plain: dict[str, torch.Tensor] = {}
    base = model.get_base_model()
    for name, tensor in state.items():
        # `original_module` is the head as it was before training; merging it would undo what the head learned.
        if ".lora_" in name or ".original_module." in name:
            continue
        # Names of peft 0.21: `base_layer` is a layer with adapters, `modules_to_save` the trained copy of the head.
        inner = name.removeprefix("base_model.model.")
        plain[inner.replace(".base_layer.", ".").replace(".modules_to_save.default.", ".")] = tensor
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer) and "default" in layer.scaling:
            up, down = state[f"{name}.lora_B.default.weight"], state[f"{name}.lora_A.default.weight"]
            # The product in fp32, even if the weights are not.
            delta = (up.float() @ down.float()) * layer.scaling["default"]
            # GPT-2's Conv1D stores its weight as (in, out).
            delta = delta.T if getattr(layer, "fan_in_fan_out", False) else delta
            target = f"{name.removeprefix('base_model.model.')}.weight"
            plain[target] = plain[target] + delta.to(plain[target].dtype)
    return base, plain
