"""Values of a new job file and their reasons; its model."""

import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from launcher.errors import ModelError
from launcher.init.defaults import Line, Sources, fill_defaults, max_length, rare_class, steps_for
from launcher.init.guess import Guess, UserChoices
from launcher.init.labels import Labels
from launcher.init.model_choice import Model, default_model, find_model, fit_task
from launcher.init.rules import guess_task
from tests.support import toy_data
from tests.support.toy_data import chats, cycle, look_at, words

_MODEL = Model("some/model", "as asked", None, False)
_BOTH = Sources({"train": ("a.parquet",), "validation": ("b.parquet",)}, {"train": 60, "validation": 6})


def _guess(table: pa.Table, folder: Path) -> Guess:
    return guess_task(look_at(table, folder), UserChoices())


def _lines(
    table: pa.Table, folder: Path, labels: Labels | None = None, model: Model = _MODEL, sources: Sources = _BOTH
) -> dict[str, Line]:
    draft = fill_defaults("run", look_at(table, folder), _guess(table, folder), labels, model, sources)
    return {f"{section}.{line.key}": line for section, lines in draft.sections.items() for line in lines}


def _counts(**counts: int) -> Labels:
    return Labels(tuple(counts.items()), sum(counts.values()), 0)


def test_max_length_fits_most_rows(tmp_path: Path) -> None:
    short = _guess(pa.table({"text": words(100, 4, 6), "label": cycle(0, 1, rows=100)}), tmp_path)
    assert max_length(short, None)[0] == 32
    long = _guess(pa.table({"text": words(100, 900, 1000), "label": cycle(0, 1, rows=100)}), tmp_path)
    assert max_length(long, None)[0] == 512 and max_length(long, None)[1].endswith("; longer ones are cut")
    assert max_length(long, 64)[0] == 64
    assert max_length(_guess(toy_data.TEXTS, tmp_path), None)[0] == 128
    assert max_length(_guess(toy_data.PAIR, tmp_path), None)[0] == 64


@pytest.mark.parametrize(("rows", "epochs", "batch"), [(50, 5, 8), (2000, 3, 16), (50_000, 3, 32), (2_000_000, 1, 32)])
def test_epochs_and_batch_size_follow_the_number_of_rows(rows: int, epochs: int, batch: int, tmp_path: Path) -> None:
    steps = steps_for(_guess(toy_data.SINGLE, tmp_path), rows)
    assert (steps.epochs, steps.batch_size, steps.learning_rate) == (epochs, batch, 2e-5)


def test_rare_class_selects_macro_f1(tmp_path: Path) -> None:
    lines = _lines(toy_data.PAIR, tmp_path, _counts(yes=90, no=8, maybe=2))
    assert lines["evaluation.metric"].value == "macro_f1"
    assert lines["evaluation.metric"].why.startswith("only 2 % of the labels are maybe")
    assert lines["task.label"].why == "column: 3 classes: yes (90 %), no (8 %), maybe (2 %)"
    assert rare_class(_guess(toy_data.PAIR, tmp_path), _counts(yes=50, no=30, maybe=20)) is None


def test_metric_follows_the_task(tmp_path: Path) -> None:
    assert _lines(toy_data.PAIR, tmp_path, _counts(yes=2, no=2, maybe=2))["evaluation.metric"].value == "accuracy"
    assert _lines(toy_data.MULTI, tmp_path, _counts(a=2, b=1, c=2))["evaluation.metric"].value == "f1"
    assert _lines(toy_data.REGRESSION, tmp_path, Labels((), 60, 0))["evaluation.metric"].value == "pearson"
    assert _lines(toy_data.TEXTS, tmp_path)["evaluation.metric"].value == "perplexity"


def test_missing_validation_data_is_a_commented_line(tmp_path: Path) -> None:
    sources = Sources({"train": ("a.parquet",)}, {"train": 60}, 0, {"validation": "none was found"})
    lines = _lines(toy_data.TEXTS, tmp_path, sources=sources)
    assert lines["data.validation"] == Line("validation", "PATH", "none was found", True)
    assert "evaluation.metric" not in lines


def test_minus_one_marks_rows_without_a_label(tmp_path: Path) -> None:
    table = pa.table({"text": words(), "label": cycle(-1, 0, 1)})
    lines = _lines(table, tmp_path, Labels((("-1", 20), ("0", 20), ("1", 20)), 60, 0))
    assert lines["task.labels"].value == ["0", "1"] and lines["data.on_bad_row"].value == "skip"


@pytest.mark.parametrize(
    ("table", "column", "empty"),
    [
        (toy_data.TEXTS, "text", None),
        (toy_data.TAGS, "tokens", [None]),
        (toy_data.RANKED, "negatives", [None]),
        (toy_data.IMAGES, "image", {"bytes": None, "path": None}),
    ],
)
def test_unusable_rows_set_on_bad_row_to_skip(table: pa.Table, column: str, empty: object, tmp_path: Path) -> None:
    cells = table.column(column).to_pylist()
    holes = table.set_column(table.schema.get_field_index(column), column, [[empty, *cells[1:]]])
    assert _lines(holes, tmp_path)["data.on_bad_row"].value == "skip"
    assert "data.on_bad_row" not in _lines(table, tmp_path)


def test_prompts_that_may_fill_a_whole_row_set_on_bad_row_to_skip(tmp_path: Path) -> None:
    why = "some answers may start beyond max_length; error stops at such rows"
    short, long = Model("m", "as asked", 64, True), Model("m", "as asked", 1024, True)
    for table in (toy_data.MESSAGES, toy_data.PROMPTS):
        lines = _lines(table, tmp_path, model=short)
        assert (lines["data.on_bad_row"].value, lines["data.on_bad_row"].why) == ("skip", why)
        assert "data.on_bad_row" not in _lines(table, tmp_path, model=long)
    unanswered = [*chats()[1:], [{"role": "user", "content": "hello"}]]
    assert "data.on_bad_row" in _lines(pa.table({"messages": unanswered}), tmp_path, model=long)


def test_large_rows_reduce_the_window(tmp_path: Path) -> None:
    large = replace(look_at(toy_data.TEXTS, tmp_path), row_bytes=float(8 << 20))
    draft = fill_defaults("run", large, _guess(toy_data.TEXTS, tmp_path), None, _MODEL, _BOTH)
    assert {line.key: line.value for line in draft.sections["data"]}["window_steps"] == 8


def test_chat_template_is_set_only_for_models_without_one(tmp_path: Path) -> None:
    table = pa.table({"messages": chats(answerer="gpt")})  # a known name of the assistant
    lines = _lines(table, tmp_path)
    assert lines["task.chat_template"].value == "chatml" and "task.answer_roles" not in lines
    lines = _lines(toy_data.MESSAGES, tmp_path, model=Model("m", "as asked", None, True))
    assert "task.chat_template" not in lines


def test_large_regression_targets_get_a_remark_on_scaling(tmp_path: Path) -> None:
    table = pa.table({"text": words(), "score": [float(i * 10) for i in range(60)]})
    why = _lines(table, tmp_path, Labels((), 60, 0))["task.label"].why
    assert why == "column: numbers from 0 to 590; scaled to about 0 to 1 they are learned faster"


def test_pictures_outside_the_data_directory_set_files_below(tmp_path: Path) -> None:
    table = pa.table({"file": [f"{tmp_path}/pictures/{i}.png" for i in range(60)], "animal": cycle("cat", "dog")})

    def lines(folder: Path) -> dict[str, Line]:
        names = {name: (str(folder / f"{name}.parquet"),) for name in ("train", "validation")}
        return _lines(table, tmp_path, sources=Sources(names, _BOTH.rows))

    assert "data.files_below" not in lines(tmp_path)
    # Held-out rows are written to a directory of their own, away from their pictures.
    assert lines(tmp_path / "cut")["data.files_below"].value == f"{tmp_path}/pictures"


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
def test_default_model_follows_task_and_script(table: pa.Table, model: str, tmp_path: Path) -> None:
    assert default_model(_guess(table, tmp_path)).name == model


def test_local_model_gives_length_and_template(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    gpt, bert = tiny_models["causal-lm"], tiny_models["text-classification"]
    assert find_model(str(gpt)) == Model(str(gpt), "as asked", 64, True)
    assert find_model(str(bert)) == Model(str(bert), "as asked", 64, False, is_encoder=True)
    (tmp_path / "config.json").write_text(json.dumps({"n_positions": 1024}))
    assert find_model(str(tmp_path)).positions == 1024


def test_name_of_a_hub_model_gives_its_template() -> None:
    assert find_model("org/model-Instruct").has_template and not find_model("gpt2").has_template


def test_path_without_a_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name, reason in (
        (f"{tmp_path}/no", "there is no such directory; give one that exists, or a hub name"),
        (f"{tmp_path}/file", "is a file; give the directory it is in, or a hub name"),
        (str(tmp_path), "holds no model (it has no config.json); give a directory that has one"),
    ):
        with pytest.raises(ModelError) as caught:
            find_model(name)
        assert caught.value.message == f"--model {name}: {reason}"


_FRENCH = pa.table({"fr": words(), "en": words(seed=1)})
_HUNGARIAN = pa.table({"hu": words(), "en": words(seed=1)})
_NEWS = pa.table({"article": words(low=90, high=99), "highlights": words(seed=1)})


@pytest.mark.parametrize(
    ("table", "model", "lines"),
    [
        (_FRENCH, "google-t5/t5-small", {"source": "fr", "target": "en", "prefix": "translate French to English: "}),
        (_HUNGARIAN, "google/mt5-small", {"source": "hu", "target": "en", "max_target_length": 32}),
        (_NEWS, "facebook/bart-base", {"scores": "rouge", "max_source_length": 256, "max_target_length": 32}),
        (
            pa.table({"translation": cycle({"en": "a", "de": "b"}, {"en": "c", "de": "d"})}),
            "google-t5/t5-small",
            {"translation": "translation", "source": "en", "target": "de", "prefix": "translate English to German: "},
        ),
    ],
)
def test_pairs_get_a_model_and_their_keys(
    table: pa.Table, model: str, lines: dict[str, object], tmp_path: Path
) -> None:
    chosen = default_model(_guess(table, tmp_path))
    assert chosen.name == model
    values = {key.removeprefix("task."): line.value for key, line in _lines(table, tmp_path, model=chosen).items()}
    assert {key: values[key] for key in lines} == lines
    assert ("prefix" in values) == ("prefix" in lines)
    assert values["evaluation.metric"] == ("rouge1" if "scores" in lines else "bleu")


def test_an_encoder_learns_plain_texts_by_masks(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    guess = _guess(toy_data.TEXTS, tmp_path)
    assert fit_task(guess, find_model("gpt2")) == guess
    for name in ("bert-base-uncased", str(tiny_models["masked-lm"])):
        fitted = fit_task(guess, find_model(name))
        assert (fitted.task, fitted.inputs) == ("masked-lm", guess.inputs)
    lines = fill_defaults("run", look_at(toy_data.TEXTS, tmp_path), fitted, None, _MODEL, _BOTH).sections["task"]
    assert [line.key for line in lines] == ["type", "text", "max_length"]
