"""Weights and tokenizers that are broken or of another model: `launcher check` and `launcher train` refuse each."""

import json
from collections.abc import Callable
from typing import Any

import torch

from tests.support.desk import Case, Desk, check_and

_WEIGHTS = "model/model.safetensors"
_AGAIN = "copy or download it again"
_TOGETHER = "put the files of one model together"


def _replaced(desk: Desk, name: str, content: str | bytes) -> None:
    desk.model()
    desk.file(f"model/{name}", content)


def _pickle(desk: Desk, *overrides: str) -> list[str]:
    desk.model("model.safetensors")
    desk.file("model/pytorch_model.bin", "no pickle at all")
    return [*overrides]


def _shards(desk: Desk, index: str) -> None:
    whole = (desk.bert / "model.safetensors").read_bytes()
    desk.model("model.safetensors")
    desk.file("model/model-00002-of-00002.safetensors", whole)
    desk.file("model/model.safetensors.index.json", index)


def _with(change: Callable[[dict[str, Any]], object]) -> Callable[[Desk], None]:
    return lambda desk: desk.weights(change)


def _other_weights(tensors: dict[str, Any]) -> None:
    tensors.clear()
    tensors["decoder.embed.weight"] = torch.zeros(3, 2)


WEIGHTS = [
    Case("no weights", lambda desk: desk.model("model.safetensors") and None,
         "model.name: DESK/model has no safetensors weights; a pickle can run code when loaded: convert it, or set "
         "model.allow_pickle: true if you trust it"),
    Case("a pickle", lambda desk: _pickle(desk),
         "model.name: DESK/model has no safetensors weights; a pickle can run code when loaded: convert it, or set "
         "model.allow_pickle: true if you trust it"),
    Case("a pickle that is none", lambda desk: _pickle(desk, "model.allow_pickle=true"),
         f"model.name: DESK/model/pytorch_model.bin is not a file of torch.save; {_AGAIN}"),
    Case("empty weights", lambda desk: _replaced(desk, "model.safetensors", ""),
         f"model.name: DESK/{_WEIGHTS} is not a whole safetensors file (...); {_AGAIN}"),
    Case("weights that are cut off",
         lambda desk: _replaced(desk, "model.safetensors", (desk.bert / "model.safetensors").read_bytes()[:-5000]),
         f"model.name: DESK/{_WEIGHTS} is not a whole safetensors file (...); {_AGAIN}"),
    Case("weights that are noise", lambda desk: _replaced(desk, "model.safetensors", b"\xff" * 1000),
         f"model.name: DESK/{_WEIGHTS} is not a whole safetensors file (Error while deserializing header: header too "
         f"large); {_AGAIN}"),
    Case("a pointer of Git LFS",
         lambda desk: _replaced(desk, "model.safetensors", "version https://git-lfs.github.com/spec/v1\nsize 5\n"),
         f"model.name: DESK/{_WEIGHTS} is a pointer of Git LFS, not the weights; fetch them with `git lfs pull`"),
    Case("a directory where the weights were",
         lambda desk: (desk.model("model.safetensors") / "model.safetensors").mkdir(),
         f"model.name: DESK/{_WEIGHTS} cannot be read (Is a directory); {_AGAIN}"),
    Case("a link to weights that are gone",
         lambda desk: (desk.model("model.safetensors") / "model.safetensors").symlink_to("blobs/1"),
         f"model.name: DESK/{_WEIGHTS} cannot be read (No such file or directory); {_AGAIN}"),
    Case("a shard that is missing",
         lambda desk: _shards(desk, json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}})),
         "model.name: DESK/model/model-00001-of-00002.safetensors is missing, but model.safetensors.index.json names "
         f"it; {_AGAIN}"),
    Case("an index that is torn", lambda desk: _shards(desk, '{"weight_map":'),
         f"model.name: DESK/model/model.safetensors.index.json names no weights (...); {_AGAIN}"),
    Case("weights of another model", _with(_other_weights),
         "model.name: the weights of DESK/model are not those of the bert that its config.json describes (they hold "
         f"decoder.embed.weight, not bert.embeddings.word_embeddings.weight); {_TOGETHER}"),
    Case("weights of another size", lambda desk: desk.config(hidden_size=64),
         "model.name: bert.embeddings.word_embeddings.weight is 204 x 32 in the weights of DESK/model, but 204 x 64 by "
         f"its config.json; {_TOGETHER}"),
    Case("the head of other classes", _with(lambda tensors: tensors.update({"classifier.weight": torch.zeros(5, 32)})),
         "model.name: classifier.weight is 5 x 32 in the weights of DESK/model, but 2 x 32 by its config.json and the "
         "task's classes; start from the model without this head, or give the classes it has"),
    Case("more layers than there are weights for", lambda desk: desk.config(num_hidden_layers=5),
         "model.name: the weights of DESK/model have nothing for bert.encoder.layer.2.attention.self.query.weight, "
         f"which its config.json asks for; {_TOGETHER}"),
    Case("no tokenizer", lambda desk: desk.model("tokenizer.json", "tokenizer_config.json") and None,
         "model.name: DESK/model has no tokenizer; put its files (tokenizer.json) next to the weights"),
    Case("a tokenizer that is torn", lambda desk: _replaced(desk, "tokenizer.json", "{"),
         "model.name: the tokenizer of DESK/model cannot be loaded (Expecting property name enclosed in double quotes: "
         "line 1 column 2 (char 1)); copy its files again"),
    Case("a tokenizer of another kind", lambda desk: _replaced(desk, "tokenizer.json", '{"words": []}'),
         "model.name: the tokenizer of DESK/model cannot be loaded (KeyError: 'added_tokens'); copy its files again"),
    Case("a tokenizer with more words than the model",
         lambda desk: desk.config(vocab_size=50) or desk.weights(lambda tensors: tensors.update(
             {name: tensor[:50] for name, tensor in tensors.items() if "word_embeddings" in name})),
         "model.name: the tokenizer of DESK/model knows 204 tokens, but its model only 50; put the files of one model "
         "together"),
]  # fmt: skip


@check_and("train", WEIGHTS)
def test_broken_weights_are_refused(command: str, case: Case, desk: Desk) -> None:
    desk.refuses_case(command, case)
