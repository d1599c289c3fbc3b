"""The model of a new job, from its directory's JSON files alone."""

import json
from pathlib import Path

import pytest

from launcher.errors import ModelError
from launcher.init.guess import UserChoices, guess
from launcher.init.pretrained import Model, default_model, find_model
from tests.support import toy_data
from tests.support.toy_data import look_at


@pytest.mark.parametrize(
    ("table", "model"),
    [
        (toy_data.SINGLE, "bert-base-uncased"),
        (toy_data.TAGS, "bert-base-cased"),
        (toy_data.TEXTS, "gpt2"),
        (toy_data.MESSAGES, "HuggingFaceTB/SmolLM2-360M-Instruct"),
        (toy_data.PROMPTS, "HuggingFaceTB/SmolLM2-360M-Instruct"),
        (toy_data.IMAGES, "google/vit-base-patch16-224-in21k"),
        (
            toy_data.PAIR.set_column(0, "premise", [["这个酒店不错，很好"] * toy_data.ROWS]),
            "bert-base-multilingual-cased",
        ),
        (
            toy_data.TEXTS.set_column(1, "text", [["Это хороший день, и он длинный"] * toy_data.ROWS]),
            "Qwen/Qwen2.5-0.5B",
        ),
    ],
)
def test_defaults(table: object, model: str, tmp_path: Path) -> None:
    assert default_model(guess(look_at(table, tmp_path), UserChoices())).name == model


def test_a_directory_tells(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    gpt, bert = tiny_models["causal-lm"], tiny_models["text-classification"]
    assert find_model(str(gpt)) == Model(str(gpt), "as asked", 64, True)
    assert find_model(str(bert)) == Model(str(bert), "as asked", 64, False)
    (tmp_path / "config.json").write_text(json.dumps({"n_positions": 1024}))
    assert find_model(str(tmp_path)).positions == 1024


def test_names_on_the_hub() -> None:
    assert find_model("org/model-Instruct").has_template and not find_model("gpt2").has_template


def test_no_model(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name, said in (
        (f"{tmp_path}/no", "there is no such directory; give one that exists, or a hub name"),
        (f"{tmp_path}/file", "is a file; give the directory it is in, or a hub name"),
        (str(tmp_path), "holds no model (it has no config.json); give a directory that has"),
    ):
        with pytest.raises(ModelError) as caught:
            find_model(name)
        assert caught.value.message == f"--model {name}: {said}"
