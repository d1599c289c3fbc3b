"""Entities: spans in tag sequences, and their exact-match scores with the meaning seqeval gives them. Train workers.

A tag is `O`, a prefix and a type (`B-person`), or a type alone, as parts of speech are; the spans are those of
seqeval's default mode (and of conlleval), which also takes an `I-` without its `B-` for the beginning of an entity.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from launcher.rundir.records import ClassRow, ConfusionMatrix

OUTSIDE = "O"


@dataclass(frozen=True)
class Span:
    """An entity: words `start` to `end`, the last one excluded."""

    start: int
    end: int
    type: str


def spans(tags: Sequence[str]) -> list[Span]:
    """The entities of one row, as `seqeval.metrics.sequence_labeling.get_entities` finds them."""
    found: list[Span] = []
    begin, open_type, last_prefix = 0, "", OUTSIDE
    for i, tag in enumerate([*tags, OUTSIDE]):
        prefix, kind = _parts(tag)
        inside = last_prefix != OUTSIDE
        goes_on = inside and prefix in ("I", "E") and kind == open_type and last_prefix not in ("E", "S")
        if inside and not goes_on:
            found.append(Span(begin, i, open_type))
        if prefix != OUTSIDE and not goes_on:
            begin = i
        open_type, last_prefix = kind, prefix
    return found


def entity_types(tags: Sequence[str]) -> tuple[str, ...]:
    """Return the types that occur in a list of tag names, in their order."""
    return tuple(dict.fromkeys(_parts(tag)[1] for tag in tags if tag != OUTSIDE))


_PREFIXED = re.compile(r"([A-Z])(?:-(.+))?")


def _parts(tag: str) -> tuple[str, str]:
    """Split a tag into its prefix and the type; one without a prefix (`NOUN`, `3`) is a type, of runs of such words."""
    match = _PREFIXED.fullmatch(tag)
    return (match[1], match[2] or "_") if match and (match[2] or match[1] in "BIESO") else ("I", tag)


class EntityMetrics:
    """Precision, recall and F1 over entities, per type and together; accuracy over words.

    Args:
        tags: tag names by class.
        device: of the states.
    """

    def __init__(self, tags: tuple[str, ...], device: torch.device) -> None:
        self._tags, self._types = tags, entity_types(tags)
        self._index = {name: i for i, name in enumerate(self._types)}
        # Per type: entities found and right, predicted, true. Last row: words right, words, words outside.
        self._counts = torch.zeros(len(self._types) + 1, 3, dtype=torch.float64, device=device)

    def update(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Count B rows: logits (B, T, tags), labels (B, T) with -100 where no word begins."""
        predicted = logits.argmax(-1)
        counted = labels != -100
        add = torch.zeros_like(self._counts)
        outside = self._tags.index(OUTSIDE) if OUTSIDE in self._tags else -1
        right, all_words = (predicted == labels)[counted].sum(), counted.sum()
        add[-1] = torch.stack([right, all_words, (labels == outside).sum()]).to(add)
        for said, truth, mask in zip(predicted.cpu(), labels.cpu(), counted.cpu(), strict=True):
            found, true = set(self._spans(said[mask])), set(self._spans(truth[mask]))
            for column, some in enumerate((found & true, found, true)):
                for span in some:
                    add[self._index[span.type], column] += 1
        self._counts += add

    def _spans(self, classes: torch.Tensor) -> list[Span]:
        return spans([self._tags[i] for i in classes.tolist()])

    def compute(self) -> dict[str, float]:
        """Merge the workers' states; returns the metrics, F1 over all entities first."""
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(self._counts)
        precision, recall, f1 = _scores(self._counts[:-1].sum(0, keepdim=True))
        right, words, _ = self._counts[-1].tolist()
        occur = self._counts[:-1].sum(1) > 0  # a type that neither occurs nor is predicted has no score
        macro = _scores(self._counts[:-1])[2][occur]
        return {
            "f1": float(f1), "precision": float(precision), "recall": float(recall),
            "macro_f1": float(macro.mean()) if len(macro) else 0.0, "accuracy": right / max(words, 1.0),
        }  # fmt: skip

    def baseline(self) -> dict[str, float]:
        """Always outside of any entity."""
        _, words, outside = self._counts[-1].tolist()
        nothing = dict.fromkeys(("f1", "precision", "recall", "macro_f1"), 0.0)
        return nothing | {"accuracy": outside / max(words, 1.0)}

    def confusion(self) -> ConfusionMatrix | None:
        """Entities have no confusion matrix: most errors are of place."""
        return None

    def classes(self) -> tuple[ClassRow, ...]:
        """Precision, recall and F1 of each type."""
        columns = (*_scores(self._counts[:-1]), self._counts[:-1, 2])
        rows = zip(self._types, *(column.tolist() for column in columns), strict=True)
        return tuple(ClassRow(label=n, precision=p, recall=r, f1=f, support=int(s)) for n, p, r, f, s in rows)


def _scores(counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    right, predicted, true = counts.unbind(-1)
    precision, recall = right / predicted.clamp(min=1), right / true.clamp(min=1)
    return precision, recall, 2 * precision * recall / (precision + recall).clamp(min=1e-12)
