"""Roles that columns may have (text, prompt, label, id), by name and content. Pure functions; `guess.py` uses them."""

import re
from collections.abc import Collection, Sequence
from typing import Literal

from launcher.init.profile import Column
from launcher.models.conversation import USUAL

Kind = Literal["single-label", "multi-label", "regression"]

# The order of each list is a preference: the first name that a column has decides.
TEXTS = (
    "text", "sentence", "review", "review_body", "review_text", "content", "body", "comment", "comment_text", "tweet",
    "message", "document", "article", "utterance", "sequence", "description", "question", "query", "title",
)  # fmt: skip
SURE_TEXTS = ("text", "sentence", "review")
# Pairs that are two inputs of a classification. `question` and `answer` are here and in PROMPTS: only a label beside
# them tells which (`_guess_prompts`).
PAIRS = (
    ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"), ("text1", "text2"),
    ("text_a", "text_b"), ("sentence_a", "sentence_b"), ("question", "passage"), ("question", "context"),
    ("question", "sentence"), ("query", "passage"), ("query", "document"), ("question", "answer"),
    ("text", "text_pair"), ("claim", "evidence"),
)  # fmt: skip
PROMPTS = (
    ("prompt", "completion"), ("prompt", "response"), ("prompt", "answer"), ("prompt", "output"),
    ("instruction", "output"), ("instruction", "response"), ("question", "answer"), ("question", "response"),
    ("query", "response"), ("input", "output"), ("inputs", "targets"), ("input", "target"), ("user", "assistant"),
    ("problem", "solution"),
)  # fmt: skip
QUESTIONS = ("question", "query", "questions")
CONTEXTS = ("context", "passage", "paragraph", "document", "article", "text", "content", "contexts")
# Texts and what is written of them.
SUMMARIES = (
    ("document", "summary"), ("article", "highlights"), ("article", "summary"), ("dialogue", "summary"),
    ("text", "summary"), ("content", "summary"), ("body", "summary"), ("report", "summary"), ("document", "title"),
    ("article", "title"), ("abstract", "title"), ("source", "target"), ("src", "tgt"), ("source", "summary"),
)  # fmt: skip
# Queries with a document that answers them. With the second ones a label beside them makes it a classification.
ANSWERED = (("query", "positive"), ("anchor", "positive"), ("question", "positive"), ("query", "pos"))
DOCUMENTS = (("query", "document"), ("query", "passage"), ("question", "passage"))
NEGATIVES = ("negative", "negatives", "hard_negative", "hard_negatives", "neg")
# Pairs of the same kind of text, whose score is a similarity.
SIMILAR = (
    ("sentence1", "sentence2"), ("text1", "text2"), ("text_a", "text_b"), ("sentence_a", "sentence_b"),
    ("question1", "question2"),
)  # fmt: skip
PAIR_KEYS, JUDGED_KEYS = ("chosen", "rejected"), ("completion", "label")
"""Columns of preference data, which are keys of the job file too."""
PREFERENCE_PROMPTS = ("prompt", "question", "instruction", "query", "input")
"""Names of the prompts of preference data."""
LABELS = (
    "label", "labels", "gold_label", "target", "targets", "class", "stars", "rating", "sentiment", "score",
    "similarity", "similarity_score", "relatedness_score", "polarity", "toxicity", "emotion", "emotions", "intent",
    "topic", "topics", "genre", "genres", "category", "categories", "tags", "identity", "y",
)  # fmt: skip
# With one of these columns, a prompt and its answer are the text that is classified.
SURE_LABELS = ("label", "labels", "gold_label", "stars", "sentiment", "rating", "score")
# `label` and `tags` are names of single labels too. What counts for tags is one item per word (`_has_tag_per_word`);
# the name only chooses among several such columns.
TAGS = ("ner_tags", "ner", "tags", "labels", "label", "entities", "pos_tags", "upos", "pos", "chunk_tags")
CONVERSATIONS = ("messages", "conversations", "conversation", "dialog", "dialogue", "chat")

_AMOUNTS = ("stars", "rating", "score", "similarity", "similarity_score", "relatedness_score", "toxicity", "target")
# Whole names or their last part: `user_id`, not `identity`, which is a label.
_IDS = re.compile(r"(.*[_-])?(id|idx|index|uuid|guid|hash|key|url|uri|link|path|file|filename|date|time|timestamp)s?")
# Integer grades with more distinct values than this are amounts, not classes.
_MAX_GRADES = 10
_MAX_CLASSES = 1000
# Smallest sample in which all-distinct values identify rows.
_ENOUGH_ROWS = 10


def rank(name: str, names: Sequence[str]) -> int:
    """Return the index of a column's name in a list of names; the length of the list if it is missing."""
    name = plain(name)
    return names.index(name) if name in names else len(names)


def plain(name: str) -> str:
    """Return a column's name in the form of the lists above: `Review Text` is `review_text`."""
    return re.sub(r"[\s.-]+", "_", name.strip().lower())


def is_id(column: Column) -> bool:
    """Return True if a column identifies rows or their origin, by its name or by short values that all differ."""
    # First, as a label may have values that all differ in a small sample, and a text is usually unique.
    if column.class_names or rank(column.name, LABELS) < len(LABELS) or rank(column.name, TEXTS) < len(TEXTS):
        return False
    if _IDS.fullmatch(plain(column.name)):
        return True
    # Nearly all: a few rows may be repeated. Of the rows that are not null.
    is_unique = column.rows >= _ENOUGH_ROWS and column.distinct > 0.98 * (column.rows - column.nulls)
    if column.shape == "text":
        # Scripts without spaces look like ids, hence the share of foreign letters.
        return is_unique and column.spaced < 0.05 and column.foreign < 0.5 and column.characters <= 40
    return is_unique and column.shape == "integer"


def is_category(column: Column) -> bool:
    """Return True if a text column has few distinct, short values."""
    known = max(1, column.rows - column.nulls)
    return column.shape == "text" and column.mean_tokens <= 8 and column.distinct <= max(2, 0.3 * known)


def text_columns(columns: Sequence[Column]) -> list[Column]:
    """Return the columns that may be read as text: by usual names first, then by length."""
    texts = [c for c in columns if c.shape == "text"]
    candidates = [c for c in texts if not is_id(c) and not is_category(c)]
    # Even if their values are few and short, as in a small sample.
    named = [c for c in texts if rank(c.name, SURE_TEXTS) < len(SURE_TEXTS)]
    return sorted(candidates or named, key=lambda c: (rank(c.name, TEXTS), -c.mean_tokens))


def pair_of(columns: Sequence[Column], pairs: Sequence[tuple[str, str]]) -> tuple[Column, Column] | None:
    """Return the first two columns named like a pair that hold texts, or a conversation and its answer; else None."""
    by_name = {plain(c.name): c for c in columns if c.shape in ("text", "messages")}
    for first, second in pairs:
        # An answer may be a conversation too if its prompt is one (TRL's prompt and completion).
        shapes = {by_name[name].shape for name in (first, second) if name in by_name}
        if first in by_name and second in by_name and (by_name[second].shape == "text" or shapes == {"messages"}):
            return by_name[first], by_name[second]
    return None


def beside_of(columns: Sequence[Column], keys: Sequence[str], taken: Collection[Column]) -> dict[str, Column]:
    """Return the columns that go with prompts or conversations, by the key of the job file.

    Args:
        columns: Columns of the data.
        keys: Keys of the job file to look for: `input`, `system`, `tools`.
        taken: Columns that have a role already.
    """
    by_key = {}
    for key in keys:
        # Tools are a list of functions, or its JSON text.
        shapes = ("text", "words", "structs") if key == "tools" else ("text",)
        named = [
            c for c in columns if c.shape in shapes and c not in taken and rank(c.name, USUAL[key]) < len(USUAL[key])
        ]
        if named:
            by_key[key] = min(named, key=lambda c: rank(c.name, USUAL[key]))
    return by_key


def label_columns(columns: Sequence[Column], taken: Collection[str]) -> list[Column]:
    """Return the columns that are labels by their name, or by class names in the metadata of `datasets`; best first."""
    labels = [c for c in columns if c.name not in taken and _can_be_label(c) and _label_rank(c) is not None]
    return sorted(labels, key=lambda c: _label_rank(c) or 0)


def lone_category(columns: Sequence[Column], taken: Collection[str]) -> Column | None:
    """Return the only column besides texts and ids, if it has few distinct values: a label whatever its name."""
    others = [c for c in columns if c.name not in taken and not is_id(c) and c not in text_columns(columns)]
    # A float is no category here: without a name that says so, it is as likely a measurement.
    few = [c for c in others if c.distinct >= 2 and (c.shape == "flag" or is_category(c) or _has_few_integers(c))]
    # With two columns left, any choice is a guess, so the user has to name one.
    return few[0] if len(others) == 1 and few else None


def kind_of(label: Column) -> Kind:
    """Return what a label column is: one class, several classes, or a number."""
    if label.shape in ("words", "integers"):
        return "multi-label"
    # pandas writes integers with nulls as floats (1.0), so a float column may still hold classes.
    if label.shape == "number" and not label.whole:
        return "regression"
    if label.shape not in ("integer", "number") or label.class_names:
        return "single-label"
    # Class numbers are dense; amounts leave most numbers of their range out.
    has_gaps = label.high - label.low + 1 > 3 * label.distinct
    is_grade = plain(label.name) in _AMOUNTS and label.distinct > _MAX_GRADES
    is_amount = label.distinct > _MAX_CLASSES or (has_gaps and label.distinct > 2 * _MAX_GRADES)
    return "regression" if is_grade or is_amount else "single-label"


def _has_few_integers(column: Column) -> bool:
    return column.shape == "integer" and column.distinct <= max(2, 0.05 * column.rows)


def _can_be_label(column: Column) -> bool:
    if column.shape == "text":
        return column.distinct <= max(2, 0.5 * (column.rows - column.nulls))
    return column.shape in ("integer", "flag", "number", "words", "integers")


def _label_rank(column: Column) -> int | None:
    """Return how likely a column is a label (0 first) by name, `ClassLabel` or form of its name; None if unlikely."""
    name = plain(column.name)
    if name in LABELS:
        return LABELS.index(name)
    if column.class_names:
        return len(LABELS)
    if name.endswith(("_label", "_labels", "_class", "_category")) or name.startswith("label_"):
        return len(LABELS) + 1
    is_question = column.shape == "flag" and (name.startswith("is_") or name == "answer")
    return len(LABELS) + 2 if is_question else None
