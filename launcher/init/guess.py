"""A guess of the task and columns of data, and what rules share to make one. Runs on the client.

`rules.py` and `text_rules.py` have the rules.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from launcher.init.column_roles import (
    Kind,
    is_id,
    label_columns,
    lone_category,
    plain,
)
from launcher.init.labels import Labels
from launcher.init.profile import Column, DataProfile
from launcher.models.conversation import UNREAD, USUAL

TASKS = (
    "text-classification", "token-classification", "question-answering", "causal-lm", "masked-lm", "seq2seq",
    "image-classification", "sentence-embedding", "reranking", "preference", "reward",
)  # fmt: skip
_TextForm = Literal["words", "spans", "text", "messages", "prompt", "answers", "pair", "translation", "summary"]
Form = Kind | _TextForm | Literal["ranking", "preferred", "judged"]

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
    """Additional columns (system message, tools, input of a prompt, completions), by the key of the job file."""

    @property
    def writes_label(self) -> bool:
        """Return True if the label is a text that the model learns to write."""
        return self.form in ("prompt", "pair", "summary")

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


def is_by_language(column: Column) -> bool:
    """Return True if cells hold texts by language, as the `Translation` feature of `datasets` does."""
    has_languages = len(column.keys) > 1 and set(column.keys) <= LANGUAGES
    return has_languages or (column.feature == "Translation" and len(column.keys) > 1)


def language_columns(profile: DataProfile) -> list[Column]:
    """Return the columns of texts that are named like languages, if there are several."""
    texts = [column for column in profile.columns if column.shape == "text" and column.mean_tokens >= 3]
    named = [c for c in texts if c.name.lower()[:2] in LANGUAGES and (len(c.name) == 2 or c.name[2:3] in ("_", "-"))]
    # Two letters may be a word, such as `no` or `it`, so one name is not enough.
    return named if len(named) >= 2 else []


def unread_notes(profile: DataProfile, read: Sequence[Column]) -> tuple[str, ...]:
    """Return notes on columns with a name that belongs to prompts or conversations, and that the task does not read."""
    names = [name for usual in (*USUAL.values(), UNREAD) for name in usual]
    more = [c.name for c in profile.columns if plain(c.name) in names and c not in read]
    return tuple(f"column {name} is not read; put it into the prompts or conversations if it matters" for name in more)


def agrees(pair: tuple[Column, Column], choices: UserChoices) -> bool:
    """Return True if a pair agrees with the column that the user named."""
    return choices.inputs in ((), (pair[0].name,)) and choices.label in (None, pair[1].name)


def chosen_inputs(profile: DataProfile, choices: UserChoices) -> list[Column]:
    """Return the input columns that the user chose; all columns where there is no choice."""
    return [profile.column(name) for name in choices.inputs] if choices.inputs else list(profile.columns)


def find_label(
    profile: DataProfile, choices: UserChoices, taken: tuple[str, ...] | list[str], sole: bool = False
) -> Column | None:
    """Return the label column: the user's choice, else the best by name, else the only remaining one; None if unclear.

    Args:
        profile: Profile of the data.
        choices: Choices of the user.
        taken: Names of input columns.
        sole: True if the remaining column must have few distinct values, and may have texts next to it.
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


def text_reason(column: Column) -> str:
    """Return the reason for a column of texts or conversations."""
    if column.shape == "messages":
        return "conversations"
    return f"texts of about {max(1, round(column.mean_tokens))} tokens"


def label_reason(label: Column) -> dict[str, str]:
    """Return the reason for a label column by its name; {} where the classes are counted later."""
    if label.class_names:
        return {label.name: f"{len(label.class_names)} classes with names in the files"}
    return {label.name: f"{label.distinct} different values"}


LANGUAGES = frozenset((  # ISO 639-1
    "ar", "bg", "bn", "ca", "cs", "cy", "da", "de", "el", "en", "es", "et", "eu", "fa", "fi", "fr", "ga", "gl",
    "gu", "he", "hi", "hr", "hu", "hy", "is", "it", "ja", "ka", "kk", "kn", "ko", "lt", "lv", "mk", "ml", "mn",
    "mr", "ms", "mt", "nb", "nl", "nn", "no", "pa", "pl", "ps", "pt", "ro", "ru", "si", "sk", "sl", "sq", "sr",
    "sv", "sw", "ta", "te", "th", "tl", "tr", "uk", "ur", "uz", "vi", "zh",
))  # fmt: skip
