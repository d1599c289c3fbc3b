"""Numbers of a new job and their reasons."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from launcher.init.guess import UserChoices, guess
from launcher.init.look import Labels
from launcher.init.pretrained import Model
from launcher.init.settle import Line, Sources, fill_defaults, max_length, rare_class, steps_for
from tests.support import toy_data
from tests.support.toy_data import chats, cycle, look_at, words

_MODEL = Model("some/model", "as asked", None, False)
_BOTH = Sources({"train": ("a.parquet",), "validation": ("b.parquet",)}, {"train": 60, "validation": 6})


def _lines(table: pa.Table, folder: Path, labels: Labels | None = None, **given: Any) -> dict[str, Line]:
    look = look_at(table, folder)
    found = guess(look, UserChoices())
    draft = fill_defaults("run", look, found, labels, given.get("model", _MODEL), given.get("sources", _BOTH))
    return {f"{section}.{line.key}": line for section, lines in draft.sections.items() for line in lines}


def _counts(**counts: int) -> Labels:
    return Labels(tuple(counts.items()), sum(counts.values()), 0)


def test_length_is_what_most_rows_have(tmp_path: Path) -> None:
    short = guess(
        look_at(pa.table({"text": words(100, 4, 6), "label": cycle(0, 1, rows=100)}), tmp_path), UserChoices()
    )
    assert max_length(short, None)[0] == 32
    long = guess(
        look_at(pa.table({"text": words(100, 900, 1000), "label": cycle(0, 1, rows=100)}), tmp_path), UserChoices()
    )
    assert max_length(long, None)[0] == 512 and max_length(long, None)[1].endswith("; longer ones are cut")
    assert max_length(long, 64)[0] == 64
    assert max_length(guess(look_at(toy_data.TEXTS, tmp_path), UserChoices()), None)[0] == 128
    pair = guess(look_at(toy_data.PAIR, tmp_path), UserChoices())
    assert max_length(pair, None)[0] == 64


@pytest.mark.parametrize(("rows", "epochs", "batch"), [(50, 5, 8), (2000, 3, 16), (50_000, 3, 32), (2_000_000, 1, 32)])
def test_steps(rows: int, epochs: int, batch: int, tmp_path: Path) -> None:
    steps = steps_for(guess(look_at(toy_data.SINGLE, tmp_path), UserChoices()), rows)
    assert (steps.epochs, steps.batch_size, steps.learning_rate) == (epochs, batch, 2e-5)


def test_a_rare_class_asks_for_macro_f1(tmp_path: Path) -> None:
    lines = _lines(toy_data.PAIR, tmp_path, _counts(yes=90, no=8, maybe=2))
    assert lines["evaluation.metric"].value == "macro_f1"
    assert lines["evaluation.metric"].why.startswith("only 2 % of the labels are maybe")
    assert lines["task.label"].why == "column: 3 classes: yes (90 %), no (8 %), maybe (2 %)"
    found = guess(look_at(toy_data.PAIR, tmp_path), UserChoices())
    assert rare_class(found, _counts(yes=50, no=30, maybe=20)) is None


def test_metrics_are_the_tasks_own(tmp_path: Path) -> None:
    assert _lines(toy_data.PAIR, tmp_path, _counts(yes=2, no=2, maybe=2))["evaluation.metric"].value == "accuracy"
    assert _lines(toy_data.MULTI, tmp_path, _counts(a=2, b=1, c=2))["evaluation.metric"].value == "f1"
    assert _lines(toy_data.REGRESSION, tmp_path, Labels((), 60, 0))["evaluation.metric"].value == "pearson"
    assert _lines(toy_data.TEXTS, tmp_path)["evaluation.metric"].value == "perplexity"


def test_no_validation_data_is_a_line_to_fill_in(tmp_path: Path) -> None:
    sources = Sources({"train": ("a.parquet",)}, {"train": 60}, 0, {"validation": "none was found"})
    lines = _lines(toy_data.TEXTS, tmp_path, sources=sources)
    assert lines["data.validation"] == Line("validation", "PATH", "none was found", True)
    assert "evaluation.metric" not in lines


def test_minus_one_is_no_label(tmp_path: Path) -> None:
    table = pa.table({"text": words(), "label": cycle(-1, 0, 1)})
    lines = _lines(table, tmp_path, Labels((("-1", 20), ("0", 20), ("1", 20)), 60, 0))
    assert lines["task.labels"].value == ["0", "1"] and lines["data.on_bad_row"].value == "skip"


def test_rows_that_cannot_be_used_are_skipped(tmp_path: Path) -> None:
    holes = toy_data.TEXTS.set_column(1, "text", [[None, *words()[1:]]])
    assert _lines(holes, tmp_path)["data.on_bad_row"].value == "skip"
    assert "data.on_bad_row" not in _lines(toy_data.TEXTS, tmp_path)


def test_prompts_that_may_fill_all_of_a_row_are_skipped(tmp_path: Path) -> None:
    why = "some answers may begin behind max_length; error stops at such rows"
    short, long = Model("m", "as asked", 64, True), Model("m", "as asked", 1024, True)
    for table in (toy_data.MESSAGES, toy_data.PROMPTS):
        lines = _lines(table, tmp_path, model=short)
        assert (lines["data.on_bad_row"].value, lines["data.on_bad_row"].why) == ("skip", why)
        assert "data.on_bad_row" not in _lines(table, tmp_path, model=long)
    unanswered = [*chats()[1:], [{"role": "user", "content": "hello"}]]
    assert "data.on_bad_row" in _lines(pa.table({"messages": unanswered}), tmp_path, model=long)


def test_large_rows_make_small_windows(tmp_path: Path) -> None:
    look = look_at(toy_data.TEXTS, tmp_path)
    large = replace(look, row_bytes=float(8 << 20))
    draft = fill_defaults("run", large, guess(look, UserChoices()), None, _MODEL, _BOTH)
    assert {line.key: line.value for line in draft.sections["data"]}["window_steps"] == 8


def test_templates_and_roles_of_conversations(tmp_path: Path) -> None:
    table = pa.table({"messages": toy_data.chats(answerer="gpt")})
    lines = _lines(table, tmp_path)  # gpt is known as the assistant
    assert lines["task.chat_template"].value == "chatml" and "task.answer_roles" not in lines
    lines = _lines(toy_data.MESSAGES, tmp_path, model=Model("m", "as asked", None, True))
    assert "task.chat_template" not in lines


def test_numbers_far_from_one_are_remarked_upon(tmp_path: Path) -> None:
    table = pa.table({"text": words(), "score": [float(i * 10) for i in range(60)]})
    said = _lines(table, tmp_path, Labels((), 60, 0))["task.label"].why
    assert said == "column: numbers from 0 to 590; scaled to about 0 to 1 they are learned sooner"


@pytest.mark.parametrize("beside", [True, False])
def test_pictures_that_do_not_lie_with_the_data_are_a_place_of_the_job(tmp_path: Path, beside: bool) -> None:
    """`launcher init` may cut the rows into a directory of its own, which leaves their pictures behind."""
    table = pa.table({"file": [f"{tmp_path}/pictures/{i}.png" for i in range(60)], "animal": cycle("cat", "dog")})
    folder = tmp_path if beside else tmp_path / "cut"
    sources = Sources({name: (str(folder / f"{name}.parquet"),) for name in ("train", "validation")}, _BOTH.rows)
    lines = _lines(table, tmp_path, sources=sources)
    if beside:
        assert "data.files_below" not in lines
    else:
        assert lines["data.files_below"].value == f"{tmp_path}/pictures"
