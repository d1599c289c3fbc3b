"""Tags of words as a whole: their names, targets, and entities as people read them. Data workers and train workers.

Tasks that tag the parts of a text compose it. What is an entity, and how entities are scored:
`tasks/metrics/entities.py`.
"""

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from launcher.errors import DataError
from launcher.formatting import list_names, show_value
from launcher.models.chat import IGNORED
from launcher.rundir.records import Mark
from launcher.tasks.metrics.class_weights import count_classes, weight_tensor
from launcher.tasks.metrics.labels import check_marks, distinct, infer_names

if TYPE_CHECKING:
    import torch
    from tokenizers import Encoding

    from launcher.tasks.metrics.entities import EntityMetrics

_SPAN = ("start", "end", "label")

Places = Sequence[tuple[int, int]]
"""First character, and one past the last, of each word of a text."""

# Scripts that put no spaces between words, and Korean, whose particles are written on to the noun.
_UNSPACED = re.compile("[\u0e00-\u109f\u1780-\u17ff\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff]")

_ENTITY = pa.struct(
    {"label": pa.string(), "start": pa.int32(), "end": pa.int32(), "text": pa.string(), "score": pa.float32()}
)


@dataclass(frozen=True)
class Tags:
    """What the tag of a word may be.

    Args:
        column: the column that holds the tags, for messages.
        names: tag names in order.
        weights: of each tag in the loss; empty weighs all alike.
        smoothing: share of each target that the loss spreads over all tags.
    """

    column: str
    names: tuple[str, ...]
    weights: tuple[float, ...] = ()
    smoothing: float = 0.0

    @property
    def metric_modes(self) -> "dict[str, Literal['max', 'min']]":
        """Whether more or less of each metric is better, the main metric first."""
        return {"f1": "max", "precision": "max", "recall": "max", "macro_f1": "max", "accuracy": "max"}

    @property
    def prediction_schema(self) -> pa.Schema:
        """What `decode` gives."""
        return pa.schema({"prediction": pa.list_(_ENTITY)})

    def infer_params(
        self, pieces: Iterable[pa.Array], kind: pa.DataType, known: tuple[str, ...] | None
    ) -> tuple[str, ...]:
        """Tag names, from lists of tags or of {start, end, label}.

        Raises:
            DataError: there are fewer than two.
        """
        if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
            raise DataError(
                f"task: column {self.column} of the training data is of type {kind}; give a list with a tag for "
                "each word, or with a {start, end, label} for each entity"
            )
        flat = (pc.list_flatten(piece) for piece in pieces)
        if (pa.types.is_integer(kind.value_type) or pa.types.is_floating(kind.value_type)) and known is None:
            raise DataError(
                f"task: column {self.column} of the training data holds numbers as tags, and nothing tells what they "
                "mean; give their names in order in task.labels, such as [O, B-PER, I-PER]"
            )
        if not pa.types.is_struct(kind.value_type):
            return infer_names(map(_counted, flat), kind.value_type, known, self.column)
        missing = [key for key in _SPAN if kind.value_type.get_field_index(key) < 0]
        if missing:
            raise DataError(
                f"task: the entities in column {self.column} of the training data have no {missing[0]}; each needs "
                "start, end and label"
            )
        types = distinct(pc.struct_field(piece, "label") for piece in flat)
        check_marks(types, self.column)
        return ("O", *(f"{prefix}-{name}" for name in types for prefix in ("B", "I")))

    def find_invalid_target(self, pieces: Iterable[pa.Array], kind: pa.DataType) -> tuple[int, str] | None:
        """None: a tag goes with its words, so whole rows tell, as they are read."""
        return None

    def config(self) -> dict[str, object]:
        """The model config's entries."""
        ids = {name: i for i, name in enumerate(self.names)}
        return {"num_labels": len(ids), "id2label": dict(enumerate(self.names)), "label2id": ids}

    @cached_property
    def _index(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.names)}

    def counts(self, pieces: Iterable[pa.Array], names: tuple[str, ...]) -> list[int]:
        """Words of each tag in a column that comes in pieces, those that are cut off later included.

        Raises:
            DataError: it holds spans, whose words only the tokenizer knows.
        """
        return count_classes((self._tags(piece) for piece in pieces), names, replace(self, names=names)._class)

    def _tags(self, piece: pa.Array) -> pa.Array:
        flat = pc.list_flatten(piece)
        if pa.types.is_struct(flat.type):
            raise DataError(
                f"task.class_weights: balanced counts the tags of words, and column {self.column} holds spans of "
                "characters; give a weight for each tag"
            )
        return _counted(flat)

    def sample_weights(self, labels: Sequence[Sequence[float]]) -> np.ndarray:
        """float64 (n,), what each row adds to the global batch's weight, from its `labels`."""
        words = [[int(label) for label in row if label != IGNORED] for row in labels]
        return np.array([sum(self.weights[i] for i in row) if self.weights else len(row) for row in words], np.float64)

    def plain(self) -> "Tags":
        """The same tags under plain cross entropy."""
        return replace(self, weights=(), smoothing=0.0)

    def check(self, label: object, text: str | list[str]) -> None:
        """Look at a row's label before its words are known.

        Args:
            label: a tag for each word of a list, or {start, end, label} of each entity of a string.
            text: the row's.

        Raises:
            ValueError: it cannot be used; the text says why.
        """
        if not isinstance(label, list):
            raise ValueError(
                f"{self.column} is {'null' if label is None else f'{show_value(label)}, which is not a list'}"
            )
        if isinstance(text, str):
            for one in label:
                self._check_entity(one, len(text))
            if "O" not in self._index:
                raise ValueError(f"task.labels is {self._listed}, which lacks O, the tag of words outside of entities")
            return
        if any(isinstance(one, dict) for one in label):
            raise ValueError(f"{self.column} holds entities of a string, but the row has words; give a tag for each")
        if len(label) != len(text):
            raise ValueError(f"{self.column} has {len(label)} tags for {len(text)} words")
        for one in label:
            self._class(one)

    def _check_entity(self, entity: object, characters: int) -> None:
        if not isinstance(entity, dict):
            raise ValueError(
                f"{self.column} holds {show_value(entity)}, but a string needs the {{start, end, label}} of each entity"
            )
        start, end, label = (entity.get(key) for key in _SPAN)
        if not (isinstance(start, int) and isinstance(end, int) and 0 <= start < end <= characters):
            raise ValueError(
                f"{self.column} has an entity from {start} to {end}, which is no part of its {characters} characters"
            )
        missing = [tag for tag in (f"B-{label}", f"I-{label}") if tag not in self._index]
        if missing and (len(missing) == 1 or str(label) in self._index):
            raise ValueError(
                f"{self.column} has the label {label!r}, but task.labels is {self._listed}, which lacks {missing[0]}"
            )
        if missing:
            raise ValueError(f"{self.column} has the label {label!r}, which is not one of {self._listed}")

    def sample(self, tokens: "Encoding", text: str | list[str], label: list[object] | None) -> dict[str, list[int]]:
        """Return one row as the model takes it.

        Args:
            tokens: Tokens of the text.
            text: String, or words.
            label: Tag for each word, or {start, end, label} of each entity; None where labels are not known.

        Returns:
            `input_ids`; `labels`, the class at each word's first token and -100 elsewhere, and where the tag itself is
            -100 or its entity is lost; `starts` and `ends`, the characters of the other words in the text (of words,
            joined by spaces).
        """
        if isinstance(text, str):
            first, places = _word_places(tokens, text)
            targets = [0] * len(places) if label is None else self._covered(label, places)
            words = list(range(len(places)))
        else:
            word_of = [-1 if word is None else word for word in tokens.word_ids]
            first = [t for t, w in enumerate(word_of) if w >= 0 and (t == 0 or word_of[t - 1] != w)]
            begins = np.concatenate([[0], np.cumsum([len(word) + 1 for word in text])]).tolist()
            words = [word_of[t] for t in first]
            places = [(begin, begin + len(word)) for begin, word in zip(begins, text, strict=False)]
            targets = [0] * len(places) if label is None else [self._class(tag) for tag in label]
        labels = np.full(len(tokens.ids), IGNORED)
        labels[first] = [targets[w] for w in words]
        counted = [w for w in words if targets[w] != IGNORED]
        starts, ends = [places[w][0] for w in counted], [places[w][1] for w in counted]
        return {"input_ids": tokens.ids, "labels": labels.tolist(), "starts": starts, "ends": ends}

    def _covered(self, entities: Sequence[object], places: Places) -> list[int]:
        """Return the class of each word; -100 for words of lost entities, of which nobody knows what they are."""
        found = [self._index["O"]] * len(places)
        kept, lost = _kept_and_lost(entities, places)
        for entity in lost:
            for i in _inside(entity, places):
                found[i] = IGNORED
        for entity in kept:
            for i in (inside := _inside(entity, places)):
                found[i] = self._index[("B-" if i == inside[0] else "I-") + str(entity["label"])]
        return found

    def lost(self, tokens: "Encoding", text: str, label: Sequence[object]) -> list[str]:
        """Say of each entity why it would not come back from its words' tags as it is.

        Args:
            tokens: Tokens of the text.
            text: Text of the row.
            label: {start, end, label} of each entity.
        """
        _, places = _word_places(tokens, text)
        # Entities behind max_length are not read, which is said elsewhere.
        seen = (places[-1][1] if places else 0) if tokens.overflowing else len(text)
        _, lost = _kept_and_lost(label, places)
        return [self._lost(entity, text, places) for entity in lost if _place(entity)[1] <= seen]

    def _lost(self, entity: Mapping[str, object], text: str, places: Places) -> str:
        start, end = _place(entity)
        inside = _inside(entity, places)
        if not inside:
            why = "is no word"
        else:
            begin, stop = places[inside[0]][0], places[inside[-1]][1]
            is_whole = start <= begin and stop <= end
            why = "lies across another" if is_whole else f"is read as {show_value(text[begin:stop])}"
        return f"{self.column}: the entity {show_value(text[start:end])} ({start} to {end}) {why}"

    def _class(self, tag: object) -> int:
        if tag in (IGNORED, str(IGNORED)):
            return IGNORED  # as everywhere: a word that is neither learned nor scored
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
        """Fresh metric states."""
        from launcher.tasks.metrics.entities import EntityMetrics

        return EntityMetrics(self.names, device)

    def sample_losses(self, logits: "torch.Tensor", labels: "torch.Tensor") -> "torch.Tensor":
        """(B,) cross entropy of each text, summed over its words."""
        from launcher.tasks.metrics.losses import token_losses

        return token_losses(logits, labels, weight_tensor(self.weights, logits.device), self.smoothing)

    def decode(self, logits: "torch.Tensor", samples: pa.Table) -> pa.Table:
        """The entities in each text, with characters and scores.

        Args:
            logits: (B, T, tags).
            samples: `labels` (-100 where no word begins), `starts`, `ends` (of each word) and `text`.
        """
        found = [self._entities(row, sample) for row, sample in zip(logits, samples.to_pylist(), strict=True)]
        return pa.table({"prediction": found}, self.prediction_schema)

    def _entities(self, logits_TC: "torch.Tensor", sample: dict[str, list[int]]) -> list[dict[str, object]]:
        words = [t for t, label in enumerate(sample["labels"]) if label != IGNORED]
        scores, classes = logits_TC[words].float().softmax(-1).max(-1)
        entities = []
        for start, end, kind, first, last in self._places(classes.tolist(), sample):
            score = float(scores[first:last].mean())
            entities.append(
                {"label": kind, "start": start, "end": end, "text": sample["text"][start:end], "score": score}
            )
        return entities

    def _places(self, classes: Sequence[int], sample: dict[str, list[int]]) -> list[tuple[int, int, str, int, int]]:
        from launcher.tasks.metrics.entities import spans

        found = spans([self.names[i] for i in classes])
        starts, ends = sample["starts"], sample["ends"]
        return [(starts[s.start], ends[s.end - 1], s.type, s.start, s.end) for s in found]

    def answers(
        self, logits: "torch.Tensor", labels: "torch.Tensor", samples: pa.Table
    ) -> list[tuple[str, str, tuple[Mark, ...]]]:
        """(truth, prediction, marks in the text) of each row."""
        predictions = self.decode(logits, samples).column("prediction").to_pylist()
        answers = []
        for sample, said in zip(samples.to_pylist(), predictions, strict=True):
            classes = [label for label in sample["labels"] if label != IGNORED]
            true = {(start, end, kind) for start, end, kind, *_ in self._places(classes, sample)}
            found = {(e["start"], e["end"], e["label"]) for e in said}
            kinds: tuple[tuple[set[tuple[int, int, str]], Literal["found", "missed", "wrong"]], ...]
            kinds = ((true & found, "found"), (true - found, "missed"), (found - true, "wrong"))
            marks = [Mark(start=a, end=b, label=n, kind=kind) for some, kind in kinds for a, b, n in some]
            marks.sort(key=lambda mark: (mark.start, mark.end, mark.kind))
            answers.append((_words(true, str(sample["text"])), _words(found, str(sample["text"])), tuple(marks)))
        return answers


def _word_places(tokens: "Encoding", text: str) -> tuple[list[int], Places]:
    """Return the first token of each word of a text, and the characters of the words.

    A word is one of the tokenizer's, cut further where entities may begin and end, as far as tokens allow: at
    punctuation, and anywhere in a script without spaces. Tokenizers of XLM-R's kind take all between two spaces for
    one word, those of Llama's kind the whole text. Spaces that a token brings belong to no word.
    """
    first: list[int] = []
    places: list[tuple[int, int]] = []
    before, reached = None, 0
    for t, (word, (start, end)) in enumerate(zip(tokens.word_ids, tokens.offsets, strict=True)):
        bare = text[start:end].strip()
        if word is None or not bare:
            continue
        start = text.index(bare, start)
        if places and start < reached:  # several tokens of one character, or a sign of the tokenizer's own before it
            places[-1] = (places[-1][0], max(reached, start + len(bare)))
        elif places and word == before and not _breaks(text, reached, start):
            places[-1] = (places[-1][0], start + len(bare))
        else:
            first.append(t)
            places.append((start, start + len(bare)))
        before, reached = word, places[-1][1]
    return first, places


def _breaks(text: str, end: int, start: int) -> bool:
    """Return whether an entity may end between two tokens of a word: one ends at `end`, the other begins at `start`."""
    other = unicodedata.category(text[start])
    if any(unicodedata.category(c) != "Cf" for c in text[end:start]):
        return True
    if other[0] == "M" or other == "Cf":  # a vowel or accent of the letter before it, or what joins two letters
        return False
    letters = all(
        unicodedata.category(c)[0] in "LMN" or unicodedata.category(c) == "Cf" for c in (text[end - 1], text[start])
    )
    return not letters or _UNSPACED.match(text[end - 1]) is not None or _UNSPACED.match(text[start]) is not None


def _place(entity: Mapping[str, object]) -> tuple[int, int]:
    return int(str(entity["start"])), int(str(entity["end"]))


def _inside(entity: Mapping[str, object], places: Places) -> list[int]:
    start, end = _place(entity)
    return [i for i, (a, b) in enumerate(places) if a < end and b > start]


def _kept_and_lost(
    entities: Sequence[object], places: Places
) -> tuple[list[Mapping[str, object]], list[Mapping[str, object]]]:
    """Return the entities that words can show, and those that they cannot.

    An entity is of whole words, and of several that lie across each other the longest stays (as in spaCy's
    `filter_spans`).
    """
    taken: set[int] = set()
    kept: list[Mapping[str, object]] = []
    lost: list[Mapping[str, object]] = []
    spans = {tuple(entity[key] for key in _SPAN): entity for entity in entities if isinstance(entity, dict)}.values()
    for entity in sorted(spans, key=lambda entity: (entity["start"] - entity["end"], entity["start"])):
        inside = _inside(entity, places)
        whole = inside and entity["start"] <= places[inside[0]][0] and places[inside[-1]][1] <= entity["end"]
        if whole and taken.isdisjoint(inside):
            taken.update(inside)
            kept.append(entity)
        else:
            lost.append(entity)
    return kept, lost


def _words(entities: set[tuple[int, int, str]], text: str) -> str:
    return "; ".join(f"{text[start:end]} ({kind})" for start, end, kind in sorted(entities)) or "none"


def _counted(tags: pa.Array) -> pa.Array:
    """Leave out the tags of words that are neither learned nor scored."""
    return tags.filter(pc.fill_null(pc.not_equal(tags.cast(pa.string()), str(IGNORED)), True))
