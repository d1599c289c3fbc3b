"""Task and columns of every form of data, and the reasons for refusing data of other tasks."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from launcher.errors import DataError
from launcher.init.guess import Guess, UserChoices
from launcher.init.rules import guess_task, unsupported_reason
from launcher.init.user_data import open_training
from tests.support import toy_data
from tests.support.toy_data import ROWS, chats, cycle, look_at, named_classes, picture, words


def _guess(table: pa.Table, folder: Path, **choices: Any) -> Guess:
    return guess_task(look_at(table, folder), UserChoices(**choices))


_NAMED = named_classes(pa.table({"body": words(), "kind_of_it": cycle(0, 1)}), "kind_of_it", ["no", "yes"])
_SORTED = pa.table({"text": words(), "label": [0] * ROWS})
_TREC = pa.table({"text": words(), "coarse_label": cycle(0, 1), "fine_label": cycle(*range(6))})
_DOLLY = pa.table(
    {"instruction": words(), "context": words(seed=2), "response": words(seed=1), "category": cycle("qa", "open")}
)
_WIKI_QA = pa.table({"question": words(), "answer": words(seed=1), "label": cycle(0, 1)})
_BOOLQ = pa.table({"question": words(), "passage": words(seed=1), "answer": cycle(True, False)})
_WEB = pa.table(
    {"text": words(), "dump": cycle("2013", "2014"), "language_score": [0.9] * ROWS, "token_count": range(ROWS)}
)
_REVIEWS = pa.table(
    {"review_id": [f"x{i}" for i in range(ROWS)], "stars": cycle(1, 2, 5), "review_body": words(),
     "review_title": words(seed=3, low=2, high=4), "language": ["en"] * ROWS}
)  # fmt: skip
_EMOTIONS = pa.table({"text": words(), "labels": cycle([0], [3, 5]), "id": [f"x{i}" for i in range(ROWS)]})
_SCORES = pa.table({"text": words(), "score": list(range(0, 2 * ROWS, 2))})
_LONE = pa.table({"id": range(ROWS), "remark": words(), "verdict": cycle("good", "bad")})
_PATHS = pa.table({"file": [f"/data/{i}.png" for i in range(ROWS)], "animal": cycle("cat", "dog")})
_CHINESE = pa.table({"text": [f"这个酒店不错{i}号" for i in range(ROWS)], "label": cycle(0, 1)})
_QA_LISTS = pa.table(
    {"query": words(low=2, high=4), "passage": words(seed=1), "gold": cycle([{"text": "w1", "start": 0}], [])}
)
_TRANSLATED = pa.table({"en": words(), "de": words(seed=1)})
_STRUCTS = pa.table({"id": range(ROWS), "translation": cycle({"en": "a b", "de": "b"}, {"en": "c", "de": "d"})})
_SUMMARIES = pa.table({"document": words(low=30, high=40), "summary": words(seed=1), "id": range(ROWS)})
_WRITTEN = pa.table({"source": words(), "target": words(seed=1)})
_PASSAGES = pa.table({"query": words(), "passage": words(seed=1), "title": words(seed=2)})
_TWO_TEXTS = pa.table({"a": words(), "b": words(seed=1)})
_CHAT_AND_PROMPT = pa.table({"prompt": words(), "messages": chats()})


@pytest.mark.parametrize(
    ("table", "task", "form", "inputs", "label"),
    [
        (toy_data.SINGLE, "text-classification", "single-label", ["review"], "stars"),
        (toy_data.PAIR, "text-classification", "single-label", ["premise", "hypothesis"], "label"),
        (toy_data.REGRESSION, "text-classification", "regression", ["question", "passage"], "score"),
        (toy_data.SCORED, "sentence-embedding", "regression", ["sentence1", "sentence2"], "score"),
        (toy_data.QUERIES, "sentence-embedding", "ranking", ["query", "positive"], None),
        (toy_data.RANKED, "sentence-embedding", "ranking", ["anchor", "positive"], None),
        (_PASSAGES, "sentence-embedding", "ranking", ["query", "passage"], None),
        (toy_data.MULTI, "text-classification", "multi-label", ["text"], "labels"),
        (toy_data.TAGS, "token-classification", "words", ["tokens"], "ner_tags"),
        (toy_data.SPANS, "token-classification", "spans", ["text"], "entities"),
        (toy_data.ANSWERS, "question-answering", "answers", ["context", "question"], None),
        (_QA_LISTS, "question-answering", "answers", ["passage", "query"], None),
        (toy_data.TEXTS, "causal-lm", "text", ["text"], None),
        (toy_data.MESSAGES, "causal-lm", "messages", ["messages"], None),
        (toy_data.PROMPTS, "causal-lm", "prompt", ["instruction"], "output"),
        (toy_data.IMAGES, "image-classification", "single-label", ["image"], "label"),
        (_NAMED, "text-classification", "single-label", ["body"], "kind_of_it"),
        (_SORTED, "text-classification", "single-label", ["text"], "label"),
        (_TREC, "text-classification", "single-label", ["text"], "coarse_label"),
        (_DOLLY, "causal-lm", "prompt", ["instruction"], "response"),
        (_WIKI_QA, "text-classification", "single-label", ["question", "answer"], "label"),
        (_BOOLQ, "text-classification", "single-label", ["question", "passage"], "answer"),
        (_WEB, "causal-lm", "text", ["text"], None),
        (_REVIEWS, "text-classification", "single-label", ["review_body"], "stars"),
        (_EMOTIONS, "text-classification", "multi-label", ["text"], "labels"),
        (_SCORES, "text-classification", "regression", ["text"], "score"),
        (_LONE, "text-classification", "single-label", ["remark"], "verdict"),
        (_PATHS, "image-classification", "single-label", ["file"], "animal"),
        (_CHINESE, "text-classification", "single-label", ["text"], "label"),
        (_CHAT_AND_PROMPT, "causal-lm", "messages", ["messages"], None),
        (_TRANSLATED, "seq2seq", "pair", ["en"], "de"),
        (_STRUCTS, "seq2seq", "translation", ["translation"], None),
        (_SUMMARIES, "seq2seq", "summary", ["document"], "summary"),
        (_WRITTEN, "seq2seq", "pair", ["source"], "target"),
    ],
)
def test_form_of_data_decides_task_and_columns(
    table: pa.Table, task: str, form: str, inputs: list[str], label: str | None, tmp_path: Path
) -> None:
    result = _guess(table, tmp_path)
    assert (result.task, result.form) == (task, form)
    assert [column.name for column in result.inputs] == inputs
    assert (result.label.name if result.label else None) == label
    assert result.why and set(result.reasons) == {*inputs, *([label] if label else [])}


@pytest.mark.parametrize(
    ("table", "choices", "form", "inputs", "label"),
    [
        (toy_data.SINGLE, {"task": "causal-lm"}, "text", ["review"], None),
        (toy_data.PAIR, {"inputs": ("hypothesis",)}, "single-label", ["hypothesis"], "label"),
        (_REVIEWS, {"inputs": ("review_title", "review_body")}, "single-label", ["review_title", "review_body"],
         "stars"),
        (_TREC, {"label": "fine_label"}, "single-label", ["text"], "fine_label"),
        (_DOLLY, {"task": "text-classification", "inputs": ("instruction",)}, "single-label", ["instruction"],
         "category"),
        (_DOLLY, {"inputs": ("context",), "label": "category"}, "single-label", ["context"], "category"),
        (_LONE, {"inputs": ("remark",), "label": "verdict"}, "single-label", ["remark"], "verdict"),
        (_WIKI_QA, {"task": "causal-lm"}, "prompt", ["question"], "answer"),
        (_WIKI_QA, {"task": "causal-lm", "inputs": ("question",), "label": ""}, "text", ["question"], None),
        (_CHAT_AND_PROMPT, {"task": "causal-lm", "inputs": ("prompt",)}, "text", ["prompt"], None),
        (toy_data.TAGS, {"label": "pos_tags"}, "words", ["tokens"], "pos_tags"),
        (_TRANSLATED, {"inputs": ("de",), "label": "en", "task": "seq2seq"}, "pair", ["de"], "en"),
        (_TRANSLATED, {"inputs": ("de",), "task": "masked-lm"}, "text", ["de"], None),
        (toy_data.TEXTS, {"task": "masked-lm"}, "text", ["text"], None),
        (toy_data.PROMPTS, {"inputs": ("instruction",), "label": "output"}, "prompt", ["instruction"], "output"),
        (toy_data.RANKED, {"task": "reranking"}, "ranking", ["anchor", "positive"], None),
        (_TWO_TEXTS, {"task": "sentence-embedding", "inputs": ("a", "b")}, "ranking", ["a", "b"], None),
        (toy_data.REGRESSION, {"task": "sentence-embedding", "inputs": ("question", "passage"), "label": "score"},
         "regression", ["question", "passage"], "score"),
        (toy_data.SCORED, {"task": "text-classification"}, "regression", ["sentence1", "sentence2"], "score"),
    ],
)  # fmt: skip
def test_choices_of_the_user_take_precedence(
    table: pa.Table, choices: dict[str, Any], form: str, inputs: list[str], label: str | None, tmp_path: Path
) -> None:
    result = _guess(table, tmp_path, **choices)
    names = [column.name for column in result.inputs]
    assert (result.form, names, result.label.name if result.label else None) == (form, inputs, label)


@pytest.mark.parametrize(
    ("table", "choices", "message"),
    [
        (_TWO_TEXTS, {},
         "toy.parquet has the columns a (string), b (string): no task fits them; "
         "if one is meant, name it: --task, --text COLUMN, --label COLUMN"),
        (pa.table({"age": range(ROWS), "job": cycle("x", "y"), "income": [0.5] * ROWS}), {},
         "toy.parquet has the columns age (int64), job (string), income (double): these are numbers and categories, "
         "and the launcher has no task for tables; if one is meant, name it: --task, --text COLUMN, --label COLUMN"),
        (toy_data.SINGLE, {"task": "image-classification"},
         "image-classification needs a column of pictures and one of classes; toy.parquet has id (int64), "
         "review (string), stars (int64); name columns by --text and --label"),
        (toy_data.SINGLE, {"task": "token-classification", "inputs": ("review",), "label": "stars"},
         "token-classification needs words with a tag for each, or a text and a list of {start, end, label}; the "
         "columns named are review (string), stars (int64); name columns by --text and --label"),
        (toy_data.SINGLE, {"inputs": ("reviews",)},
         "--text reviews: toy.parquet has no such column; did you mean review?"),
        (toy_data.PAIR, {"task": "text-classification", "inputs": ("premise", "hypothesis", "label")},
         "--text premise,hypothesis,label: text-classification reads one column, or two as a pair"),
        (toy_data.IMAGES.select(["image"]), {},
         "toy.parquet: column image holds pictures, and no other column looks like their class (image "
         "({bytes, path})); name it with --label"),
        (pa.table({"messages": chats(answerer="narrator")}), {},
         "toy.parquet: column messages has the roles narrator, user, and none of them is the assistant, whose "
         "messages are learned; rename a role to assistant"),
        (toy_data.SPANS, {"task": "text-classification", "label": "entities"},
         "--label entities: its values are list of {start, end, label}, which is not a label of a text"),
        (toy_data.IMAGES.append_column("weight", pa.array([0.5] * ROWS)), {"label": "weight"},
         "--label weight: its values are numbers with a fraction, and pictures have classes only"),
        (pa.table({"text": words(), "label": pa.array([None] * ROWS, pa.string())}), {"label": "label"},
         "--label label: is empty in all 60 rows that were read; name another column"),
        (pa.table({"messages": pa.array([[None]] * ROWS, pa.array(chats()).type)}), {},
         "toy.parquet has the columns messages (list of {role, content}, empty): no task fits them; "
         "if one is meant, name it: --task, --text COLUMN, --label COLUMN"),
    ],
)  # fmt: skip
def test_ambiguous_data_is_refused_in_one_sentence(
    table: pa.Table, choices: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError) as caught:
        _guess(table, tmp_path, **choices)
    assert caught.value.message == message


_TURNS = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]
_CALLS = [{"role": "user", "content": "Weather?"}, {"role": "function_call", "content": '{"name": "weather"}'}]


@pytest.mark.parametrize(
    ("columns", "why"),
    [
        ({"conversations": [_TURNS] * ROWS}, "column conversations holds conversations in ShareGPT's form"),
        ({"messages": chats()}, "column messages holds conversations of OpenAI's messages"),
        ({"messages": [_CALLS] * ROWS}, "column messages holds conversations of OpenAI's messages, with tool calls"),
        ({"messages": [json.dumps(_TURNS)] * ROWS}, "column messages holds conversations as JSON text"),
        ({"instruction": words(), "output": words(seed=1)},
         "columns instruction and output are Alpaca's instructions and outputs"),
        ({"question": words(), "answer": words(seed=1)}, "columns question and answer are prompts and their answers"),
        ({"prompt": chats(), "completion": chats()}, "columns prompt and completion are prompts and their answers"),
    ],
)  # fmt: skip
def test_conversations_and_prompts_are_named_by_their_form(
    columns: dict[str, object], why: str, tmp_path: Path
) -> None:
    assert _guess(pa.table(columns), tmp_path).why == why


def test_prompts_beside_conversations_are_noted(tmp_path: Path) -> None:
    columns = {"instruction": words(), "input": words(seed=2), "output": words(seed=1), "messages": chats()}
    guess = _guess(pa.table(columns), tmp_path)
    assert guess.inputs[0].name == "messages"
    assert guess.notes == (
        "columns instruction and output are not read, as messages has conversations; --text instruction --label output "
        "reads them instead",
    )
    assert _guess(pa.table(columns), tmp_path, inputs=("instruction",), label="output").form == "prompt"


def test_notes_name_columns_that_are_not_read(tmp_path: Path) -> None:
    assert _guess(toy_data.PROMPTS.append_column("history", toy_data.PROMPTS["input"]), tmp_path).notes == (
        "column history is not read; put it into the prompts or conversations if it matters",
    )
    assert _guess(_REVIEWS, tmp_path).notes == (
        "not read: review_title; --text review_body,review_title reads two as a pair",
    )
    rng = np.random.default_rng(0)
    letters = ["".join(rng.choice(list("ACGT"), 60)) for _ in range(ROWS)]
    (note,) = _guess(pa.table({"sequence": letters, "label": cycle(0, 1)}), tmp_path).notes
    assert note.startswith("texts in column sequence have no spaces: name a model")


_PICTURES = [picture(i) for i in range(ROWS)]
_SOUND = b"RIFF\x00\x00\x00\x00WAVEfmt "


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"audio": [_SOUND] * ROWS, "text": words(), "label": cycle(0, 1)}, "column audio holds audio"),
        ({"image": _PICTURES, "objects": cycle({"bbox": [[1.0, 2.0]], "category": [1]})}, "column objects holds boxes"),
        ({"image": _PICTURES, "mask": _PICTURES}, "pictures and masks (segmentation)"),
        ({"left": _PICTURES, "right": _PICTURES, "same": cycle(0, 1)}, "left and right both hold pictures"),
        ({"context": words(), "question": words(), "answer": words(), "answer_start": range(ROWS)},
         "column answer_start says where answers begin"),
        ({"messages": [[{"role": "user", "content": [{"type": "image"}]}]] * ROWS},
         "holds conversations that causal-lm does not read (row 0: message 0 has a part of type 'image', and only "
         "parts of type 'text' are read)"),
        ({"messages": [json.dumps([{"role": "user", "content": [{"type": "image"}]}])] * ROWS},
         "holds conversations that causal-lm does not read (row 0: message 0 has a part of type 'image'"),
        ({"messages": [[None, *chat] for chat in chats()]},
         "holds conversations that causal-lm does not read (row 0: message 0 is None"),
        ({"text": words(), "labels": cycle([0, 1, 0], [1, 1, 0])}, "holds a 0 or 1 for each class"),
    ],
)  # fmt: skip
def test_data_of_unsupported_tasks_is_refused(columns: dict[str, object], reason: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        _guess(pa.table(columns), tmp_path)
    assert reason in caught.value.message and caught.value.message.startswith("toy.parquet: column")
    assert ";" in caught.value.message  # a remedy


@pytest.mark.parametrize(
    ("columns", "choices", "form", "inputs", "beside"),
    [
        ({"prompt": words(), "chosen": words(seed=1), "rejected": words(seed=2)}, {}, "preferred", ["prompt"],
         ["chosen", "rejected"]),
        ({"system": words(seed=3), "question": words(), "chosen": words(seed=1), "rejected": words(seed=2)}, {},
         "preferred", ["question"], ["chosen", "rejected", "system"]),
        ({"chosen": chats(), "rejected": chats()}, {"task": "reward"}, "preferred", ["chosen"], ["chosen", "rejected"]),
        ({"prompt": chats(), "completion": chats(), "label": cycle(True, False)}, {}, "judged", ["prompt"],
         ["completion", "label"]),
    ],
)  # fmt: skip
def test_preferences_are_recognised_by_their_names(
    columns: dict[str, object], choices: dict[str, Any], form: str, inputs: list[str], beside: list[str], tmp_path: Path
) -> None:
    result = _guess(pa.table(columns), tmp_path, **choices)
    assert (result.task, result.form) == (choices.get("task", "preference"), form)
    assert ([column.name for column in result.inputs], sorted(result.beside)) == (inputs, sorted(beside))


@pytest.mark.parametrize(
    "name", ["SINGLE", "PAIR", "MULTI", "TAGS", "SPANS", "ANSWERS", "TEXTS", "MESSAGES", "PROMPTS", "IMAGES"]
)
def test_data_of_supported_tasks_is_not_refused(name: str, tmp_path: Path) -> None:
    assert unsupported_reason(look_at(getattr(toy_data, name), tmp_path)) is None


def test_named_task_overrides_the_refusal(tmp_path: Path) -> None:
    table = pa.table({"en": words(), "de": words(seed=1)})
    assert _guess(table, tmp_path, task="causal-lm", inputs=("en",), label="de").form == "prompt"


@pytest.mark.parametrize(
    ("name", "task", "form", "columns"),
    [
        ("text-classification/sst2", "text-classification", "single-label", ["text", "label"]),
        ("text-classification/chnsenticorp", "text-classification", "single-label", ["text", "label"]),
        ("retrieval/medquad", "sentence-embedding", "ranking", ["query", "positive"]),
        ("retrieval/cmrc2018_pairs", "sentence-embedding", "ranking", ["query", "positive"]),
        ("sentence-similarity/stsb", "sentence-embedding", "regression", ["sentence1", "sentence2", "score"]),
        ("biology/splice_junctions", "text-classification", "single-label", ["sequence", "label"]),
        ("token-classification/wnut17", "token-classification", "words", ["tokens", "ner_tags"]),
        ("question-answering/xquad_en", "question-answering", "answers", ["context", "question"]),
        ("question-answering/cmrc2018", "question-answering", "answers", ["context", "question"]),
        ("question-answering/subjqa", "question-answering", "answers", ["context", "question"]),
        ("instruction-sft/alpaca_en", "causal-lm", "messages", ["messages"]),
        ("instruction-sft/glaive_toolcall_en", "causal-lm", "messages", ["messages"]),
        ("preference/dpo_en", "preference", "preferred", ["prompt"]),
        ("preference/dpo_zh", "preference", "preferred", ["prompt"]),
        ("preference/kto_en", "preference", "judged", ["prompt"]),
        ("causal-lm/c4_demo", "causal-lm", "text", ["text"]),
        ("causal-lm/tinyshakespeare", "causal-lm", "text", ["text"]),
        ("translation/multi30k_en_de", "seq2seq", "pair", ["en", "de"]),
        ("translation/tatoeba_zh_en", "seq2seq", "pair", ["zh", "en"]),
        ("summarization/aeslc", "seq2seq", "summary", ["document", "summary"]),
        ("image-classification/mnist_10k", "image-classification", "single-label", ["image", "label"]),
        ("image-classification/sklearn_digits", "image-classification", "single-label", ["image", "label"]),
        ("face-recognition/orl_faces", "image-classification", "single-label", ["image", "identity"]),
    ],
)
def test_real_data_sets_get_the_right_task_and_columns(
    name: str, task: str, form: str, columns: list[str], shared: Path
) -> None:
    data = open_training(str(shared / "data" / name), {})
    result = guess_task(data.profile, UserChoices())
    names = [column.name for column in (*result.inputs, *([result.label] if result.label else []))]
    assert (result.task, result.form, names) == (task, form, columns)
    assert set(data.splits.locations) == {"train", "validation", "test"}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("audio/fsdd", "column audio holds audio"),
        ("audio/emodb_4emotions", "column audio holds audio"),
        ("object-detection/bccd", "column objects holds boxes (object detection)"),
        ("semantic-segmentation/camvid", "columns image and mask are pictures and masks"),
        ("face-recognition/orl_pairs", "columns image_a and image_b both hold pictures"),
        ("tabular/credit_data", "numbers and categories, and the launcher has no task for tables"),
        ("tabular/brca", "numbers and categories, and the launcher has no task for tables"),
        ("recommender/movielens_100k_latest", "numbers and categories, and the launcher has no task for tables"),
    ],
)
def test_real_data_sets_of_unsupported_tasks_are_refused(name: str, reason: str, shared: Path) -> None:
    with pytest.raises(DataError) as caught:
        guess_task(open_training(str(shared / "data" / name), {}).profile, UserChoices())
    assert reason in caught.value.message and "--task" in caught.value.message
