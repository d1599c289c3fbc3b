"""Tags of words: their names, targets, losses, and the entities they make up.

Runs on the head (tag names), in data workers (targets, without torch) and in train workers. Tasks that tag the words of
a text compose it. Read `entities.py` next for what an entity is and how entities are scored.
"""

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from launcher.errors import DataError
from launcher.formatting import list_names, show_value
from launcher.models.chat import IGNORED
from launcher.rundir.records import SpanMark
from launcher.tasks.metrics.class_weights import count_classes, weight_tensor
from launcher.tasks.metrics.labels import check_placeholders, distinct, infer_names
from launcher.tasks.params import is_list
from launcher.tasks.results import MetricMode, RowResult

if TYPE_CHECKING:
    import torch
    from tokenizers import Encoding

    from launcher.tasks.metrics.entities import EntityMetrics, Span

_SPAN = ("start", "end", "label")

WordSpans = Sequence[tuple[int, int]]
"""First character, and one past the last, of each word of a text."""

# Scripts without spaces between words (Thai to CJK), and Korean, whose particles are suffixes of the noun.
UNSPACED = re.compile("[\u0e00-\u109f\u1780-\u17ff\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff]")

_ENTITY = pa.struct(
    {"label": pa.string(), "start": pa.int32(), "end": pa.int32(), "text": pa.string(), "score": pa.float32()}
)


@dataclass(frozen=True)
class Tags:
    """Tags of the words of a text.

    Args:
        column: Tag column, for messages.
        names: Tag names in order.
        weights: Loss weight of each tag; empty weighs all alike.
        smoothing: Share of each target that the loss spreads over all tags.
    """

    column: str
    names: tuple[str, ...]
    weights: tuple[float, ...] = ()
    smoothing: float = 0.0

    @property
    def metric_modes(self) -> dict[str, MetricMode]:
        """Direction of each metric, the main metric first."""
        return {"f1": "max", "precision": "max", "recall": "max", "macro_f1": "max", "accuracy": "max"}

    @property
    def prediction_schema(self) -> pa.Schema:
        """Columns that `decode` returns."""
        return pa.schema({"prediction": pa.list_(_ENTITY)})

    def infer_names(
        self, pieces: Iterable[pa.Array], arrow_type: pa.DataType, known: tuple[str, ...] | None
    ) -> tuple[str, ...]:
        """Return the tag names of a column with lists of tags or of {start, end, label}.

        Raises:
            DataError: The column holds neither, or tags without a meaning, or fewer than two.
        """
        if not is_list(arrow_type):
            raise DataError(
                f"task: column {self.column} of the training data is of type {arrow_type}; give a list with a tag for "
                "each word, or with a {start, end, label} for each entity"
            )
        flat = (pc.list_flatten(piece) for piece in pieces)
        value_type = arrow_type.value_type
        # Numbers would be taken for types of entities: what is a beginning and what is outside would be lost.
        if (pa.types.is_integer(value_type) or pa.types.is_floating(value_type)) and known is None:
            raise DataError(
                f"task: column {self.column} of the training data holds numbers as tags, without their names; give the "
                "names in order in task.labels, such as [O, B-PER, I-PER]"
            )
        if not pa.types.is_struct(value_type):
            return infer_names(map(_without_ignored, flat), value_type, known, self.column)
        missing = [key for key in _SPAN if value_type.get_field_index(key) < 0]
        if missing:
            raise DataError(
                f"task: the entities in column {self.column} of the training data have no {missing[0]}; each needs "
                "start, end and label"
            )
        # Spans name types, and each type needs two tags.
        types = distinct(pc.struct_field(piece, "label") for piece in flat)
        check_placeholders(types, self.column)
        return ("O", *(f"{prefix}-{name}" for name in types for prefix in ("B", "I")))

    def find_invalid_target(self, pieces: Iterable[pa.Array], arrow_type: pa.DataType) -> tuple[int, str] | None:
        """Return None: tags are checked together with the words of their row, by `encode`."""
        return None

    def config(self) -> dict[str, object]:
        """Return the entries of the model's config: number and names of the tags."""
        ids = {name: i for i, name in enumerate(self.names)}
        return {"num_labels": len(ids), "id2label": dict(enumerate(self.names)), "label2id": ids}

    @cached_property
    def _index(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.names)}

    def counts(self, pieces: Iterable[pa.Array], names: tuple[str, ...]) -> list[int]:
        """Return the number of words of each tag in a column, before truncation to `max_length`.

        Raises:
            DataError: The column holds character spans, whose words only the tokenizer knows.
        """
        return count_classes((self._flat_tags(piece) for piece in pieces), names, replace(self, names=names)._class)

    def _flat_tags(self, piece: pa.Array) -> pa.Array:
        flat = pc.list_flatten(piece)
        if pa.types.is_struct(flat.type):
            raise DataError(
                f"task.class_weights: balanced counts the tags of words, and column {self.column} holds spans of "
                "characters; give a weight for each tag"
            )
        return _without_ignored(flat)

    def sample_weights(self, labels: Sequence[Sequence[float]]) -> np.ndarray:
        """Return the weight of each row in its global batch, float64 (n,): the sum over its labelled words.

        Args:
            labels: Class of each token, -100 where there is none.
        """
        # Labels before padding: the loss sums the same words, so the quotient is a mean over them.
        words = [[int(label) for label in row if label != IGNORED] for row in labels]
        return np.array([sum(self.weights[i] for i in row) if self.weights else len(row) for row in words], np.float64)

    def for_evaluation(self) -> "Tags":
        """Return the same tags under plain cross entropy."""
        return replace(self, weights=(), smoothing=0.0)

    def check(self, label: object, text: str | list[str]) -> None:
        """Refuse an invalid label of a row, before the row is tokenized.

        Args:
            label: Tag of each word of a list, or {start, end, label} of each entity of a string.
            text: Text of the row.

        Raises:
            ValueError: The label is invalid; the text says why.
        """
        if not isinstance(label, list):
            raise ValueError(
                f"{self.column} is {'null' if label is None else f'{show_value(label)}, which is not a list'}"
            )
        if isinstance(text, str):
            for entity in label:
                self._check_entity(entity, len(text))
            if "O" not in self._index:
                raise ValueError(f"task.labels is {self._listed}, which lacks O, the tag of words outside of entities")
            return
        # Before the lengths are compared: the message would otherwise count entities as tags.
        if any(isinstance(tag, dict) for tag in label):
            raise ValueError(f"{self.column} holds entities of a string, but the row has words; give a tag for each")
        if len(label) != len(text):
            raise ValueError(f"{self.column} has {len(label)} tags for {len(text)} words")
        for tag in label:
            self._class(tag)

    def _check_entity(self, entity: object, characters: int) -> None:
        if not isinstance(entity, dict):
            raise ValueError(
                f"{self.column} holds {show_value(entity)}, but a string needs the {{start, end, label}} of each entity"
            )
        start, end, label = (entity.get(key) for key in _SPAN)
        if not (isinstance(start, int) and isinstance(end, int) and 0 <= start < end <= characters):
            raise ValueError(
                f"{self.column} has an entity from {start} to {end}, which is not within its {characters} characters"
            )
        missing = [tag for tag in (f"B-{label}", f"I-{label}") if tag not in self._index]
        if missing and (len(missing) == 1 or str(label) in self._index):
            raise ValueError(
                f"{self.column} has the label {label!r}, but task.labels is {self._listed}, which lacks {missing[0]}"
            )
        if missing:
            raise ValueError(f"{self.column} has the label {label!r}, which is not one of {self._listed}")

    def sample(self, tokens: "Encoding", text: str | list[str], label: list[object] | None) -> dict[str, list[int]]:
        """Return the sample of one row.

        Args:
            tokens: Tokens of the text, with their offsets and words.
            text: String, or list of words.
            label: Tag of each word, or {start, end, label} of each entity; None without targets.

        Returns:
            `input_ids` (T); `labels` (T), the class at the first token of each word and -100 elsewhere, and also where
            the tag itself is -100 or its entity is lost; `starts` and `ends`, the characters of each word with a label
            in the text (a list of words is joined by spaces).
        """
        if isinstance(text, str):
            first_tokens, word_spans = _find_words(tokens, text)
            # Without targets every word gets class 0: any label but -100 marks a first token, which `decode` looks for.
            targets = [0] * len(word_spans) if label is None else self._word_classes(label, word_spans)
            words = list(range(len(word_spans)))
        else:
            # Special tokens belong to no word. A word may also have no token: it was truncated, or the tokenizer drops
            # it.
            word_of = [-1 if word is None else word for word in tokens.word_ids]
            first_tokens = [t for t, w in enumerate(word_of) if w >= 0 and (t == 0 or word_of[t - 1] != w)]
            # + 1 for the space that joins the words; the task stores the text joined the same way. Not strict below:
            # there is one start more than words.
            starts = np.concatenate([[0], np.cumsum([len(word) + 1 for word in text])]).tolist()
            words = [word_of[t] for t in first_tokens]
            word_spans = [(start, start + len(word)) for start, word in zip(starts, text, strict=False)]
            targets = [0] * len(word_spans) if label is None else [self._class(tag) for tag in label]
        labels = np.full(len(tokens.ids), IGNORED)
        labels[first_tokens] = [targets[w] for w in words]
        labelled = [word_spans[w] for w in words if targets[w] != IGNORED]
        return {
            "input_ids": tokens.ids,
            "labels": labels.tolist(),
            "starts": [start for start, _ in labelled],
            "ends": [end for _, end in labelled],
        }

    def _word_classes(self, entities: Sequence[object], word_spans: WordSpans) -> list[int]:
        """Return the class of each word; -100 for words of lost entities, whose true tag is unknown."""
        classes = [self._index["O"]] * len(word_spans)
        representable, lost = _split_entities(entities, word_spans)
        for entity in lost:
            for i in _words_of(entity, word_spans):
                classes[i] = IGNORED
        # After the lost ones, whose words they may share: a known tag replaces -100.
        for entity in representable:
            words = _words_of(entity, word_spans)
            for i in words:
                classes[i] = self._index[("B-" if i == words[0] else "I-") + str(entity["label"])]
        return classes

    def lost(self, tokens: "Encoding", text: str, label: Sequence[object]) -> list[str]:
        """Return a reason for each entity that tags of words cannot represent.

        Args:
            tokens: Tokens of the text.
            text: Text of the row.
            label: Entities, each {start, end, label}.
        """
        _, word_spans = _find_words(tokens, text)
        # Entities after max_length are truncated, not lost; `truncation_note` reports them.
        length = (word_spans[-1][1] if word_spans else 0) if tokens.overflowing else len(text)
        _, lost = _split_entities(label, word_spans)
        return [self._loss_reason(entity, text, word_spans) for entity in lost if _characters(entity)[1] <= length]

    def _loss_reason(self, entity: Mapping[str, object], text: str, word_spans: WordSpans) -> str:
        start, end = _characters(entity)
        words = _words_of(entity, word_spans)
        if not words:
            reason = "is not a word"
        else:
            begin, stop = word_spans[words[0]][0], word_spans[words[-1]][1]
            is_whole = start <= begin and stop <= end
            reason = "overlaps another" if is_whole else f"is read as {show_value(text[begin:stop])}"
        return f"{self.column}: the entity {show_value(text[start:end])} ({start} to {end}) {reason}"

    def _class(self, tag: object) -> int:
        # datasets and transformers mark words without a tag with -100: they are neither learned nor scored.
        if tag in (IGNORED, str(IGNORED)):
            return IGNORED
        if isinstance(tag, float) and tag.is_integer():
            tag = int(tag)
        index = None if tag is None else self._index.get(str(tag))
        if index is None and isinstance(tag, int) and 0 <= tag < len(self.names):
            return tag
        if index is None:
            raise ValueError(f"{self.column} has the tag {tag!r}, which is not one of {self._listed}")
        return index

    @property
    def _listed(self) -> str:
        return list_names(self.names)

    def metrics(self, device: "torch.device") -> "EntityMetrics":
        """Return new metric states on a device."""
        from launcher.tasks.metrics.entities import EntityMetrics

        return EntityMetrics(self.names, device)

    def sample_losses(self, logits: "torch.Tensor", labels: "torch.Tensor") -> "torch.Tensor":
        """Return the cross entropy of each text, summed over its words, float32 (B,)."""
        from launcher.tasks.metrics.losses import token_losses

        return token_losses(logits, labels, weight_tensor(self.weights, logits.device), self.smoothing)

    def decode(self, logits: "torch.Tensor", samples: pa.Table) -> pa.Table:
        """Return the entities in each text, with their characters and scores.

        Args:
            logits: Scores of the tags, (B, T, tags).
            samples: B results of `sample` with the column `text`.
        """
        entities = [self._entities(row, sample) for row, sample in zip(logits, samples.to_pylist(), strict=True)]
        return pa.table({"prediction": entities}, self.prediction_schema)

    def _entities(self, logits_TC: "torch.Tensor", sample: dict[str, list[int]]) -> list[dict[str, object]]:
        word_tokens = [t for t, label in enumerate(sample["labels"]) if label != IGNORED]
        # On a GPU each text costs a sync here, and each entity one more for its mean score.
        scores, classes = logits_TC[word_tokens].float().softmax(-1).max(-1)
        return [
            {
                "label": span.type,
                "start": start,
                "end": end,
                "text": sample["text"][start:end],
                "score": float(scores[span.start : span.end].mean()),
            }
            for span, start, end in self._spans(classes.tolist(), sample)
        ]

    def _spans(self, classes: Sequence[int], sample: dict[str, list[int]]) -> "list[tuple[Span, int, int]]":
        """Return the entities in the classes of a text's words, each with its first character and one past the last."""
        from launcher.tasks.metrics.entities import spans

        starts, ends = sample["starts"], sample["ends"]
        return [(span, starts[span.start], ends[span.end - 1]) for span in spans([self.names[i] for i in classes])]

    def row_results(self, logits: "torch.Tensor", labels: "torch.Tensor", samples: pa.Table) -> list[RowResult]:
        """Return truth and prediction of B rows in words, with marks in the text."""
        predictions = self.decode(logits, samples).column("prediction").to_pylist()
        results = []
        for sample, entities in zip(samples.to_pylist(), predictions, strict=True):
            classes = [label for label in sample["labels"] if label != IGNORED]
            true = {(start, end, span.type) for span, start, end in self._spans(classes, sample)}
            predicted = {(e["start"], e["end"], e["label"]) for e in entities}
            groups = {"found": true & predicted, "missed": true - predicted, "wrong": predicted - true}
            marks = [
                SpanMark(start=start, end=end, label=label, kind=cast("Literal['found', 'missed', 'wrong']", kind))
                for kind, group in groups.items()
                for start, end, label in group
            ]
            # The order of a set of strings differs from process to process, and the report should not.
            marks.sort(key=lambda mark: (mark.start, mark.end, mark.kind))
            text = str(sample["text"])
            results.append(RowResult(_to_text(true, text), _to_text(predicted, text), tuple(marks)))
        return results


def _find_words(tokens: "Encoding", text: str) -> tuple[list[int], WordSpans]:
    """Return the first token of each word of a text, and the characters of the words.

    A word is one of the tokenizer's, split further where entities may begin and end as far as tokens allow: at
    punctuation, and anywhere in a script without spaces. For tokenizers like XLM-R's everything between two spaces is
    one word, for those like Llama's the whole text. Spaces at the beginning of a token (byte-level BPE) belong to no
    word.
    """
    first_tokens: list[int] = []
    word_spans: list[tuple[int, int]] = []
    last_word, reached = None, 0
    for t, (word, (start, end)) in enumerate(zip(tokens.word_ids, tokens.offsets, strict=True)):
        stripped = text[start:end].strip()
        if word is None or not stripped:
            continue
        start = text.index(stripped, start)
        # Byte-level BPE gives several tokens of one character the same offsets, and SentencePiece may put a token of
        # its own before a character.
        if word_spans and start < reached:
            word_spans[-1] = (word_spans[-1][0], max(reached, start + len(stripped)))
        elif word_spans and word == last_word and not _may_split(text, reached, start):
            word_spans[-1] = (word_spans[-1][0], start + len(stripped))
        else:
            first_tokens.append(t)
            word_spans.append((start, start + len(stripped)))
        last_word, reached = word, word_spans[-1][1]
    return first_tokens, word_spans


def _may_split(text: str, end: int, start: int) -> bool:
    """Return whether an entity may end between two tokens of a word: one ends at `end`, the other begins at `start`."""
    category = unicodedata.category(text[start])
    # Characters between two tokens, such as a space, separate them; invisible format characters (joiners, soft hyphens)
    # do not.
    if any(unicodedata.category(c) != "Cf" for c in text[end:start]):
        return True
    # A vowel sign or accent belongs to the letter before it, and a joiner connects two letters.
    if category[0] == "M" or category == "Cf":
        return False
    are_letters = all(
        unicodedata.category(c)[0] in "LMN" or unicodedata.category(c) == "Cf" for c in (text[end - 1], text[start])
    )
    return not are_letters or UNSPACED.match(text[end - 1]) is not None or UNSPACED.match(text[start]) is not None


def _characters(entity: Mapping[str, object]) -> tuple[int, int]:
    return int(str(entity["start"])), int(str(entity["end"]))


def _words_of(entity: Mapping[str, object], word_spans: WordSpans) -> list[int]:
    """Return the words that an entity touches."""
    start, end = _characters(entity)
    return [i for i, (word_start, word_end) in enumerate(word_spans) if word_start < end and word_end > start]


def _split_entities(
    entities: Sequence[object], word_spans: WordSpans
) -> tuple[list[Mapping[str, object]], list[Mapping[str, object]]]:
    """Return the entities that tags of words can represent, and the lost ones.

    An entity must consist of whole words. A word has one tag, so the longest of overlapping entities is taken (as in
    spaCy's `filter_spans`). Duplicates count once.
    """
    taken: set[int] = set()
    representable: list[Mapping[str, object]] = []
    lost: list[Mapping[str, object]] = []
    # Keyed by place and label: the second copy of an entity would overlap the first and count as lost.
    unique = {tuple(entity[key] for key in _SPAN): entity for entity in entities if isinstance(entity, dict)}.values()
    # Longest first, then by start: the result must not depend on the order in the file.
    for entity in sorted(unique, key=lambda entity: (entity["start"] - entity["end"], entity["start"])):
        words = _words_of(entity, word_spans)
        is_whole = words and entity["start"] <= word_spans[words[0]][0] and word_spans[words[-1]][1] <= entity["end"]
        if is_whole and taken.isdisjoint(words):
            taken.update(words)
            representable.append(entity)
        else:
            lost.append(entity)
    return representable, lost


def _to_text(entities: set[tuple[int, int, str]], text: str) -> str:
    return "; ".join(f"{text[start:end]} ({label})" for start, end, label in sorted(entities)) or "none"


def _without_ignored(tags: pa.Array) -> pa.Array:
    """Return tags without those of words that are neither learned nor scored."""
    # Compared as text: tags are numbers or strings. A comparison with null is null, which `filter` would drop.
    return tags.filter(pc.fill_null(pc.not_equal(tags.cast(pa.string()), str(IGNORED)), True))
