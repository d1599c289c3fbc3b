"""Rows that are not what their task reads, for tasks other than text classification."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa

from tests.support.desk import Case, Desk, check_and

_TRAIN = "DESK/data/train.parquet"
_MEND = "fix the row, or set data.on_bad_row: skip to leave such rows out"
_TURNS = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]


def _both(desk: Desk, **columns: Any) -> None:
    for split in ("train", "validation"):
        desk.table(f"data/{split}.parquet", **columns)


def _tags(desk: Desk, tokens: Any, tags: Any) -> list[str]:
    _both(desk, tokens=tokens, tags=tags)
    return ["task={type: token-classification, max_length: 32}"]


def _lm(desk: Desk, task: str, **columns: Any) -> list[str]:
    _both(desk, **columns)
    return [f"task={{type: causal-lm, max_length: 32, {task}}}", f"model.name={desk.models['causal-lm']}"]


def _chat(desk: Desk, messages: Any, more: str = "") -> list[str]:
    return _lm(desk, f"messages: chat{more}", chat=[messages] * 10)


def _preference(desk: Desk, task: str = "", **columns: Any) -> list[str]:
    _both(desk, **{"prompt": ["w1"] * 10, "chosen": ["w2"] * 10, "rejected": ["w3"] * 10, **columns})
    return [f"task={{type: preference, max_length: 32{task}}}", f"model.name={desk.models['preference']}"]


def _kto(desk: Desk, **columns: Any) -> list[str]:
    rows = {"completion": ["w2"] * 10, "label": [True, False] * 5}
    return _preference(desk, ", loss: kto", **{**rows, **columns})


def _without_template(desk: Desk) -> list[str]:
    overrides = _chat(desk, _TURNS)
    Path("gpt").mkdir()
    for file in desk.models["causal-lm"].iterdir():
        if file.name != "chat_template.jinja":
            desk.file(f"gpt/{file.name}", file.read_bytes())
    path = Path("gpt/tokenizer_config.json")
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "chat_template"}))
    return [overrides[0], "model.name=gpt"]


def _pairs(desk: Desk, task: str = "", model: str = "seq2seq", **columns: Any) -> list[str]:
    _both(desk, **columns)
    return [f"task={{type: seq2seq{task}}}", f"model.name={desk.models[model]}"]


def _masked(desk: Desk, texts: Any, model: str = "masked-lm") -> list[str]:
    _both(desk, text=texts)
    return ["task={type: masked-lm, max_length: 32}", f"model.name={desk.models[model]}"]


def _pictures(desk: Desk, cells: Any) -> list[str]:
    _both(desk, image=cells, label=["a", "b"] * (len(cells) // 2))
    return ["task={type: image-classification}", f"model.name={desk.models['image-classification']}"]


def _questions(desk: Desk, answers: Any, more: str = "", **columns: Any) -> list[str]:
    base = {"question": ["w0"] * 10, "context": ["w1 w2 w3"] * 10}
    _both(desk, **(base | columns), answers=answers)
    return [f"task={{type: question-answering, max_length: 32{more}}}"]


def _without_processor(desk: Desk) -> list[str]:
    overrides = _pictures(desk, [b"x"] * 4)
    Path("vit").mkdir()
    for file in desk.models["image-classification"].iterdir():
        if file.name != "preprocessor_config.json":
            desk.file(f"vit/{file.name}", file.read_bytes())
    return [overrides[0], "model.name=vit"]


def _texts(desk: Desk, task: str, **columns: Any) -> list[str]:
    _both(desk, **columns)
    return [f"task={{{task}}}"]


ANSWERS = [{"text": ["w2"], "answer_start": [3]}] * 10
WORDS = [["w1", "w2"]] * 10
TAGS = [["O", "B-x"]] * 10

CASES = [
    Case("a tag too few", lambda desk: _tags(desk, WORDS, [*TAGS[:9], ["O"]]),
         f"{_TRAIN}: row 9: tags has 1 tags for 2 words; {_MEND}"),
    Case("tags that are no lists", lambda desk: _tags(desk, WORDS, ["O", "B-x"] * 5),
         "task: column tags of the training data is of type string; give a list with a tag for each word, or with a "
         "{start, end, label} for each entity"),
    Case("words that are numbers", lambda desk: _tags(desk, [[1, 2]] * 10, TAGS),
         f"{_TRAIN}: row 0: tokens is [1, 2], which is neither text nor a list of words; {_MEND}"),
    Case("a word that is null", lambda desk: _tags(desk, [*WORDS[:9], ["w1", None]], TAGS),
         f"{_TRAIN}: row 9: tokens is ['w1', None], which is neither text nor a list of words; {_MEND}"),
    Case("a tag that is null", lambda desk: _tags(desk, WORDS, [*TAGS[:9], ["O", None]]),
         f"{_TRAIN}: row 9: tags has the tag None, which is not one of B-x, O; {_MEND}"),
    Case("entities without a name", lambda desk: _tags(desk, ["w1 w2"] * 10, [[{"start": 0, "end": 2}]] * 10),
         "task: the entities in column tags of the training data have no label; each needs start, end and label"),
    Case("tags of words for a string", lambda desk: _tags(desk, ["w1 w2"] * 10, TAGS),
         f"{_TRAIN}: row 0: tags holds 'O', but a string needs the {{start, end, label}} of each entity; {_MEND}"),
    Case("entities of a string for words",
         lambda desk: _tags(desk, WORDS, [[{"start": 0, "end": 2, "label": "x"}]] * 10),
         f"{_TRAIN}: row 0: tags holds entities of a string, but the row has words; give a tag for each; {_MEND}"),
    Case("an entity that ends before it begins",
         lambda desk: _tags(desk, ["w1 w2"] * 10, [[{"start": 5, "end": 2, "label": "x"}]] * 10),
         f"{_TRAIN}: row 0: tags has an entity from 5 to 2, which is not within its 5 characters; {_MEND}"),
    Case("an entity behind the text",
         lambda desk: _tags(desk, ["w1 w2"] * 10, [[{"start": 3, "end": 9, "label": "x"}]] * 10),
         f"{_TRAIN}: row 0: tags has an entity from 3 to 9, which is not within its 5 characters; {_MEND}"),
    Case("an entity that begins nowhere",
         lambda desk: _tags(desk, ["w1 w2"] * 10, [[{"start": None, "end": 2, "label": "x"}]] * 10),
         f"{_TRAIN}: row 0: tags has an entity from None to 2, which is not within its 5 characters; {_MEND}"),
    Case("texts that are structs", lambda desk: _lm(desk, "text: text", text=[{"body": "w1 w2"}] * 10),
         f"{_TRAIN}: row 0: text is {{'body': 'w1 w2'}}, which is not text; {_MEND}"),
    Case("conversations that are strings", lambda desk: _chat(desk, "w1 w2"),
         f"{_TRAIN}: row 0: chat is 'w1 w2', which is not a list of messages; {_MEND}"),
    Case("conversations of strings", lambda desk: _chat(desk, ["w1", "w2"]),
         f"{_TRAIN}: row 0: chat: message 0 is 'w1', which is not a {{role, content}}; {_MEND}"),
    Case("conversations with other keys",
         lambda desk: _chat(desk, [{"speaker": "human", "text": "w1"}, {"speaker": "gpt", "text": "w2"}]),
         f"{_TRAIN}: row 0: chat: message 0 is {{'speaker': 'human', 'text': 'w1'}}, which is not a {{role, content}}; "
         f"{_MEND}"),
    Case("conversations without an answer", lambda desk: _chat(desk, _TURNS[:1]),
         f"{_TRAIN}: row 0: chat has no message of assistant (task.answer_roles), only of user; {_MEND}"),
    Case("answers of a role that nobody has", lambda desk: _chat(desk, _TURNS, ", answer_roles: [bot]"),
         f"{_TRAIN}: row 0: chat has no message of bot (task.answer_roles), only of assistant, user; {_MEND}"),
    Case("no chat template", _without_template,
         "task.chat_template: missing, and the tokenizer of DESK/gpt has none; set chatml, or one of your own"),
    Case("a chat template that is not Jinja", lambda desk: _chat(desk, _TURNS, ', chat_template: "{% for m"'),
         "task.chat_template: line 1 is not Jinja (unexpected end of template, expected 'in'.); fix the template"),
    Case("a chat template that fails", lambda desk: _chat(desk, _TURNS, ', chat_template: "{{ 1 / 0 }}"'),
         f"{_TRAIN}: row 0: chat: the chat template refuses it (division by zero), and task.chat_template may name "
         f"another; {_MEND}"),
    Case("answers that are lists", lambda desk: _lm(desk, "prompt: p, response: r", p=["w1"] * 10, r=[["w2"]] * 10),
         f"{_TRAIN}: row 0: r is ['w2'], which is not text; {_MEND}"),
    Case("prompts longer than max_length",
         lambda desk: _lm(desk, "prompt: p, response: r", p=["w1 " * 100] * 10, r=["w2"] * 10),
         f"{_TRAIN}: row 0: p has nothing to learn among its first 32 of 107 tokens (task.max_length); {_MEND}"),
    Case("answers that stand elsewhere",
         lambda desk: _questions(desk, [*ANSWERS[:9], {"text": ["w2"], "answer_start": [4]}]),
         f"{_TRAIN}: row 9: answers has the answer 'w2' at 4, where context has '2 ' (it stands at 3, in characters "
         f"from 0); {_MEND}"),
    Case("answers that are in no context",
         lambda desk: _questions(desk, [*ANSWERS[:9], {"text": ["w9"], "answer_start": [3]}]),
         f"{_TRAIN}: row 9: answers has the answer 'w9' at 3, where context has 'w2' (context does not contain it); "
         f"{_MEND}"),
    Case("answers without their places", lambda desk: _questions(desk, ["w2"] * 10),
         "task: column answers of the training data is of type string; give {text: [...], answer_start: [...]} as "
         "SQuAD has it, or a list of {text, start}, in Parquet or JSON"),
    Case("more answers than starts",
         lambda desk: _questions(desk, [*ANSWERS[:9], {"text": ["w2"], "answer_start": []}]),
         f"{_TRAIN}: row 9: answers has 1 texts for 0 starts; {_MEND}"),
    Case("a question that fills a window", lambda desk: _questions(desk, ANSWERS, question=["w0 " * 19] * 10),
         f"{_TRAIN}: row 0: question leaves 10 of the 32 tokens of a window (task.max_length) for context, and 10 are "
         f"shared with the next one (task.doc_stride); raise the first or lower the second; {_MEND}"),
    Case("an answer longer than the overlap of windows",
         lambda desk: _questions(desk, [{"text": ["w1 " * 29 + "w1"], "answer_start": [0]}] * 10,
                                 context=["w1 " * 60] * 10),
         f"{_TRAIN}: row 0: answers has the answer 'w1 w1 w1 w1 w1 w1 w1 w1 w1 w1 w1 w1 w1 w1 w1 w1 w1 w1 w1..., which "
         "is whole in no window, as two share 10 tokens (task.doc_stride); raise it; " + _MEND),
    Case("windows that would not advance", lambda desk: _questions(desk, ANSWERS, ", doc_stride: 32"),
         "override task={type: question-answering, max_length: 32, doc_stride: 32}: task.doc_stride 32 leaves nothing "
         "new in windows of 32; lower it"),
    Case("a translation into a language that is not there",
         lambda desk: _pairs(desk, ", translation: t, source: en, target: fr", t=[{"en": "w1", "de": "w2"}] * 10),
         f"{_TRAIN}: row 0: t has no fr, only en, de; {_MEND}"),
    Case("a translation that is null",
         lambda desk: _pairs(desk, ", translation: t, source: en, target: de",
                             t=[*[{"en": "w1", "de": "w2"}] * 9, {"en": "w1"}]),
         f"{_TRAIN}: row 9: t.de is null; {_MEND}"),
    Case("a translation that is a string",
         lambda desk: _pairs(desk, ", translation: t, source: en, target: de", t=["w1 w2"] * 10),
         f"{_TRAIN}: row 0: t is 'w1 w2', which is not a text by language ({{en: ..., de: ...}}); {_MEND}"),
    Case("a translation from a language into itself",
         lambda desk: _pairs(desk, ", translation: t, source: en, target: en", t=[{"en": "w1"}] * 10),
         "override ...: task.source and target are both en, so there is nothing to learn; name two keys"),
    Case("a text that is its own target", lambda desk: _pairs(desk, ", source: t, target: t", t=["w1"] * 10),
         "task: column 't' is both input and label, so there is nothing to learn; name two"),
    Case("one language of two",
         lambda desk: _pairs(desk, ", source_lang: en_XX", source=["w1"] * 10, target=["w2"] * 10),
         "override ...: task.target_lang is missing, but a model of many languages needs both; name it"),
    Case("languages of a model that marks none",
         lambda desk: _pairs(desk, ", source_lang: en_XX, target_lang: de_DE", source=["w1"] * 10, target=["w2"] * 10),
         "task.source_lang: en_XX, but the tokenizer of ... marks no languages; drop it"),
    Case("an encoder that cannot write",
         lambda desk: _pairs(desk, "", "text-classification", source=["w1"] * 10, target=["w2"] * 10),
         "model.name: ... is a bert model, of which transformers has no AutoModelForSeq2SeqLM; give a model that can "
         "do the task"),
    Case("a text of unknown words to mask", lambda desk: _masked(desk, [*["w1 w2"] * 9, "unseen"]),
         f"{_TRAIN}: row 9: text has no token to predict; {_MEND}"),
    Case("a text to mask that is a list", lambda desk: _masked(desk, [["w1", "w2"]] * 10),
         f"{_TRAIN}: row 0: text is ['w1', 'w2'], which is not text; {_MEND}"),
    Case("a tokenizer without a mask", lambda desk: _masked(desk, ["w1 w2"] * 10, "text-classification"),
         "model.name: the tokenizer of ... has no mask token, so no token can be hidden; give a model that was "
         "pretrained with masks, such as BERT"),
    Case("completions that are the same", lambda desk: _preference(desk, rejected=["w2"] * 10),
         f"{_TRAIN}: row 0: chosen and rejected are the same, so there is nothing to prefer; {_MEND}"),
    Case("completions that differ after max_length",
         lambda desk: _preference(desk, chosen=["w2 " * 40 + "w3"] * 10, rejected=["w2 " * 40 + "w4"] * 10),
         f"{_TRAIN}: row 0: chosen and rejected are the same in their first 32 tokens (task.max_length); {_MEND}"),
    Case("an empty completion", lambda desk: _preference(desk, chosen=["w2"] * 9 + [""]),
         f"{_TRAIN}: row 9: chosen is empty; {_MEND}"),
    Case("completions without a prompt that are texts", lambda desk: _preference(desk, ", prompt: null"),
         f"{_TRAIN}: row 0: chosen is a text, and without task.prompt it should be a list of messages; {_MEND}"),
    Case("a judgement that is neither true nor false", lambda desk: _kto(desk, label=["good", "bad"] * 5),
         f"{_TRAIN}: row 0: label is 'good', which is neither true nor false; {_MEND}"),
    Case("a preference without a chat template", lambda desk: [_without_template(desk)[1], _preference(desk)[0]],
         "task.chat_template: missing, and the tokenizer of DESK/gpt has none; set chatml, or one of your own"),
    Case("a reference without knowledge", lambda desk: [*_preference(desk), "model.from_config={model_type: gpt2}"],
         "model.from_config: loss dpo compares with the model that training starts from, which has learned nothing; "
         "give a pretrained model.name alone, or set task.loss: orpo"),
    Case("pictures that are not there", lambda desk: _pictures(desk, [str(desk.folder / "data" / "gone.png")] * 4),
         f"{_TRAIN}: row 0: image is ..., which is not a file of this machine; {_MEND}"),
    Case("pictures outside of the data", lambda desk: _pictures(desk, ["/dev/zero"] * 4),
         f"{_TRAIN}: row 0: image is '/dev/zero', which is outside of the directories of the data; if you trust the "
         f"authors of the data, add its directory to data.files_below; {_MEND}"),
    Case("pictures without end", lambda desk: [*_pictures(desk, ["/dev/zero"] * 4), "data.files_below=/dev"],
         f"{_TRAIN}: row 0: image is '/dev/zero', which is not a file of this machine; {_MEND}"),
    Case("pictures that are none", lambda desk: _pictures(desk, [b"\x89PNG and then nothing"] * 4),
         f"{_TRAIN}: row 0: image is not a picture (21 bytes of no known format); {_MEND}"),
    Case("pictures under another key", lambda desk: _pictures(desk, [{"content": b"x"}] * 4),
         f"{_TRAIN}: row 0: image holds content, but neither bytes nor path; {_MEND}"),
    Case("pictures that are numbers", lambda desk: _pictures(desk, pa.array([1, 2, 3, 4])),
         f"{_TRAIN}: row 0: image is int, which is not a file; {_MEND}"),
    Case("queries without documents",
         lambda desk: _texts(desk, "type: sentence-embedding, max_length: 32", query=["w1"] * 4, answer=["w2"] * 4),
         f"{_TRAIN}: has no column 'positive', which the task reads; the file has query, answer (see task:)"),
    Case("a query that is its own document",
         lambda desk: _texts(desk, "type: sentence-embedding, max_length: 32, positive: query", query=["w1"] * 4),
         "task: column 'query' is both input and label, so there is nothing to learn; name two"),
    Case("documents that are lists",
         lambda desk: _texts(desk, "type: sentence-embedding, max_length: 32",
                             query=["w1"] * 4, positive=[["w2"], ["w3", "w4"]] * 2),
         f"{_TRAIN}: row 0: positive is ['w2'], which is not text; {_MEND}"),
    Case("scores that no cosine reaches",
         lambda desk: _texts(desk, "type: sentence-embedding, max_length: 32, loss: cosine",
                             text_a=["w1"] * 4, text_b=["w2"] * 4, score=[0.5, 4.2, 0.1, 3.0]),
         f"{_TRAIN}: row 1: score is 4.2, which is not between -1 and 1; set task.max_score to the score of equal "
         f"texts; {_MEND}"),
    Case("negatives for scored pairs", lambda desk: ["task={type: sentence-embedding, loss: cosent, negatives: neg}"],
         "override task={type: sentence-embedding, loss: cosent, negatives: neg}: task.negatives has no meaning for "
         "loss cosent; drop negatives, or name another loss"),
    Case("nothing to rank",
         lambda desk: _texts(desk, "type: reranking, max_length: 32",
                             query=["w1"] * 4, positive=["w2"] * 4, negatives=[["w3"], []] * 2),
         f"{_TRAIN}: row 1: negatives has no document besides the positive, so there is nothing to rank; {_MEND}"),
    Case("no image processor", _without_processor,
         "model.name: DESK/vit has no image processor; put its preprocessor_config.json next to the weights"),
]  # fmt: skip


@check_and("train", CASES)
def test_rows_of_the_wrong_kind_are_refused(command: str, case: Case, desk: Desk) -> None:
    desk.refuses_case(command, case)
