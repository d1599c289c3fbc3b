"""Choose the task and its columns from the profile of the data and the user's choices. Pure functions; client.

Each rule recognises one form of data; the first that matches decides. Data of a task that the launcher does not have is
refused with a reason. Read `defaults.py` next for the other keys of the job file.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

from launcher.errors import DataError
from launcher.init.column_roles import (
    ANSWERED,
    CONVERSATIONS,
    DOCUMENTS,
    NEGATIVES,
    PAIRS,
    PROMPTS,
    SIMILAR,
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
from launcher.init.profile import Column, DataProfile, Labels
from launcher.models.conversation import UNREAD, USUAL

_FLAGS = "--task, --text COLUMN, --label COLUMN"
Form = Kind | Literal["words", "spans", "text", "messages", "prompt", "ranking"]

_NEEDS = {
    "text-classification": "a column of texts and one of labels",
    "token-classification": "words with a tag for each, or a text and a list of {start, end, label}",
    "causal-lm": "a column of texts, of conversations ({role, content}), or of prompts and one of answers",
    "image-classification": "a column of pictures and one of classes",
    "sentence-embedding": "a column of queries and one of documents that answer them, or two of texts and a score",
    "reranking": "columns of queries, of documents that answer them, and of negatives that do not",
}
TASKS = tuple(_NEEDS)
# A text column without a usual name must be this many times longer than the next one to be chosen.
_CLEARLY_LONGER = 3.0
_SHORTEST_TEXT = 5.0
# Sequences of letters (proteins, DNA) instead of words: without spaces, and longer than words.
_UNSPACED = 0.05
_LONG_WORD = 20
_UNLABELLED = "-1"


@dataclass(frozen=True)
class UserChoices:
    """Choices of the user, from options or answers. Empty fields are guessed."""

    task: str | None = None
    inputs: tuple[str, ...] = ()
    """Columns that the model reads."""
    label: str | None = None
    """Column that it learns to predict; "" for none, None to guess."""


@dataclass(frozen=True)
class Guess:
    """Chosen task and columns, with reasons."""

    task: str
    form: Form
    inputs: tuple[Column, ...]
    label: Column | None
    """Label column; None if the model learns from its inputs alone."""
    why: str
    """Reason for the task."""
    reasons: dict[str, str] = field(default_factory=dict)
    """Reason for each column, by name."""
    notes: tuple[str, ...] = ()
    """Notes for the user on columns that are not read."""
    beside: Mapping[str, Column] = field(default_factory=dict)
    """Additional columns (system message, tools, input of a prompt), by the key of the job file."""

    @property
    def has_unnamed_tags(self) -> bool:
        """Return True if tags are numbers without names in the files."""
        label = self.label
        return self.form == "words" and label is not None and label.shape == "integers" and not label.class_names

    def known_labels(self, labels: Labels) -> tuple[str, ...]:
        """Return the classes that the run will learn."""
        assert self.label is not None
        counted = (value for value, _ in labels.counts if not self.is_unlabelled(value, labels))
        return self.label.class_names or tuple(counted)

    def has_unlabelled(self, labels: Labels) -> bool:
        """Return True if -1 marks rows without a label."""
        return any(self.is_unlabelled(value, labels) for value, _ in labels.counts)

    def is_unlabelled(self, value: str, labels: Labels) -> bool:
        """Return True if a label is -1 and the others are class numbers from 0, so that it marks rows without one."""
        assert self.label is not None
        if value != _UNLABELLED or self.label.shape not in ("integer", "integers", "number"):
            return False
        others = {other for other, _ in labels.counts} - {_UNLABELLED}
        # -1 among -1, 0 and 1 may also be a third class. It counts as a mark, as `datasets` uses it, if the other
        # labels count from 0.
        is_counted = len(others) > 1 and others == {str(i) for i in range(len(others))}
        return is_counted or bool(self.label.class_names)


def guess_task(profile: DataProfile, choices: UserChoices) -> Guess:
    """Choose the task and its columns.

    Raises:
        DataError: A column that the user named is missing or does not fit, or no rule matches. The text has the remedy.
    """
    for name in choices.inputs:
        profile.column(name)
    if choices.label:
        profile.column(choices.label, "--label")
    # A choice of the user overrides the refusal: names of columns are only signs of another task.
    reason = None if choices.task or choices.inputs else unsupported_reason(profile)
    if reason is not None:
        remedy = "" if ";" in reason else f"; if another task is meant, name it: {_FLAGS}"
        raise DataError(f"{profile.where}: {reason}{remedy}")
    for task, rule in _RULES:
        result = rule(profile, choices) if choices.task in (None, task) else None
        if result is not None:
            return result
    if choices.task is not None:
        where = "the columns named are" if choices.inputs and choices.label else f"{profile.where} has"
        listed = ", ".join(profile.column(n).describe() for n in (*choices.inputs, choices.label or "") if n)
        what = listed if choices.inputs and choices.label else profile.describe_columns()
        raise DataError(
            f"{choices.task} needs {_NEEDS[choices.task]}; {where} {what}; name columns by --text and --label"
        )
    kinds = {column.shape for column in profile.columns}
    table = kinds <= {"number", "integer", "flag", "text"} and not text_columns(profile.columns)
    what = "these are numbers and categories, and the launcher has no task for tables" if table else "no task fits them"
    raise DataError(
        f"{profile.where} has the columns {profile.describe_columns()}: {what}; if one is meant, name it: {_FLAGS}"
    )


def _guess_images(profile: DataProfile, choices: UserChoices) -> Guess | None:
    pictures = [c for c in _inputs(profile, choices) if c.shape == "picture"]
    if not pictures:
        return None
    image = pictures[0]
    label = _label(profile, choices, (image.name,))
    if label is None:
        raise DataError(
            f"{profile.where}: column {image.name} holds pictures, and no other column looks like their class "
            f"({profile.describe_columns()}); name it with --label"
        )
    kind = kind_of(label)
    if kind == "regression" and label.shape == "integer":
        # Pictures have classes only, however many.
        kind = "single-label"
    if kind == "regression":
        raise DataError(f"--label {label.name}: its values are numbers with a fraction, and pictures have classes only")
    why = f"pictures are in column {image.name}, their classes in {label.name}"
    return Guess("image-classification", kind, (image,), label, why, {image.name: "pictures", **_because(label)})


def _guess_conversations(profile: DataProfile, choices: UserChoices) -> Guess | None:
    conversations = [c for c in _inputs(profile, choices) if c.shape == "messages"]
    if not conversations or (choices.label and choices.inputs):
        return None
    column = min(conversations, key=lambda c: rank(c.name, CONVERSATIONS))
    if "assistant" not in column.roles:
        raise DataError(
            f"{profile.where}: column {column.name} has the roles {', '.join(column.roles[:6]) or 'none'}, and none of "
            "them is the assistant, whose messages are learned; rename a role to assistant"
        )
    reasons = {column.name: f"conversations of {', '.join(column.roles[:4])}"}
    beside = beside_of(profile.columns, ("system", "tools"), (column,))
    notes = _unread_notes(profile, (column, *beside.values()))
    why = f"column {column.name} holds conversations"
    return Guess("causal-lm", "messages", (column,), None, why, reasons, notes, beside)


def _guess_tags(profile: DataProfile, choices: UserChoices) -> Guess | None:
    inputs = _inputs(profile, choices)
    labels = [profile.column(choices.label)] if choices.label else list(profile.columns)
    # A list of tags is a list of words too, and has the fewer distinct items.
    for words in sorted((c for c in inputs if c.shape == "words"), key=lambda c: -c.distinct):
        tags = [
            c for c in labels if c is not words and c.shape in ("integers", "words") and _has_tag_per_word(words, c)
        ]
        if tags:
            label = min(tags, key=lambda c: rank(c.name, TAGS))
            why = f"column {label.name} has a tag for each word of {words.name}"
            reasons = {words.name: "lists of words", label.name: "a tag for each word"}
            result = Guess("token-classification", "words", (words,), label, why, reasons)
            note = f"tags in column {label.name} are numbers; name them in order in task.labels before training"
            return replace(result, notes=(note,)) if result.has_unnamed_tags else result
    spans = [c for c in labels if c.shape == "spans"]
    texts = text_columns(inputs)
    if not spans or not texts:
        return None
    why = f"column {spans[0].name} marks places in {texts[0].name}"
    reasons = {texts[0].name: _text_reason(texts[0]), spans[0].name: "places of entities: {start, end, label}"}
    return Guess("token-classification", "spans", (texts[0],), spans[0], why, reasons)


def _has_tag_per_word(words: Column, tags: Column) -> bool:
    """Return True if the lists of two columns have equal lengths in 95 % of the rows, and some list has two items."""
    pairs = list(zip(words.lengths, tags.lengths, strict=True))
    equal = sum(a == b for a, b in pairs)
    # Lists of one item each would match any label. A few rows may be broken: a run reports or skips them.
    return max(words.lengths, default=0) > 1 and equal >= 0.95 * len(pairs)


def _guess_prompts(profile: DataProfile, choices: UserChoices) -> Guess | None:
    if choices.inputs and choices.label:
        prompt = profile.column(choices.inputs[0])
        answer = profile.column(choices.label)
        fits = prompt.shape in ("text", "messages") and answer.shape == "text" and len(choices.inputs) == 1
        # Unless the user names the task, a column with few distinct values is a class, not an answer.
        is_class = is_category(answer) or label_columns((answer,), ())
        if not fits or (choices.task is None and is_class):
            return None
    else:
        # With a label, a question and its answer are a pair of texts to classify.
        has_label = any(rank(c.name, SURE_LABELS) < len(SURE_LABELS) for c in profile.columns)
        pair = pair_of(profile.columns, PROMPTS)
        if pair is None or choices.label == "" or (has_label and choices.task is None) or not _agrees(pair, choices):
            return None
        prompt, answer = pair
    why = f"columns {prompt.name} and {answer.name} are prompts and their answers"
    reasons = {prompt.name: _text_reason(prompt), answer.name: f"{_text_reason(answer)}; only these are learned"}
    keys = ("system", "tools") if prompt.shape == "messages" else ("input", "system", "tools")
    beside = beside_of(profile.columns, keys, (prompt, answer))
    notes = _unread_notes(profile, (prompt, answer, *beside.values()))
    return Guess("causal-lm", "prompt", (prompt,), answer, why, reasons, notes, beside)


def _guess_queries(profile: DataProfile, choices: UserChoices, task: str = "sentence-embedding") -> Guess | None:
    if choices.label or (choices.inputs and choices.task is None):
        return None
    # Beside a label, a query and a passage are two texts to classify.
    has_label = bool(label_columns(profile.columns, ()))
    pair = pair_of(profile.columns, ANSWERED) or (None if has_label else pair_of(profile.columns, DOCUMENTS))
    named = _inputs(profile, choices) if choices.inputs else list(pair or ())
    if len(named) not in (2, 3) or any(column.shape != "text" for column in named[:2]):
        return None
    rest = named[2:] or [c for c in profile.columns if c not in named and rank(c.name, NEGATIVES) < len(NEGATIVES)]
    negatives = [c for c in rest if c.shape in ("text", "words")][:1]
    if task == "reranking" and not negatives:
        return None
    query, positive = named[:2]
    why = f"column {positive.name} has the document that answers each {query.name}"
    reasons = {column.name: _text_reason(column) for column in named[:2]}
    notes = () if task == "reranking" or not negatives else (_RERANKING_NOTE,)
    beside = {"negatives": negatives[0]} if negatives else {}
    return Guess(task, "ranking", (query, positive), None, why, reasons, notes, beside)


_RERANKING_NOTE = "a model that reads query and document together is slower and more exact: --task reranking"


def _guess_scored_pairs(profile: DataProfile, choices: UserChoices) -> Guess | None:
    if choices.inputs and choices.task is None:
        return None
    texts = _inputs(profile, choices) if choices.inputs else list(pair_of(profile.columns, SIMILAR) or ())
    if len(texts) != 2 or any(column.shape != "text" for column in texts):
        return None
    label = _label(profile, choices, [c.name for c in texts])
    # Grades are classes for `text-classification`; here any number will do, as its order is learned.
    if (
        label is None
        or label.shape not in ("number", "integer")
        or (choices.task is None and kind_of(label) != "regression")
    ):
        return None
    why = f"column {label.name} says how similar {texts[0].name} and {texts[1].name} are"
    reasons = {**{c.name: _text_reason(c) for c in texts}, **_because(label)}
    note = "a model that reads both texts together is slower and more exact: --task text-classification"
    return Guess("sentence-embedding", "regression", tuple(texts), label, why, reasons, (note,))


def _unread_notes(profile: DataProfile, read: Sequence[Column]) -> tuple[str, ...]:
    """Return notes on columns with a name that belongs to prompts or conversations, and that the task does not read."""
    names = [name for usual in (*USUAL.values(), UNREAD) for name in usual]
    more = [c.name for c in profile.columns if plain(c.name) in names and c not in read]
    return tuple(f"column {name} is not read; put it into the prompts or conversations if it matters" for name in more)


def _agrees(pair: tuple[Column, Column], choices: UserChoices) -> bool:
    """Return True if a pair agrees with the column that the user named."""
    return choices.inputs in ((), (pair[0].name,)) and choices.label in (None, pair[1].name)


def _guess_labelled_texts(profile: DataProfile, choices: UserChoices) -> Guess | None:
    if len(choices.inputs) > 2:
        raise DataError(f"--text {','.join(choices.inputs)}: text-classification reads one column, or two as a pair")
    taken = {choices.label} if choices.label else set()
    inputs = [c for c in _inputs(profile, choices) if c.name not in taken]
    # Columns that the user has named are read as they are, in their order.
    pair = None if choices.inputs else pair_of(inputs, PAIRS)
    texts = [c for c in inputs if c.shape == "text"] if choices.inputs else list(pair or text_columns(inputs)[:1])
    label = _label(profile, choices, [c.name for c in texts], sole=True)
    if label is None or not texts or len(texts) < len(choices.inputs):
        return None
    if choices.label and label.shape not in ("text", "integer", "flag", "number", "words", "integers"):
        raise DataError(f"--label {label.name}: its values are {label.type}, which is not a label of a text")
    what = f"columns {texts[0].name} and {texts[1].name}" if len(texts) == 2 else f"column {texts[0].name}"
    why = f"texts are in {what}, their labels in {label.name}"
    reasons = {**{c.name: _text_reason(c) for c in texts}, **_because(label)}
    rest = [c.name for c in text_columns(profile.columns) if c not in texts and c is not label]
    notes = []
    if rest and len(texts) == 1 and not choices.inputs:
        notes.append(f"not read: {', '.join(rest)}; --text {texts[0].name},{rest[0]} reads two as a pair")
    # Sequences of letters, such as proteins, which are no words. Other scripts without spaces are no such case.
    notes += [
        f"texts in column {c.name} have no spaces: name a model for such sequences with --model"
        for c in texts
        if c.spaced < _UNSPACED and c.foreign < _UNSPACED and c.characters > _LONG_WORD
    ]
    return Guess("text-classification", kind_of(label), tuple(texts), label, why, reasons, tuple(notes))


def _guess_texts(profile: DataProfile, choices: UserChoices) -> Guess | None:
    if choices.label:
        return None
    texts = text_columns(_inputs(profile, choices)) or [c for c in _inputs(profile, choices) if choices.inputs]
    texts = [c for c in texts if c.shape == "text"]
    if not texts or (choices.inputs and len(texts) != 1):
        return None
    text = texts[0]
    is_named = bool(choices.inputs) or rank(text.name, TEXTS) < len(TEXTS)
    # Without a usual name, only a clear difference decides. A wrong column would train without any error.
    rivals = [c for c in texts[1:] if c.mean_tokens * _CLEARLY_LONGER > text.mean_tokens]
    if not is_named and (rivals or text.mean_tokens < _SHORTEST_TEXT):
        return None
    why = f"column {text.name} holds texts and no column looks like a label or an answer"
    return Guess("causal-lm", "text", (text,), None, why, {text.name: _text_reason(text)})


_Rule = Callable[[DataProfile, UserChoices], Guess | None]
# The order matters: a data set with images or conversations often has a text column too.
_RULES: tuple[tuple[str, _Rule], ...] = (
    ("image-classification", _guess_images),
    ("causal-lm", _guess_conversations),
    ("token-classification", _guess_tags),
    ("sentence-embedding", _guess_queries),
    ("reranking", partial(_guess_queries, task="reranking")),
    ("causal-lm", _guess_prompts),
    ("sentence-embedding", _guess_scored_pairs),
    ("text-classification", _guess_labelled_texts),
    ("causal-lm", _guess_texts),
)


def _inputs(profile: DataProfile, choices: UserChoices) -> list[Column]:
    return [profile.column(name) for name in choices.inputs] if choices.inputs else list(profile.columns)


def _label(
    profile: DataProfile, choices: UserChoices, taken: tuple[str, ...] | list[str], sole: bool = False
) -> Column | None:
    """Return the label column: the user's choice, else the best by name, else the only remaining one; None if unclear.

    Args:
        profile: Profile of the data.
        choices: Choices of the user.
        taken: Names of input columns.
        sole: Whether the remaining column must have few distinct values, and may have texts next to it.
    """
    if choices.label:
        return profile.column(choices.label, "--label")
    named = label_columns(profile.columns, taken)
    if named:
        return named[0]
    if sole:
        return lone_category(profile.columns, taken)
    rest = [c for c in profile.columns if c.name not in taken and not is_id(c)]
    return rest[0] if len(rest) == 1 and rest[0].distinct > 1 else None


def _text_reason(column: Column) -> str:
    if column.shape == "messages":
        return "conversations"
    return f"texts of about {max(1, round(column.mean_tokens))} tokens"


def _because(label: Column) -> dict[str, str]:
    if label.class_names:
        return {label.name: f"{len(label.class_names)} classes with names in the files"}
    return {label.name: f"{label.distinct} different values"}


_LANGUAGES = frozenset((  # ISO 639-1
    "ar", "bg", "bn", "ca", "cs", "cy", "da", "de", "el", "en", "es", "et", "eu", "fa", "fi", "fr", "ga", "gl",
    "gu", "he", "hi", "hr", "hu", "hy", "is", "it", "ja", "ka", "kk", "kn", "ko", "lt", "lv", "mk", "ml", "mn",
    "mr", "ms", "mt", "nb", "nl", "nn", "no", "pa", "pl", "ps", "pt", "ro", "ru", "si", "sk", "sl", "sq", "sr",
    "sv", "sw", "ta", "te", "th", "tl", "tr", "uk", "ur", "uz", "vi", "zh",
))  # fmt: skip
_PREFERRED = {"chosen", "rejected"}


def unsupported_reason(profile: DataProfile) -> str | None:
    """Return why the data belongs to a task that the launcher does not have, as a clause; None if it may have one."""
    return next((reason for reason in (check(profile) for check in _UNSUPPORTED) if reason is not None), None)


def _shaped(profile: DataProfile, *shapes: str) -> list[Column]:
    return [column for column in profile.columns if column.shape in shapes]


def _find_column(what: str, matches: Callable[[Column], bool], profile: DataProfile) -> str | None:
    names = [column.name for column in profile.columns if matches(column)]
    return f"column {names[0]} {what}, for which the launcher has no task" if names else None


def _find_preferences(profile: DataProfile) -> str | None:
    names = {column.name for column in profile.columns}
    if names >= _PREFERRED:
        return "columns chosen and rejected are preferences (DPO), for which the launcher has no task"
    conversations = {column.name for column in _shaped(profile, "messages")}
    if conversations >= {"prompt", "completion"}:
        if "label" in names:
            what = "judged answers (KTO), for which the launcher has no task"
        else:
            what = "two halves of a conversation; join them into one column of messages, which causal-lm reads"
        return f"columns prompt and completion are {what}"
    return None


def _find_image_pairs(profile: DataProfile) -> str | None:
    columns = _shaped(profile, "picture")
    if len(columns) < 2:
        return None
    names = f"columns {columns[0].name} and {columns[1].name}"
    if any(word in column.name.lower() for column in columns for word in ("mask", "segment", "annotation")):
        return f"{names} are pictures and masks (segmentation), for which the launcher has no task"
    return f"{names} both hold pictures, and the launcher's image-classification reads one per row"


def _find_translated_texts(profile: DataProfile) -> str | None:
    texts = [column.name for column in _shaped(profile, "text") if column.mean_tokens >= 3]
    names = [n for n in texts if n.lower()[:2] in _LANGUAGES and (len(n) == 2 or n[2:3] in ("_", "-"))]
    # Two letters may be a word, such as `no` or `it`, so one name is not enough.
    if len(names) >= 2:
        return f"columns {names[0]} and {names[1]} are translations, for which the launcher has no task"
    return None


def _find_other_conversations(profile: DataProfile) -> str | None:
    columns = [column for column in _shaped(profile, "structs") if column.problem]
    if not columns or _shaped(profile, "messages"):
        return None
    return f"column {columns[0].name} holds conversations that causal-lm does not read ({columns[0].problem})"


def _find_one_hot(profile: DataProfile) -> str | None:
    for column in _shaped(profile, "integers", "numbers"):
        # A list of class numbers varies in length, or has other numbers than 0 and 1.
        is_binary = (column.low, column.high) == (0.0, 1.0) and column.distinct == 2
        has_one_length = len(set(column.lengths)) == 1 and column.lengths[0] > 2
        if is_binary and has_one_length and not _shaped(profile, "words"):
            return (
                f"column {column.name} holds a 0 or 1 for each class, and the launcher reads the list of the classes "
                "that apply; write [2, 5] for [0, 0, 1, 0, 0, 1]"
            )
    return None


# The first match is reported.
_UNSUPPORTED: tuple[Callable[[DataProfile], str | None], ...] = (
    partial(_find_column, "holds audio", lambda c: c.shape == "sound"),
    _find_preferences,
    partial(
        _find_column,
        "holds boxes (object detection)",
        lambda c: bool({"bbox", "bboxes", "boxes"} & {c.name.lower(), *map(str.lower, c.keys)}),
    ),
    _find_image_pairs,
    partial(
        _find_column,
        "marks answers in a context (extractive question answering)",
        lambda c: "answer_start" in (c.name, *c.keys),
    ),
    partial(
        _find_column,
        "holds translations",
        lambda c: c.feature.startswith("Translation") or (len(c.keys) > 1 and set(c.keys) <= _LANGUAGES),
    ),
    _find_translated_texts,
    _find_other_conversations,
    _find_one_hot,
)
