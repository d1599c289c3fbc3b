"""Models and data of the GPU checks, made from a seed in seconds: nothing of them travels. Runs on the client.

Words are `w0`, `w1`, ...; each text counts on from a random word, so that a model learns it in a few steps. Lengths are
log-normal, as those of instructions and answers are: many short ones and a long tail.
"""

import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

TEXTS, LONG_TEXTS, PICTURES = "texts.parquet", "long-texts.parquet", "pictures.parquet"
SMALL, LARGE, BERT, VIT = "small-llama", "llama", "bert", "vit"
_SPECIAL = ("<pad>", "<end>", "<unk>")


@dataclass(frozen=True)
class Scale:
    """Sizes of one kind of machine.

    Args:
        rows: Texts in the training data.
        median_length: Median number of words of a text.
        max_length: Most words of a text, and the length of a packed sequence.
        vocabulary: Words that the large model knows.
        hidden: Width of the large model.
        layers: Layers of the large model.
        pictures: Pictures in the training data.
        side: Height and width of a picture, pixels.
    """

    rows: int
    median_length: int
    max_length: int
    vocabulary: int
    hidden: int
    layers: int
    pictures: int
    side: int


GPU = Scale(16_384, 120, 1024, 32_000, 768, 12, 6_144, 256)
CPU = Scale(1_024, 14, 64, 512, 64, 2, 256, 64)


def make_workload(folder: Path, scale: Scale) -> None:
    """Write all models and data below `folder`, unless they are there."""
    ready = folder / "ready.json"
    wanted = json.dumps(scale.__dict__)
    if ready.is_file() and ready.read_text(encoding="utf-8") == wanted:
        return
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    lengths = np.exp(rng.normal(np.log(scale.median_length), 0.8, scale.rows)).astype(int)
    write_texts(folder / TEXTS, lengths.clip(4, scale.max_length), rng)
    write_texts(folder / LONG_TEXTS, np.full(scale.rows // 16, scale.max_length), rng)
    write_pictures(folder / PICTURES, scale, rng)
    small = min(256, scale.hidden), max(2, scale.layers // 3), min(4_096, scale.vocabulary)
    make_llama(folder / SMALL, *small, scale.max_length)
    make_llama(folder / LARGE, scale.hidden, scale.layers, scale.vocabulary, scale.max_length)
    make_bert(folder / BERT, scale)
    make_vit(folder / VIT, scale)
    ready.write_text(wanted, encoding="utf-8")


def write_texts(path: Path, lengths: np.ndarray, rng: np.random.Generator) -> None:
    """Write texts of the given numbers of words.

    Args:
        path: Parquet file to write.
        lengths: Number of words of each text, (rows,).
        rng: Source of the first words.
    """
    words = np.array([f"w{number}" for number in range(256)])
    first = rng.integers(0, len(words), len(lengths))
    texts = [" ".join(words[(begin + np.arange(n)) % len(words)]) for begin, n in zip(first, lengths, strict=True)]
    table = pa.table({"text": texts, "label": np.where(first % 2, "odd", "even").tolist()})
    pq.write_table(table, path, row_group_size=512)


def write_pictures(path: Path, scale: Scale, rng: np.random.Generator) -> None:
    """Write JPEG files of smooth noise with two classes, which cost as much to decode as photographs do."""
    from PIL import Image

    cells, labels = [], []
    for number in range(scale.pictures):
        coarse = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((scale.side, scale.side), Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        picture.save(buffer, format="JPEG", quality=90)
        cells.append({"bytes": buffer.getvalue(), "path": f"{number}.jpg"})
        labels.append("light" if coarse.mean() > 127.5 else "dark")
    pq.write_table(pa.table({"image": cells, "label": labels}), path, row_group_size=256)


def mean_words(path: Path) -> float:
    """Return the mean number of words of the texts in a file."""
    texts = pq.read_table(path, columns=["text"]).column("text").to_pylist()
    return sum(text.count(" ") + 1 for text in texts) / len(texts)


def make_llama(folder: Path, hidden: int, layers: int, vocabulary: int, max_length: int) -> None:
    """Save a Llama with random weights and a tokenizer of words."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=8 * hidden // 3 // 32 * 32,
        num_hidden_layers=layers,
        num_attention_heads=max(2, hidden // 64),
        max_position_embeddings=max_length,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    save_tokenizer(folder, vocabulary)


def make_bert(folder: Path, scale: Scale) -> None:
    """Save a BERT of BERT-base's width on a GPU, with dropout and random weights, and a tokenizer of words."""
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=scale.vocabulary,
        hidden_size=scale.hidden,
        num_hidden_layers=scale.layers,
        num_attention_heads=max(2, scale.hidden // 64),
        intermediate_size=4 * scale.hidden,
        max_position_embeddings=scale.max_length,
    )
    BertModel(config).save_pretrained(folder)
    save_tokenizer(folder, scale.vocabulary)


def make_vit(folder: Path, scale: Scale) -> None:
    """Save a ViT with random weights: ViT-S/16 on a GPU."""
    import torch
    from transformers import ViTConfig, ViTModel
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    torch.manual_seed(0)
    small = scale.hidden < 384
    side = 32 if small else 224
    config = ViTConfig(
        image_size=side,
        patch_size=8 if small else 16,
        hidden_size=scale.hidden if small else 384,
        num_hidden_layers=scale.layers,
        num_attention_heads=2 if small else 6,
        intermediate_size=128 if small else 1536,
    )
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": side, "width": side}).save_pretrained(folder)


def save_tokenizer(folder: Path, vocabulary: int) -> None:
    """Save a tokenizer that splits at spaces."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*_SPECIAL, *(f"w{number}" for number in range(vocabulary - len(_SPECIAL)))]
    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<end>", unk_token="<unk>"
    ).save_pretrained(folder)


def with_attention(folder: Path, implementation: str) -> Path:
    """Return a copy of a model directory whose configuration asks for another attention; weights are linked."""
    copy = folder.with_name(f"{folder.name}-{implementation}")
    copy.mkdir(exist_ok=True)
    for file in folder.iterdir():
        target = copy / file.name
        if file.name != "config.json" and not target.exists():
            target.symlink_to(file)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["attn_implementation"] = implementation
    (copy / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return copy
