"""Encoder-decoder models: tokenizers of language pairs, the tokens that begin and end a target, and generation.

Runs in data workers (tokens), train workers and predict workers (generation). `tasks/seq2seq.py` calls it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from launcher.errors import ModelError
from launcher.models.chat import IGNORED
from launcher.models.generate import is_sharded
from launcher.models.pretrained import load_config, load_tokenizer
from launcher.spec.model import ModelSpec

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class DecoderTokens:
    """Tokens that frame a target.

    Args:
        start: Token that the decoder reads first.
        pad: Padding token.
        end: Token that ends a target.
        language: Token that begins a target in its language (NLLB, mBART-50, M2M-100), or None.
        adds_end: True if the tokenizer does not end a text by itself.
        repeats_start: True if the tokenizer begins a text with the start token.
    """

    start: int
    pad: int
    end: int
    language: int | None
    adds_end: bool
    repeats_start: bool


class PairTokenizer:
    """Tokenizer of sources and targets.

    Args:
        spec: Model section of the job.
        source_lang: Language of the sources as the tokenizer names it (`en_XX`, `eng_Latn`); None for models that mark
            no languages.
        target_lang: Language of the targets.

    Raises:
        ModelError: The tokenizer or the configuration of the model lacks something that a target needs.
    """

    def __init__(self, spec: ModelSpec, source_lang: str | None, target_lang: str | None) -> None:
        self.tokenizer = _load_tokenizer(spec, source_lang, target_lang)
        self.tokens = _decoder_tokens(spec, self.tokenizer, target_lang is not None)

    def source_ids(self, texts: Sequence[str], size: int | None) -> list[list[int]]:
        """Return the tokens of sources, cut to a size; None does not cut."""
        return self._ids(size, text=list(texts))

    def target_ids(self, texts: Sequence[str], size: int | None) -> list[list[int]]:
        """Return the tokens of targets with an end, cut to a size; None does not cut."""
        end = [self.tokens.end] * self.tokens.adds_end
        # Two BERTs would learn to write [CLS] after [CLS], which the decoder reads anyway, and soon write nothing else.
        begin = int(self.tokens.repeats_start)
        # A target that is cut keeps the end, as in the recipes of transformers: the tokenizer cuts between its marks.
        ids = self._ids(None if size is None else size - len(end) + begin, text_target=list(texts))
        return [row[begin:] + end for row in ids]

    def _ids(self, size: int | None, **texts: list[str]) -> list[list[int]]:
        # A tokenizer refuses an empty batch.
        if not any(texts.values()):
            return []
        limits = {} if size is None else {"truncation": True, "max_length": size}
        ids: list[list[int]] = self.tokenizer(**texts, **limits, return_attention_mask=False)["input_ids"]
        return ids

    def decoder_input_ids(self, labels: "torch.Tensor") -> "torch.Tensor":
        """Return what the decoder reads to predict labels (B, T): the start token, and all labels but the last."""
        shifted = labels.new_full(labels.shape, self.tokens.start)
        # Padding at the end needs no mask, as causal attention never reaches it.
        shifted[:, 1:] = labels[:, :-1].masked_fill(labels[:, :-1] == IGNORED, self.tokens.pad)
        return shifted

    def texts(self, generated: "torch.Tensor") -> list[str | None]:
        """Return the texts of `generate_targets`; None for rows that were not generated."""
        texts = self.tokenizer.batch_decode(generated.clamp(min=0), skip_special_tokens=True)
        return [
            None if first == IGNORED else text.strip()
            for first, text in zip(generated[:, 0].tolist(), texts, strict=True)
        ]


def _load_tokenizer(spec: ModelSpec, source_lang: str | None, target_lang: str | None) -> "PreTrainedTokenizerBase":
    """Load the tokenizer, set to two languages where it marks them."""
    tokenizer = load_tokenizer(spec)
    has_languages = hasattr(tokenizer, "src_lang") and hasattr(tokenizer, "tgt_lang")
    for key, attribute, name in (("source", "src_lang", source_lang), ("target", "tgt_lang", target_lang)):
        if name is None and has_languages:
            raise ModelError(
                f"task.{key}_lang: {spec.name} has several languages, and none is named; name it as its tokenizer "
                "does, such as en_XX or eng_Latn"
            )
        if name is None:
            continue
        if not has_languages:
            raise ModelError(f"task.{key}_lang: {name}, but the tokenizer of {spec.name} marks no languages; drop it")
        try:
            setattr(tokenizer, attribute, name)
            marks = tokenizer(text_target="") if key == "target" else tokenizer("")
        except KeyError:
            marks = {"input_ids": [tokenizer.unk_token_id]}
        # Tokenizers of NLLB and mBART map an unknown language to the unknown token, those of M2M-100 raise.
        if tokenizer.unk_token_id in marks["input_ids"]:
            raise ModelError(
                f"task.{key}_lang: {name} is no language of the tokenizer of {spec.name}; name one as it does, such as "
                "en_XX or eng_Latn"
            )
    return tokenizer


def _decoder_tokens(spec: ModelSpec, tokenizer: "PreTrainedTokenizerBase", has_language: bool) -> DecoderTokens:
    """Return the tokens that frame a target; `has_language` if targets are marked with their language."""
    config = load_config(spec)
    marks = list(tokenizer(text_target="")["input_ids"])
    ends = [token for token in (tokenizer.eos_token_id, tokenizer.sep_token_id) if token is not None]
    # The one that the tokenizer writes itself, if it has both.
    end = next((token for token in ends if token in marks), ends[0] if ends else None)
    if end is None or tokenizer.pad_token_id is None:
        what = "end" if end is None else "pad"
        raise ModelError(
            f"model.name: the tokenizer of {spec.name} has no token to {what} a text with, so a target would have no "
            f"{what}; give its {'eos_token' if end is None else 'pad_token'} in tokenizer_config.json"
        )
    language = next((token for token in marks if token != end), None) if has_language else None
    # mBART (cc25) writes the language behind the end and starts from it; the others write it first.
    is_start = language is not None and marks[-1] == language
    starts = (
        language if is_start else None,
        getattr(config, "decoder_start_token_id", None),
        getattr(config, "bos_token_id", None),
        tokenizer.bos_token_id,
        # Two BERTs as one model: the way of transformers' own example for `EncoderDecoderModel`.
        tokenizer.cls_token_id,
    )
    start = next((token for token in starts if token is not None), None)
    if start is None:
        raise ModelError(
            f"model.name: {spec.name} has neither a decoder_start_token_id nor a bos_token_id, so its decoder has no "
            "token to start from; set decoder_start_token_id in its config.json"
        )
    pad = getattr(config, "pad_token_id", None)
    return DecoderTokens(
        start=start,
        pad=tokenizer.pad_token_id if pad is None else pad,
        end=end,
        language=None if is_start else language,
        adds_end=end not in marks,
        repeats_start=marks[:1] == [start],
    )


def set_generation(model: "PreTrainedModel", tokens: DecoderTokens, num_beams: int, max_new_tokens: int) -> None:
    """Set how a model generates: the export then generates alike by `model.generate(**inputs)`.

    Args:
        model: Model whose generation config is changed in place.
        tokens: Tokens that frame a target.
        num_beams: Beams of the search; 1 takes the most likely token.
        max_new_tokens: Limit of tokens of a generated text.
    """
    config = model.generation_config
    assert config is not None
    # Lengths are learned from the new targets: a summariser's `min_length` of 56 would pad each title with words. Other
    # settings of the pretrained model stay, such as Marian's `bad_words_ids`, without which it writes padding.
    config.update(max_length=None, min_length=0, max_new_tokens=max_new_tokens, do_sample=False, num_beams=num_beams)
    config.update(decoder_start_token_id=tokens.start, pad_token_id=tokens.pad, eos_token_id=tokens.end)
    if tokens.language is not None:
        config.update(forced_bos_token_id=tokens.language)
    # transformers 5.23 refuses to save what has no effect (`GenerationConfig.validate`).
    config.update(temperature=None, top_p=None, top_k=None)
    if num_beams == 1:
        config.update(early_stopping=False, length_penalty=1.0)
    # The default of BART's configuration is a word of another vocabulary.
    if config.forced_eos_token_id not in (None, tokens.end):
        config.update(forced_eos_token_id=tokens.end)


def generate_targets(
    model: "torch.nn.Module", inputs: "Mapping[str, torch.Tensor | bool]", chosen: Sequence[int]
) -> "torch.Tensor":
    """Generate the targets of some rows of a micro-batch, as `set_generation` says. Collective under ZeRO-3.

    Args:
        model: Model in eval mode, or DeepSpeed's engine around it.
        inputs: Inputs of the model: `input_ids` and `attention_mask`, int64 (B, S).
        chosen: Positions of the rows to generate.

    Returns:
        Token ids without the start token, padded at the end, int64 (B, G); -100 in rows that are not generated.
    """
    import torch
    import torch.distributed as dist

    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    assert isinstance(ids, torch.Tensor) and isinstance(mask, torch.Tensor)
    rows = list(chosen)
    sharded = is_sharded(model)
    if sharded:
        # A rank without rows to generate runs along with a row that is dropped: each forward pass gathers weights.
        # A host-device sync, as is each token of `synced_gpus`.
        any_rows = torch.tensor([float(bool(rows))], device=ids.device)
        dist.all_reduce(any_rows, dist.ReduceOp.MAX)
        rows = rows or [0] * int(any_rows.item())
    if not rows:
        return ids.new_full((len(ids), 1), IGNORED)
    # Not DeepSpeed's: `generate` of the engine is that of the model inside it, whose hooks gather weights.
    sequences = model.generate(input_ids=ids[rows], attention_mask=mask[rows], synced_gpus=sharded)[:, 1:]  # type: ignore[operator]  # hidden by torch.nn.Module.__getattr__
    generated = ids.new_full((len(ids), max(1, sequences.shape[1])), IGNORED)
    if chosen:
        generated[rows, : sequences.shape[1]] = sequences
    return generated
