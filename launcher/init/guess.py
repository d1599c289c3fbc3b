"""Typed facts and what the user said -> the task and its columns, each with a reason. Pure.

A rule knows one form of data; they are asked in order. Read `settle.py` next for the rest of the job file.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from launcher.errors import DataError
from launcher.init.columns import Column
from launcher.init.hints import (
    CONVERSATIONS,
    PAIRS,
    PROMPTS,
    SURE_LABELS,
    TAGS,
    TEXTS,
    Kind,
    beside_of,
    is_category,
    is_id,
    kind_of,
    label_columns,
    lone_category,
    pair_of,
    plain,
    rank,
    text_columns,
)
from launcher.init.look import DataProfile
from launcher.init.refuse import unsupported_reason
from launcher.models.conversation import UNREAD, USUAL

TASKS = ("text-classification", "token-classification", "causal-lm", "image-classification")
_FLAGS = "--task, --text COLUMN, --label COLUMN"
Form = Kind | Literal["words", "spans", "text", "messages", "prompt"]

_NEEDS = {
    "text-classification": "a column of texts and one of labels",
    "token-classification": "words with a tag for each, or a text and a list of {start, end, label}",
    "causal-lm": "a column of texts, of conversations ({role, content}), or of prompts and one of answers",
    "image-classification": "a column of pictures and one of classes",
}
# A text column without a telling name must be this much longer than the next to be chosen for it.
_CLEARLY_LONGER = 3.0
_SHORTEST_TEXT = 5.0
# Sequences of letters (proteins, DNA), and not words: no spaces, and longer than words are.
_UNSPACED = 0.05
_LONG_WORD = 20


@dataclass(frozen=True)
class UserChoices:
    """What the user said, by flags or answers; what is empty is guessed."""

    task: str | None = None
    inputs: tuple[str, ...] = ()
    """Columns the model sees."""
    label: str | None = None
    """Column it learns to predict; "" for none."""


@dataclass(frozen=True)
class Guess:
    """A task and its columns."""

    task: str
    form: Form
    inputs: tuple[Column, ...]
    label: Column | None
    """None where the model learns from its inputs alone."""
    why: str
    """Why this task."""
    reasons: dict[str, str] = field(default_factory=dict)
    """Why each column, by its name."""
    notes: tuple[str, ...] = ()
    """What the user should know of columns that are not read."""
    beside: Mapping[str, Column] = field(default_factory=dict)
    """Columns that are read beside prompts or conversations, by the key of the job file."""

    @property
    def has_unnamed_tags(self) -> bool:
        """Whether words have numbers as tags, and no file says what these mean."""
        label = self.label
        return self.form == "words" and label is not None and label.shape == "integers" and not label.class_names


def guess(look: DataProfile, wishes: UserChoices) -> Guess:
    """The task and its columns.

    Raises:
        DataError: a column that the user named is not there or does not fit, or nothing fits; the text says what to do.
    """
    for name in wishes.inputs:
        look.column(name)
    if wishes.label:
        look.column(wishes.label, "--label")
    foreign = None if wishes.task or wishes.inputs else unsupported_reason(look)
    if foreign is not None:
        remedy = "" if ";" in foreign else f"; if it is meant for another, say so: {_FLAGS}"
        raise DataError(f"{look.where}: {foreign}{remedy}")
    for task, rule in _RULES:
        found = rule(look, wishes) if wishes.task in (None, task) else None
        if found is not None:
            return found
    if wishes.task is not None:
        where = "the columns named are" if wishes.inputs and wishes.label else f"{look.where} has"
        listed = ", ".join(look.column(n).said() for n in (*wishes.inputs, wishes.label or "") if n)
        what = listed if wishes.inputs and wishes.label else look.listed()
        raise DataError(
            f"{wishes.task} needs {_NEEDS[wishes.task]}; {where} {what}; name columns by --text and --label"
        )
    kinds = {column.shape for column in look.columns}
    table = kinds <= {"number", "integer", "flag", "text"} and not text_columns(look.columns)
    what = "these are numbers and categories, and the launcher has no task for tables" if table else "no task fits them"
    raise DataError(f"{look.where} has the columns {look.listed()}: {what}; if one is meant, say so: {_FLAGS}")


def _image(look: DataProfile, wishes: UserChoices) -> Guess | None:
    pictures = [c for c in _inputs(look, wishes) if c.shape == "picture"]
    if not pictures:
        return None
    image = pictures[0]
    label = _label(look, wishes, (image.name,))
    if label is None:
        raise DataError(
            f"{look.where}: column {image.name} holds pictures, and no other looks like their class "
            f"({look.listed()}); name it by --label"
        )
    kind = kind_of(label)
    if kind == "regression" and label.shape == "integer":
        kind = "single-label"  # pictures have classes only, however many
    if kind == "regression":
        raise DataError(f"--label {label.name}: its values are numbers with a fraction, and pictures have classes only")
    why = f"pictures are in column {image.name}, their classes in {label.name}"
    return Guess("image-classification", kind, (image,), label, why, {image.name: "pictures", **_because(label)})


def _messages(look: DataProfile, wishes: UserChoices) -> Guess | None:
    found = [c for c in _inputs(look, wishes) if c.shape == "messages"]
    if not found or (wishes.label and wishes.inputs):
        return None
    column = min(found, key=lambda c: rank(c.name, CONVERSATIONS))
    if "assistant" not in column.roles:
        raise DataError(
            f"{look.where}: in column {column.name} speak {', '.join(column.roles[:6]) or 'nobody'}, and none of "
            "them is the assistant whose messages are learned; rename a role to assistant"
        )
    reasons = {column.name: f"conversations of {', '.join(column.roles[:4])}"}
    beside = beside_of(look.columns, ("system", "tools"), (column,))
    notes = _unread(look, (column, *beside.values()))
    why = f"column {column.name} holds conversations"
    return Guess("causal-lm", "messages", (column,), None, why, reasons, notes, beside)


def _tokens(look: DataProfile, wishes: UserChoices) -> Guess | None:
    inputs = _inputs(look, wishes)
    labels = [look.column(wishes.label)] if wishes.label else list(look.columns)
    for words in sorted((c for c in inputs if c.shape == "words"), key=lambda c: -c.distinct):
        tags = [c for c in labels if c is not words and c.shape in ("integers", "words") and _tags(words, c)]
        if tags:
            label = min(tags, key=lambda c: rank(c.name, TAGS))
            why = f"column {label.name} has a tag for each word of {words.name}"
            reasons = {words.name: "lists of words", label.name: "a tag for each word"}
            found = Guess("token-classification", "words", (words,), label, why, reasons)
            unnamed = f"tags in column {label.name} are numbers; name them in order in task.labels before training"
            return replace(found, notes=(unnamed,)) if found.has_unnamed_tags else found
    spans, texts = [c for c in labels if c.shape == "spans"], text_columns(inputs)
    if not spans or not texts:
        return None
    why = f"column {spans[0].name} marks places in {texts[0].name}"
    reasons = {texts[0].name: _text_reason(texts[0]), spans[0].name: "places of entities: {start, end, label}"}
    return Guess("token-classification", "spans", (texts[0],), spans[0], why, reasons)


def _tags(words: Column, tags: Column) -> bool:
    """Whether a list is as long as the other in (nearly) all rows, and longer than one somewhere."""
    pairs = list(zip(words.lengths, tags.lengths, strict=True))
    same = sum(a == b for a, b in pairs)
    return max(words.lengths, default=0) > 1 and same >= 0.95 * len(pairs)


def _prompt(look: DataProfile, wishes: UserChoices) -> Guess | None:
    if wishes.inputs and wishes.label:
        found = (look.column(wishes.inputs[0]), look.column(wishes.label))
        # Without a task, a label of few values is a class and no answer.
        fits = found[0].shape in ("text", "messages") and found[1].shape == "text" and len(wishes.inputs) == 1
        is_class = is_category(found[1]) or label_columns(found[1:], ())
        if not fits or (wishes.task is None and is_class):
            return None
    else:
        sure = any(rank(c.name, SURE_LABELS) < len(SURE_LABELS) for c in look.columns)
        pair = pair_of(look.columns, PROMPTS)
        if pair is None or wishes.label == "" or (sure and wishes.task is None) or not _wanted(pair, wishes):
            return None
        found = pair
    prompt, answer = found
    why = f"columns {prompt.name} and {answer.name} are prompts and their answers"
    reasons = {prompt.name: _text_reason(prompt), answer.name: f"{_text_reason(answer)}; only these are learned"}
    keys = ("system", "tools") if prompt.shape == "messages" else ("input", "system", "tools")
    beside = beside_of(look.columns, keys, found)
    notes = _unread(look, (*found, *beside.values()))
    return Guess("causal-lm", "prompt", (prompt,), answer, why, reasons, notes, beside)


def _unread(look: DataProfile, read: Sequence[Column]) -> tuple[str, ...]:
    """Return notes on columns that belong to prompts or conversations, and that the task does not read."""
    names = [name for usual in (*USUAL.values(), UNREAD) for name in usual]
    more = [c.name for c in look.columns if plain(c.name) in names and c not in read]
    return tuple(f"column {name} is not read; put it into the prompts or conversations if it matters" for name in more)


def _wanted(pair: tuple[Column, Column], wishes: UserChoices) -> bool:
    """Whether a pair agrees with the one column that the user named."""
    return wishes.inputs in ((), (pair[0].name,)) and wishes.label in (None, pair[1].name)


def _labelled_text(look: DataProfile, wishes: UserChoices) -> Guess | None:
    if len(wishes.inputs) > 2:
        raise DataError(f"--text {','.join(wishes.inputs)}: text-classification reads one column, or two as a pair")
    taken = {wishes.label} if wishes.label else set()
    inputs = [c for c in _inputs(look, wishes) if c.name not in taken]
    pair = None if wishes.inputs else pair_of(inputs, PAIRS)
    texts = [c for c in inputs if c.shape == "text"] if wishes.inputs else list(pair or text_columns(inputs)[:1])
    label = _label(look, wishes, [c.name for c in texts], sole=True)
    if label is None or not texts or len(texts) < len(wishes.inputs):
        return None
    if wishes.label and label.shape not in ("text", "integer", "flag", "number", "words", "integers"):
        raise DataError(f"--label {label.name}: its values are {label.type}, which is no label of a text")
    what = f"columns {texts[0].name} and {texts[1].name}" if len(texts) == 2 else f"column {texts[0].name}"
    why = f"texts are in {what}, their labels in {label.name}"
    reasons = {**{c.name: _text_reason(c) for c in texts}, **_because(label)}
    rest = [c.name for c in text_columns(look.columns) if c not in texts and c is not label]
    notes = []
    if rest and len(texts) == 1 and not wishes.inputs:
        notes.append(f"not read: {', '.join(rest)}; --text {texts[0].name},{rest[0]} reads two as a pair")
    notes += [
        f"texts in column {c.name} have no spaces: name a model whose tokenizer knows them by --model"
        for c in texts
        if c.spaced < _UNSPACED and c.foreign < _UNSPACED and c.characters > _LONG_WORD
    ]
    return Guess("text-classification", kind_of(label), tuple(texts), label, why, reasons, tuple(notes))


def _text(look: DataProfile, wishes: UserChoices) -> Guess | None:
    if wishes.label:
        return None
    texts = text_columns(_inputs(look, wishes)) or [c for c in _inputs(look, wishes) if wishes.inputs]
    texts = [c for c in texts if c.shape == "text"]
    if not texts or (wishes.inputs and len(texts) != 1):
        return None
    text, clear = texts[0], wishes.inputs or rank(texts[0].name, TEXTS) < len(TEXTS)
    rivals = [c for c in texts[1:] if c.mean_tokens * _CLEARLY_LONGER > text.mean_tokens]
    if not clear and (rivals or text.mean_tokens < _SHORTEST_TEXT):
        return None
    why = f"column {text.name} holds texts and no column looks like a label or an answer"
    return Guess("causal-lm", "text", (text,), None, why, {text.name: _text_reason(text)})


_Rule = Callable[[DataProfile, UserChoices], Guess | None]
_RULES: tuple[tuple[str, _Rule], ...] = (
    ("image-classification", _image),
    ("causal-lm", _messages),
    ("token-classification", _tokens),
    ("causal-lm", _prompt),
    ("text-classification", _labelled_text),
    ("causal-lm", _text),
)


def _inputs(look: DataProfile, wishes: UserChoices) -> list[Column]:
    return [look.column(name) for name in wishes.inputs] if wishes.inputs else list(look.columns)


def _label(
    look: DataProfile, wishes: UserChoices, taken: tuple[str, ...] | list[str], sole: bool = False
) -> Column | None:
    """The column with labels: the user's, or the best by name, or the only one that is left.

    Args:
        look: the data.
        wishes: the user's.
        taken: columns that are inputs.
        sole: whether texts beside it count as left over.
    """
    if wishes.label:
        return look.column(wishes.label, "--label")
    named = label_columns(look.columns, taken)
    if named:
        return named[0]
    rest = [c for c in look.columns if c.name not in taken and not is_id(c)]
    return lone_category(look.columns, taken) if sole else rest[0] if len(rest) == 1 and rest[0].distinct > 1 else None


def _text_reason(column: Column) -> str:
    if column.shape == "messages":
        return "conversations"
    return f"texts of about {max(1, round(column.mean_tokens))} tokens"


def _because(label: Column) -> dict[str, str]:
    if label.class_names:
        return {label.name: f"{len(label.class_names)} classes with names in the files"}
    return {label.name: f"{label.distinct} different values"}
