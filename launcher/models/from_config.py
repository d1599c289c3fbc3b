"""Models to train from scratch (`model.from_config`): a directory like a hub's, without the weights. Runs on the head.

Creates the configuration, and a tokenizer trained on the training data or an image processor. The weights are drawn
from the job's seed in each train worker (`pretrained.load_model`).
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from launcher.errors import ModelError
from launcher.models.chat import CHATML
from launcher.models.pretrained import load_image_processor, load_tokenizer
from launcher.spec.model import ModelSpec

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, PreTrainedTokenizerBase

VERSION = 1
"""Version of what this module writes, part of the cache key. Increase it when the same settings give other files."""

# Covers the frequent words of one language, and is trained in seconds.
_VOCABULARY_SIZE = 8192
_IMAGE_SIDE = 224


def create_base_model(
    spec: ModelSpec, kind: Literal["encoder", "decoder", "image"], values: Iterable[object], folder: Path
) -> None:
    """Write the configuration and the tokenizer or image processor of a new model.

    Args:
        spec: Model section with a `from_config`. Its `name`, if any, is the model to copy the processor from.
        kind: Processor that the task needs: tokenizer of an encoder or decoder, or image processor.
        values: Cells of the input columns; their strings train the tokenizer.
        folder: Directory to write to; must not exist.

    Raises:
        ModelError: transformers has no such model type, or refuses its settings.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    settings: dict[str, object] = dict(spec.from_config or {})
    model_type = str(settings.pop("model_type"))
    if kind == "image":
        side = _positive_int(settings, "image_size", _IMAGE_SIDE)
        channels = _positive_int(settings, "num_channels", 3)
        processor = load_image_processor(spec) if spec.name else _image_processor(side, channels)
        processor.save_pretrained(folder)
    else:
        size = _positive_int(settings, "vocab_size", _VOCABULARY_SIZE)
        tokenizer = load_tokenizer(spec) if spec.name else _train_tokenizer(kind, size, _strings(values))
        tokenizer.save_pretrained(folder)
        # After training: on little data a tokenizer has fewer tokens than it was asked for.
        settings |= {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
        settings |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    try:
        AutoConfig.for_model(model_type, **settings).save_pretrained(folder)
    except (ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"model.from_config: {model_type} refuses its settings ({reason}); fix its keys") from error


def _positive_int(settings: dict[str, object], key: str, default: int) -> int:
    value = settings.get(key, default)
    if not isinstance(value, int) or value < 1:
        raise ModelError(f"model.from_config: {key} is {value}, which is not a whole number of at least 1; fix it")
    return value


def _strings(value: object) -> Iterator[str]:
    """Yield all strings in cells, lists and structs."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _strings(part)
    elif isinstance(value, Iterable) and not isinstance(value, bytes):
        for part in value:
            yield from _strings(part)


def _train_tokenizer(kind: str, size: int, texts: Iterator[str]) -> "PreTrainedTokenizerBase":
    """Train a byte-level BPE (Sennrich et al. 2016, arXiv:1508.07909; Radford et al. 2019), which knows any text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    names = {
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    }
    if kind == "decoder":
        names = {"eos_token": "<|endoftext|>", "pad_token": "<|pad|>"}
    # Tokens of their own, or each mark of a turn would be spelled in several.
    chatml_tokens = ["<|im_start|>", "<|im_end|>"] if kind == "decoder" else []
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=kind == "encoder")
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[*names.values(), *chatml_tokens], show_progress=False,
        # `alphabet` has a random order, and token ids must be a function of the texts.
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    core.train_from_iterator(texts, trainer)
    if kind == "encoder":
        ends = [(name, core.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
        core.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **names, additional_special_tokens=chatml_tokens)
    if kind == "decoder":
        tokenizer.chat_template = CHATML
    return tokenizer


def _image_processor(side: int, channels: int) -> "BaseImageProcessor":
    # The Pillow backend, as in `load_image_processor`: the same pixels on any machine.
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    half = [0.5] * channels
    return ViTImageProcessorPil(size={"height": side, "width": side}, image_mean=half, image_std=half)
