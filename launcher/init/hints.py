"""Which columns may be texts and labels, by name and by what is in them. Pure; `guess.py` makes a task of it."""

import re
from collections.abc import Collection, Sequence
from typing import Literal

from launcher.init.columns import Column
from launcher.models.conversation import USUAL

Kind = Literal["single-label", "multi-label", "regression"]

TEXTS = (
    "text", "sentence", "review", "review_body", "review_text", "content", "body", "comment", "comment_text", "tweet",
    "message", "document", "article", "utterance", "sequence", "description", "question", "query", "title",
)  # fmt: skip
SURE_TEXTS = ("text", "sentence", "review")
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
LABELS = (
    "label", "labels", "gold_label", "target", "targets", "class", "stars", "rating", "sentiment", "score",
    "similarity", "similarity_score", "relatedness_score", "polarity", "toxicity", "emotion", "emotions", "intent",
    "topic", "topics", "genre", "genres", "category", "categories", "tags", "identity", "y",
)  # fmt: skip
# Beside these, a prompt with its answer is only the text that they judge.
SURE_LABELS = ("label", "labels", "gold_label", "stars", "sentiment", "rating", "score")
TAGS = ("ner_tags", "ner", "tags", "labels", "label", "entities", "pos_tags", "upos", "pos", "chunk_tags")
CONVERSATIONS = ("messages", "conversations", "conversation", "dialog", "dialogue", "chat")

_AMOUNTS = ("stars", "rating", "score", "similarity", "similarity_score", "relatedness_score", "toxicity", "target")
_IDS = re.compile(r"(.*[_-])?(id|idx|index|uuid|guid|hash|key|url|uri|link|path|file|filename|date|time|timestamp)s?")
# More classes than a person would call stars or scores: then the order of the numbers is what matters.
_FEW_GRADES = 10
_MANY_CLASSES = 1000
# From this size of a sample on, values that are all different say something.
_ENOUGH_ROWS = 10


def rank(name: str, names: Sequence[str]) -> int:
    """Where a column's name stands in a list of names; their number where it does not."""
    name = plain(name)
    return names.index(name) if name in names else len(names)


def plain(name: str) -> str:
    """A column's name as the lists here have it: `Review Text` is `review_text`."""
    return re.sub(r"[\s.-]+", "_", name.strip().lower())


def is_id(column: Column) -> bool:
    """Whether a column names rows (all different and short) or says where they are from: neither text nor label."""
    if column.class_names or rank(column.name, LABELS) < len(LABELS) or rank(column.name, TEXTS) < len(TEXTS):
        return False
    if _IDS.fullmatch(plain(column.name)):
        return True
    unique = column.rows >= _ENOUGH_ROWS and column.distinct > 0.98 * (column.rows - column.nulls)
    if column.shape == "text":
        return unique and column.spaced < 0.05 and column.foreign < 0.5 and column.characters <= 40
    return unique and column.shape == "integer"


def is_category(column: Column) -> bool:
    """Whether a text column holds one of a few short values."""
    known = max(1, column.rows - column.nulls)
    return column.shape == "text" and column.mean_tokens <= 8 and column.distinct <= max(2, 0.3 * known)


def text_columns(columns: Sequence[Column]) -> list[Column]:
    """Columns that may be read as text: those with a telling name first, then the longest."""
    texts = [c for c in columns if c.shape == "text"]
    found = [c for c in texts if not is_id(c) and not is_category(c)]
    sure = [c for c in texts if rank(c.name, SURE_TEXTS) < len(SURE_TEXTS)]  # of few short texts, if it says so
    return sorted(found or sure, key=lambda c: (rank(c.name, TEXTS), -c.mean_tokens))


def pair_of(columns: Sequence[Column], pairs: Sequence[tuple[str, str]]) -> tuple[Column, Column] | None:
    """The first two columns that are named like a pair, and hold texts (or a conversation and its answer)."""
    by_name = {plain(c.name): c for c in columns if c.shape in ("text", "messages")}
    for one, two in pairs:
        if one in by_name and two in by_name and by_name[two].shape == "text":
            return by_name[one], by_name[two]
    return None


def beside_of(columns: Sequence[Column], keys: Sequence[str], taken: Collection[Column]) -> dict[str, Column]:
    """Return the columns that stand beside prompts or conversations, by the key of the job file.

    Args:
        columns: Columns of the data.
        keys: Keys that are of use.
        taken: Columns that are read already.
    """
    found = {}
    for key in keys:
        shapes = ("text", "words", "structs") if key == "tools" else ("text",)
        named = [
            c for c in columns if c.shape in shapes and c not in taken and rank(c.name, USUAL[key]) < len(USUAL[key])
        ]
        if named:
            found[key] = min(named, key=lambda c: rank(c.name, USUAL[key]))
    return found


def label_columns(columns: Sequence[Column], taken: Collection[str]) -> list[Column]:
    """Columns that are labels by their name, or because `datasets` gave their values names; the best first."""
    found = [c for c in columns if c.name not in taken and _may_label(c) and _label_rank(c) is not None]
    return sorted(found, key=lambda c: _label_rank(c) or 0)


def lone_category(columns: Sequence[Column], taken: Collection[str]) -> Column | None:
    """The one column beside texts and ids, if its values are few: a label whatever its name."""
    others = [c for c in columns if c.name not in taken and not is_id(c) and c not in text_columns(columns)]
    few = [c for c in others if c.distinct >= 2 and (c.shape == "flag" or is_category(c) or _few_integers(c))]
    return few[0] if len(others) == 1 and few else None


def kind_of(label: Column) -> Kind:
    """What a label is: a class, several, or a number."""
    if label.shape in ("words", "integers"):
        return "multi-label"
    if label.shape == "number" and not label.whole:
        return "regression"
    if label.shape not in ("integer", "number") or label.class_names:
        return "single-label"
    gaps = label.high - label.low + 1 > 3 * label.distinct
    graded = plain(label.name) in _AMOUNTS and label.distinct > _FEW_GRADES
    many = label.distinct > _MANY_CLASSES or (gaps and label.distinct > 2 * _FEW_GRADES)
    return "regression" if graded or many else "single-label"


def _few_integers(column: Column) -> bool:
    return column.shape == "integer" and column.distinct <= max(2, 0.05 * column.rows)


def _may_label(column: Column) -> bool:
    if column.shape == "text":
        return column.distinct <= max(2, 0.5 * (column.rows - column.nulls))
    return column.shape in ("integer", "flag", "number", "words", "integers")


def _label_rank(column: Column) -> int | None:
    """By name; then by `ClassLabel`; then by a name that ends like a label's or asks a question."""
    name = plain(column.name)
    if name in LABELS:
        return LABELS.index(name)
    if column.class_names:
        return len(LABELS)
    if name.endswith(("_label", "_labels", "_class", "_category")) or name.startswith("label_"):
        return len(LABELS) + 1
    is_question = column.shape == "flag" and (name.startswith("is_") or name == "answer")
    return len(LABELS) + 2 if is_question else None
