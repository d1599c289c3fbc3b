"""Real data sets: the right task and columns, or a sentence that says there is no task for them."""

from pathlib import Path

import pytest

from launcher.errors import DataError
from launcher.init.guess import UserChoices, guess
from launcher.init.order import open_training


@pytest.mark.parametrize(
    ("name", "task", "form", "columns"),
    [
        ("text-classification/sst2", "text-classification", "single-label", ["text", "label"]),
        ("text-classification/chnsenticorp", "text-classification", "single-label", ["text", "label"]),
        ("biology/splice_junctions", "text-classification", "single-label", ["sequence", "label"]),
        ("token-classification/wnut17", "token-classification", "words", ["tokens", "ner_tags"]),
        ("instruction-sft/alpaca_en", "causal-lm", "messages", ["messages"]),
        ("instruction-sft/glaive_toolcall_en", "causal-lm", "messages", ["messages"]),
        ("causal-lm/c4_demo", "causal-lm", "text", ["text"]),
        ("causal-lm/tinyshakespeare", "causal-lm", "text", ["text"]),
        ("image-classification/mnist_10k", "image-classification", "single-label", ["image", "label"]),
        ("image-classification/sklearn_digits", "image-classification", "single-label", ["image", "label"]),
        ("face-recognition/orl_faces", "image-classification", "single-label", ["image", "identity"]),
    ],
)
def test_tasks_and_columns(name: str, task: str, form: str, columns: list[str], shared: Path) -> None:
    data = open_training(str(shared / "data" / name), {})
    found = guess(data.profile, UserChoices())
    seen = [column.name for column in (*found.inputs, *([found.label] if found.label else []))]
    assert (found.task, found.form, seen) == (task, form, columns)
    assert set(data.found.locations) == {"train", "validation", "test"}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("translation/multi30k_en_de", "columns en and de are translations"),
        ("audio/fsdd", "column audio holds audio"),
        ("audio/emodb_4emotions", "column audio holds audio"),
        ("object-detection/bccd", "column objects holds boxes (object detection)"),
        ("semantic-segmentation/camvid", "columns image and mask are pictures and masks"),
        ("question-answering/xquad_en", "column answers marks answers in a context"),
        ("preference/dpo_en", "columns chosen and rejected are preferences"),
        ("preference/kto_en", "columns prompt and completion are judged answers"),
        ("face-recognition/orl_pairs", "columns image_a and image_b both hold pictures"),
        ("tabular/credit_data", "numbers and categories, and the launcher has no task for tables"),
        ("tabular/brca", "numbers and categories, and the launcher has no task for tables"),
        ("recommender/movielens_100k_latest", "numbers and categories, and the launcher has no task for tables"),
    ],
)
def test_other_tasks_are_named(name: str, said: str, shared: Path) -> None:
    with pytest.raises(DataError) as caught:
        guess(open_training(str(shared / "data" / name), {}).profile, UserChoices())
    assert said in caught.value.message and "--task" in caught.value.message
