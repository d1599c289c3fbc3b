"""Data of tasks that the launcher does not have is named, and no job of nonsense is made of it."""

from pathlib import Path

import pyarrow as pa
import pytest

from launcher.errors import DataError
from launcher.init.guess import UserChoices, guess
from launcher.init.refuse import unsupported_reason
from tests.support import toy_data
from tests.support.toy_data import ROWS, chats, cycle, look_at, picture, words

_PICTURES = [picture(i) for i in range(ROWS)]
_SOUND = b"RIFF\x00\x00\x00\x00WAVEfmt "


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"audio": [_SOUND] * ROWS, "text": words(), "label": cycle(0, 1)}, "column audio holds audio"),
        (
            {"prompt": words(), "chosen": words(seed=1), "rejected": words(seed=2)},
            "chosen and rejected are preferences",
        ),
        ({"prompt": chats(), "completion": chats(), "label": cycle(True, False)}, "judged answers (KTO)"),
        ({"prompt": chats(), "completion": chats()}, "join them into one column of messages"),
        ({"image": _PICTURES, "objects": cycle({"bbox": [[1.0, 2.0]], "category": [1]})}, "column objects holds boxes"),
        ({"image": _PICTURES, "mask": _PICTURES}, "pictures and masks (segmentation)"),
        ({"left": _PICTURES, "right": _PICTURES, "same": cycle(0, 1)}, "left and right both hold pictures"),
        (
            {"context": words(), "question": words(), "answers": cycle({"text": ["a"], "answer_start": [0]})},
            "(extractive",
        ),
        ({"en": words(), "de": words(seed=1)}, "columns en and de are translations"),
        ({"translation": cycle({"en": "a", "de": "b"})}, "column translation holds translations"),
        (
            {"messages": [[{"role": "user", "content": [{"type": "image"}]}]] * ROWS},
            "holds conversations that causal-lm does not read (row 0: message 0 has a part of type 'image', and only "
            "parts of type 'text' are read)",
        ),
        ({"text": words(), "labels": cycle([0, 1, 0], [1, 1, 0])}, "holds a 0 or 1 for each class"),
    ],
)
def test_other_tasks(columns: dict[str, object], said: str, tmp_path: Path) -> None:
    look = look_at(pa.table(columns), tmp_path)
    with pytest.raises(DataError) as caught:
        guess(look, UserChoices())
    assert said in caught.value.message and caught.value.message.startswith("toy.parquet: column")
    assert ";" in caught.value.message  # a remedy


@pytest.mark.parametrize("name", ["SINGLE", "PAIR", "MULTI", "TAGS", "SPANS", "TEXTS", "MESSAGES", "PROMPTS", "IMAGES"])
def test_own_tasks_are_let_through(name: str, tmp_path: Path) -> None:
    assert unsupported_reason(look_at(getattr(toy_data, name), tmp_path)) is None


def test_a_task_that_is_asked_for_is_made(tmp_path: Path) -> None:
    table = pa.table({"en": words(), "de": words(seed=1)})
    found = guess(look_at(table, tmp_path), UserChoices("causal-lm", ("en",), "de"))
    assert found.form == "prompt"
