"""Entities in tag sequences, and their exact-match scores as seqeval defines them. Runs in train workers.

A tag is `O`, a prefix and a type (`B-person`), or a type alone, as parts of speech are. Entities are those of seqeval's
default mode (and of conlleval), in which an `I-` without a `B-` before it begins an entity too.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from launcher.models.chat import IGNORED
from launcher.rundir.records import ClassRow
from launcher.tasks.results import TaskMetrics

OUTSIDE = "O"


@dataclass(frozen=True)
class Span:
    """Entity of the words from `start` up to, but not including, `end`."""

    start: int
    end: int
    type: str


def spans(tags: Sequence[str]) -> list[Span]:
    """Return the entities of one row, as `seqeval.metrics.sequence_labeling.get_entities` does."""
    entities: list[Span] = []
    begin = 0
    open_type, last_prefix = "", OUTSIDE
    # The extra `O` closes an entity that ends with the row.
    for i, tag in enumerate([*tags, OUTSIDE]):
        prefix, entity_type = _split_tag(tag)
        is_inside = last_prefix != OUTSIDE
        # Another type ends an entity even under `I-`, and after `E-` or `S-` nothing continues it.
        continues = is_inside and prefix in ("I", "E") and entity_type == open_type and last_prefix not in ("E", "S")
        if is_inside and not continues:
            entities.append(Span(begin, i, open_type))
        if prefix != OUTSIDE and not continues:
            begin = i
        open_type, last_prefix = entity_type, prefix
    return entities


def entity_types(tags: Sequence[str]) -> tuple[str, ...]:
    """Return the types that occur in a list of tag names, in their order."""
    return tuple(dict.fromkeys(_split_tag(tag)[1] for tag in tags if tag != OUTSIDE))


# Only BIESO may stand alone, as seqeval has it; any other single letter (a part of speech `N`) is a type.
_PREFIXED = re.compile(r"([A-Z])(?:-(.+))?")


def _split_tag(tag: str) -> tuple[str, str]:
    """Return prefix and type of a tag. A tag without a prefix (`NOUN`, `3`) is a type; its runs are the entities."""
    match = _PREFIXED.fullmatch(tag)
    return (match[1], match[2] or "_") if match and (match[2] or match[1] in "BIESO") else ("I", tag)


class EntityMetrics(TaskMetrics):
    """Precision, recall and F1 over entities, per type and together, and accuracy over words.

    Has no confusion matrix: most errors of entities are of their borders.

    Args:
        tags: Tag names by class.
        device: Device of the states.
    """

    def __init__(self, tags: tuple[str, ...], device: torch.device) -> None:
        self._tags = tags
        self._types = entity_types(tags)
        self._index = {name: i for i, name in enumerate(self._types)}
        # Rows of types: entities that are correct, predicted, true. Last row: words that are correct, all, outside.
        self._counts = torch.zeros(len(self._types) + 1, 3, dtype=torch.float64, device=device)

    def update(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Add B rows: logits (B, T, tags); labels (B, T), -100 where no word begins."""
        predicted = logits.argmax(-1)
        is_word = labels != IGNORED
        counts = torch.zeros_like(self._counts)
        # -1 equals no label: a position without one is -100.
        outside = self._tags.index(OUTSIDE) if OUTSIDE in self._tags else -1
        correct, words = (predicted == labels)[is_word].sum(), is_word.sum()
        counts[-1] = torch.stack([correct, words, (labels == outside).sum()]).to(counts)
        # Entities are compared on the CPU: one copy of each tensor per batch, which waits for the device.
        for classes, truth, mask in zip(predicted.cpu(), labels.cpu(), is_word.cpu(), strict=True):
            predicted_spans, true_spans = self._spans(classes[mask]), self._spans(truth[mask])
            for column, entities in enumerate((predicted_spans & true_spans, predicted_spans, true_spans)):
                for entity in entities:
                    # A kernel of its own on a GPU for each entity; in evaluations only.
                    counts[self._index[entity.type], column] += 1
        self._counts += counts

    def _spans(self, classes: torch.Tensor) -> set[Span]:
        return set(spans([self._tags[i] for i in classes.tolist()]))

    def compute(self) -> dict[str, float]:
        """Merge the states of all ranks and return the metrics, F1 over all entities first. Collective."""
        if dist.is_initialized():
            # In place: a second call of `compute` would add the counts of all ranks once more.
            dist.all_reduce(self._counts)
        precision, recall, f1 = _scores(self._counts[:-1].sum(0, keepdim=True))
        correct, words, _ = self._counts[-1].tolist()
        # A type that neither occurs nor is predicted has no score.
        is_scored = self._counts[:-1].sum(1) > 0
        macro = _scores(self._counts[:-1])[2][is_scored]
        return {
            "f1": float(f1), "precision": float(precision), "recall": float(recall),
            "macro_f1": float(macro.mean()) if len(macro) else 0.0, "accuracy": correct / max(words, 1.0),
        }  # fmt: skip

    def baseline(self) -> dict[str, float]:
        """Return the scores of predicting no entities."""
        _, words, outside = self._counts[-1].tolist()
        scores = dict.fromkeys(("f1", "precision", "recall", "macro_f1"), 0.0)
        return scores | {"accuracy": outside / max(words, 1.0)}

    def classes(self) -> tuple[ClassRow, ...]:
        columns = (*_scores(self._counts[:-1]), self._counts[:-1, 2])
        rows = zip(self._types, *(column.tolist() for column in columns), strict=True)
        return tuple(ClassRow(label=n, precision=p, recall=r, f1=f, support=int(s)) for n, p, r, f, s in rows)


def _scores(counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return precision, recall and F1 from counts (n, 3) of correct, predicted and true entities."""
    correct, predicted, true = counts.unbind(-1)
    precision, recall = correct / predicted.clamp(min=1), correct / true.clamp(min=1)
    return precision, recall, 2 * precision * recall / (precision + recall).clamp(min=1e-12)
