"""Padding with a tokenizer that has no padding token."""

import json
from pathlib import Path

import pyarrow as pa
import torch

from launcher.models.pretrained import load_tokenizer
from launcher.spec.model import ModelSpec
from launcher.tasks.text_classification import TextClassification, TextParams
from tests.support.tiny_models import make_tiny_gpt


def _without_padding(folder: Path) -> Path:
    """Make a GPT-2 whose token 0 is a word, as the `!` of the real one is."""
    make_tiny_gpt(folder)
    for name, drop in (("tokenizer_config.json", ("pad_token",)), ("config.json", ("pad_token_id",))):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({key: v for key, v in content.items() if key not in drop}))
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "<pad>"]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def test_padding_does_not_hide_a_last_word_with_token_0(tmp_path: Path) -> None:
    """Compare scores of a text that ends with token 0: alone, in a batch with a longer text, and without that token."""
    spec = ModelSpec(name=str(_without_padding(tmp_path / "gpt")), dropout=0.0)
    assert load_tokenizer(spec).pad_token == "<end>"
    task = TextClassification(TextParams(labels=("a", "b"), max_length=16), spec, 0)
    model = task.build_model().eval()

    def scores(*texts: str) -> torch.Tensor:
        encoded = task.encode(pa.table({"text": list(texts), "label": ["a"] * len(texts)}), True)
        with torch.no_grad():
            return model(**task.collate(encoded.samples).inputs).logits

    alone, in_batch, without = scores("w5 <pad>")[0], scores("w1 w2 w3 w4", "w5 <pad>")[1], scores("w5")[0]
    assert torch.allclose(alone, in_batch, atol=1e-6) and not torch.allclose(alone, without, atol=1e-4)
