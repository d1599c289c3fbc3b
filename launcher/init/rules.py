"""Choose the task and its columns from the profile of the data and the user's choices. Pure functions; client.

Each rule recognises one form of data; the first that matches decides. Data of a task that the launcher does not have is
refused with a reason. Read `defaults.py` next for the other keys of the job file.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from launcher.errors import DataError
from launcher.init.column_roles import (
    PAIRS,
    TAGS,
    TEXTS,
    kind_of,
    pair_of,
    rank,
    text_columns,
)
from launcher.init.guess import Guess, UserChoices, chosen_inputs, find_label, label_reason, text_reason
from launcher.init.profile import Column, DataProfile
from launcher.init.text_rules import (
    guess_answers,
    guess_conversations,
    guess_pairs,
    guess_preferences,
    guess_prompts,
    guess_queries,
    guess_scored_pairs,
)

_FLAGS = "--task, --text COLUMN, --label COLUMN"
_NEEDS = {
    "text-classification": "a column of texts and one of labels",
    "token-classification": "words with a tag for each, or a text and a list of {start, end, label}",
    "question-answering": "columns of questions, contexts and answers ({text, answer_start})",
    "causal-lm": "a column of texts, of conversations ({role, content}), or of prompts and one of answers",
    "masked-lm": "a column of texts",
    "seq2seq": "a column of texts to read and one of texts to write, or one of texts by language ({en, de})",
    "preference": "columns chosen and rejected, or prompt, completion and label",
    "reward": "columns chosen and rejected",
    "image-classification": "a column of pictures and one of classes",
    "sentence-embedding": "a column of queries and one of documents that answer them, or two of texts and a score",
    "reranking": "columns of queries, of documents that answer them, and of negatives that do not",
}
# A text column without a usual name must be this many times longer than the next one to be chosen.
_CLEARLY_LONGER = 3.0
_SHORTEST_TEXT = 5.0
# Sequences of letters (proteins, DNA) instead of words: without spaces, and longer than words.
_UNSPACED = 0.05
_LONG_WORD = 20


def guess_task(profile: DataProfile, choices: UserChoices) -> Guess:
    """Choose the task and its columns.

    Raises:
        DataError: A column that the user named is missing or does not fit, or no rule matches. The text has the remedy.
    """
    named = [("--text", name) for name in choices.inputs]
    if choices.label:
        named.append(("--label", choices.label))
    for flag, name in named:
        column = profile.column(name, flag)
        if column.is_empty:
            raise DataError(f"{flag} {name}: is empty in all {column.rows} rows that were read; name another column")
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
    pictures = [c for c in chosen_inputs(profile, choices) if c.shape == "picture"]
    if not pictures:
        return None
    image = pictures[0]
    label = find_label(profile, choices, (image.name,))
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
    return Guess("image-classification", kind, (image,), label, why, {image.name: "pictures", **label_reason(label)})


def _guess_tags(profile: DataProfile, choices: UserChoices) -> Guess | None:
    inputs = chosen_inputs(profile, choices)
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
    reasons = {texts[0].name: text_reason(texts[0]), spans[0].name: "places of entities: {start, end, label}"}
    return Guess("token-classification", "spans", (texts[0],), spans[0], why, reasons)


def _has_tag_per_word(words: Column, tags: Column) -> bool:
    """Return True if the lists of two columns have equal lengths in 95 % of the rows, and some list has two items."""
    pairs = list(zip(words.lengths, tags.lengths, strict=True))
    equal = sum(a == b for a, b in pairs)
    # Lists of one item each would match any label. A few rows may be broken: a run reports or skips them.
    return max(words.lengths, default=0) > 1 and equal >= 0.95 * len(pairs)


def _guess_labelled_texts(profile: DataProfile, choices: UserChoices) -> Guess | None:
    if len(choices.inputs) > 2:
        raise DataError(f"--text {','.join(choices.inputs)}: text-classification reads one column, or two as a pair")
    taken = {choices.label} if choices.label else set()
    inputs = [c for c in chosen_inputs(profile, choices) if c.name not in taken]
    # Columns that the user has named are read as they are, in their order.
    pair = None if choices.inputs else pair_of(inputs, PAIRS)
    texts = [c for c in inputs if c.shape == "text"] if choices.inputs else list(pair or text_columns(inputs)[:1])
    label = find_label(profile, choices, [c.name for c in texts], sole=True)
    if label is None or not texts or len(texts) < len(choices.inputs):
        return None
    if choices.label and label.shape not in ("text", "integer", "flag", "number", "words", "integers"):
        raise DataError(f"--label {label.name}: its values are {label.type}, which is not a label of a text")
    what = f"columns {texts[0].name} and {texts[1].name}" if len(texts) == 2 else f"column {texts[0].name}"
    why = f"texts are in {what}, their labels in {label.name}"
    reasons = {**{c.name: text_reason(c) for c in texts}, **label_reason(label)}
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
    texts = text_columns(chosen_inputs(profile, choices)) or [
        c for c in chosen_inputs(profile, choices) if choices.inputs
    ]
    texts = [c for c in texts if c.shape == "text"]
    if not texts or (choices.inputs and len(texts) != 1):
        return None
    text = texts[0]
    is_named = bool(choices.inputs) or rank(text.name, TEXTS) < len(TEXTS)
    # Without a usual name, only a clear difference decides. A wrong column would train without any error.
    rivals = [c for c in texts[1:] if c.mean_tokens * _CLEARLY_LONGER > text.mean_tokens]
    if not is_named and (rivals or text.mean_tokens < _SHORTEST_TEXT):
        return None
    task = choices.task or "causal-lm"
    why = f"column {text.name} holds texts and no column looks like a label or an answer"
    notes = () if choices.task else ("an encoder (BERT) learns such texts too, by hidden words: --task masked-lm",)
    return Guess(task, "text", (text,), None, why, {text.name: text_reason(text)}, notes)


_Rule = Callable[[DataProfile, UserChoices], Guess | None]
# The order matters: a data set with images or conversations often has a text column too.
_RULES: tuple[tuple[str, _Rule], ...] = (
    ("image-classification", _guess_images),
    ("question-answering", guess_answers),
    ("preference", guess_preferences),
    ("reward", guess_preferences),
    ("causal-lm", guess_conversations),
    ("token-classification", _guess_tags),
    ("sentence-embedding", guess_queries),
    ("reranking", partial(guess_queries, task="reranking")),
    ("causal-lm", guess_prompts),
    ("sentence-embedding", guess_scored_pairs),
    ("seq2seq", guess_pairs),
    ("text-classification", _guess_labelled_texts),
    ("causal-lm", _guess_texts),
    ("masked-lm", _guess_texts),
)


def unsupported_reason(profile: DataProfile) -> str | None:
    """Return why the data belongs to a task that the launcher does not have, as a clause; None if it may have one."""
    return next((reason for reason in (check(profile) for check in _UNSUPPORTED) if reason is not None), None)


def _shaped(profile: DataProfile, *shapes: str) -> list[Column]:
    return [column for column in profile.columns if column.shape in shapes]


def _find_column(what: str, matches: Callable[[Column], bool], profile: DataProfile) -> str | None:
    names = [column.name for column in profile.columns if matches(column)]
    return f"column {names[0]} {what}, for which the launcher has no task" if names else None


def _find_image_pairs(profile: DataProfile) -> str | None:
    columns = _shaped(profile, "picture")
    if len(columns) < 2:
        return None
    names = f"columns {columns[0].name} and {columns[1].name}"
    if any(word in column.name.lower() for column in columns for word in ("mask", "segment", "annotation")):
        return f"{names} are pictures and masks (segmentation), for which the launcher has no task"
    return f"{names} both hold pictures, and the launcher's image-classification reads one per row"


def _find_flat_answers(profile: DataProfile) -> str | None:
    if "answer_start" not in {column.name for column in profile.columns}:
        return None
    remedy = "join it with their texts into one column of {text, answer_start}"
    return f"column answer_start says where answers begin, and question-answering reads lists of them; {remedy}"


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
    partial(
        _find_column,
        "holds boxes (object detection)",
        lambda c: bool({"bbox", "bboxes", "boxes"} & {c.name.lower(), *map(str.lower, c.keys)}),
    ),
    _find_image_pairs,
    _find_flat_answers,
    partial(
        _find_column,
        "holds translations of varying languages",
        lambda c: c.feature == "TranslationVariableLanguages",
    ),
    _find_other_conversations,
    _find_one_hot,
)
