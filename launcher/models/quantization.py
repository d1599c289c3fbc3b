"""Frozen weights of 4 bits (NF4 of QLoRA, arXiv:2305.14314) by bitsandbytes: which layers, and back to floats.

Runs in train workers, and on the head where memory is estimated on a meta model. bitsandbytes is an optional dependency
(`driver/prepare.py` checks that it is installed), so it is imported by transformers and here only where it is used.
"""

from typing import TYPE_CHECKING, Any  # layers of bitsandbytes, which may not be installed

import torch

from launcher.models.weights import OPTIONAL_PARTS

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PreTrainedModel

_BLOCK = 64
BYTES_PER_WEIGHT = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes of a weight: 4 bits, a scale of 8 bits for 64 weights, and a scale of those in fp32 for 256 of them."""


def quantized_layers(model: "PreTrainedModel") -> list[str]:
    """Return the names of the layers that are quantized: the linear ones of the pretrained body.

    Not the output layer, whose errors would reach every token, nor layers that the weights may lack, which are trained,
    nor layers whose inputs are not whole blocks of 64: bitsandbytes 0.50 confuses their scales on a CPU.

    Args:
        model: Model on any device, meta too, before it is quantized.
    """
    from transformers.pytorch_utils import Conv1D

    prefix = f"{model.base_model_prefix}."
    has_body = any(name.startswith(prefix) for name, _ in model.named_modules())
    output = model.get_output_embeddings()
    # Layers that transformers keeps in fp32 for their range, such as T5's `wo`.
    in_fp32 = tuple(getattr(model, "_keep_in_fp32_modules", None) or ())
    return [
        name
        for name, module in model.named_modules()
        if (isinstance(module, Conv1D) or type(module) is torch.nn.Linear)
        and module is not output
        and (name.startswith(prefix) or not has_body)
        and not name.endswith(in_fp32 or ("\0",))
        and OPTIONAL_PARTS.isdisjoint(name.split("."))
        and module.weight.shape[0 if isinstance(module, Conv1D) else 1] % _BLOCK == 0
    ]


def nf4_config(model: "PreTrainedModel") -> "BitsAndBytesConfig":
    """Return the configuration with which transformers quantizes the layers of `quantized_layers` as it loads them.

    Args:
        model: Model without storage (`pretrained.without_weights`).
    """
    from transformers import BitsAndBytesConfig
    from transformers.pytorch_utils import Conv1D

    quantized = set(quantized_layers(model))
    linear = [name for name, module in model.named_modules() if isinstance(module, Conv1D | torch.nn.Linear)]
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        llm_int8_skip_modules=[name for name in linear if name not in quantized],
    )


def finish_loading(model: "PreTrainedModel") -> None:
    """Remove what transformers notes about the quantization, in place; the layers stay quantized.

    Otherwise the exported config would announce weights of 4 bits, and `to` of the model would raise.
    """
    module: Any
    for module in model.modules():
        if is_quantized(getattr(module, "weight", None)):
            # Trap, bitsandbytes 0.50 (nn/modules.py, Linear4bit.forward): on a CPU with AVX-512 the first evaluation
            # would pack the weights for its kernel and round their scales to bf16, and training would go on with that.
            module.support_avx512bf16_for_cpu = False
    quantizer: Any = model.hf_quantizer
    quantizer.remove_quantization_config(model)
    # A map of one device, for which accelerate adds no hooks; `save_pretrained` would take "cpu" for offloading.
    if hasattr(model, "hf_device_map"):
        del model.hf_device_map


def set_compute_dtype(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Set the dtype in which quantized layers multiply: that of the training."""
    module: Any
    for module in model.modules():
        if is_quantized(getattr(module, "weight", None)):
            module.compute_dtype = dtype


def is_quantized(weight: object) -> bool:
    """Return True if a weight is one of bitsandbytes in 4 bits."""
    # By name: bitsandbytes may not be installed.
    return type(weight).__name__ == "Params4bit"


def dequantize(layer: Any) -> torch.Tensor:
    """Return the weight of a quantized layer in fp32, in the shape that its class had before."""
    from bitsandbytes.functional import dequantize_4bit
    from transformers.pytorch_utils import Conv1D

    weight: torch.Tensor = dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    # transformers transposes the weights of GPT-2's Conv1D before it quantizes them (integrations/bitsandbytes.py).
    return weight.T.contiguous() if issubclass(layer.source_cls, Conv1D) else weight
