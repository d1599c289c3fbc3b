"""Texts that are compared: parameters and rows of `sentence_embedding.py` and `reranking.py`.

A row is a query with the document that answers it and others that do not, or two texts with a score. Runs wherever a
task runs.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, model_validator

from launcher.formatting import as_text
from launcher.models.pooling import Pooling
from launcher.tasks.metrics.labels import Labels
from launcher.tasks.padding import list_column, pad_lists, text_inputs
from launcher.tasks.params import TaskParams
from launcher.tasks.samples import Batch, Encoded, read_each

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

_Value = TypeVar("_Value")


class QueryParams(TaskParams):
    """Parameters of all tasks that rank documents for a query."""

    query: str = "query"
    """Column that holds the query."""
    positive: str = "positive"
    """Column that holds the document which answers the query."""
    negatives: str | None = None
    """Column that holds documents which do not: a text, or a list of texts of any length."""
    negatives_per_row: int = Field(default=1, ge=1)
    """Negatives that are read of each row; those after them are not, and a row may have fewer."""
    max_length: int = Field(default=256, ge=4)
    """Tokens kept of each text; the rest is cut off."""

    def read_documents(self, row: Mapping[str, object]) -> list[str]:
        """Return the positive document of a row and after it the negatives, without those that repeat the positive.

        Raises:
            ValueError: A document is null, blank or no text.
        """
        first, column = read_text(row, self.positive), self.negatives
        cell = None if column is None else row[column]
        if column is None or cell is None:
            return [first]
        others = [read_text({column: text}, column) for text in (cell if isinstance(cell, list) else [cell])]
        return [first, *[text for text in others if text != first][: self.negatives_per_row]]

    def unread_note(self, rows: pa.Table) -> tuple[str, ...]:
        """Return a remark on negatives in a sample of the data that are not read; empty if all are."""
        cells = rows.column(self.negatives).to_pylist() if self.negatives else []
        most, longest = self.negatives_per_row, max((len(c) for c in cells if isinstance(c, list)), default=0)
        if longest <= most:
            return ()
        return (
            f"task.negatives_per_row: rows have up to {longest} negatives, of which the first {most} are read; raise "
            "it to read more, at the cost of as many more texts per row",
        )


_TOKENS = ("input_ids", "token_type_ids")
_QUERY_KEYS = ("query", "positive", "negatives", "negatives_per_row", "symmetric")
_PAIR_KEYS = ("text_a", "text_b", "score")


class EmbeddingParams(QueryParams):
    """`task:` with `type: sentence-embedding`."""

    loss: Literal["multiple-negatives", "cosent", "cosine"] = "multiple-negatives"
    """`multiple-negatives` ranks the positive of each row before all other documents of the global batch, whatever the
    micro-batch and the number of workers, so `train.batch_size` is part of the result: more rows, more negatives.
    `cosent` and `cosine` read pairs with a score: their order over the global batch, or the squared error of the
    cosine."""
    text_a: str = "text_a"
    """Column that holds the first text of a scored pair."""
    text_b: str = "text_b"
    """Column that holds the second text of a scored pair."""
    score: str = "score"
    """Column that holds the similarity of a pair, a number; its range means something for the loss `cosine` alone."""
    max_score: float = Field(default=1.0, gt=0.0)
    """Score of equal texts, by which scores are divided for the loss `cosine`: 5 if they go from 0 to 5."""
    scale: float = Field(default=20.0, gt=0.0)
    """Factor of the cosines in `multiple-negatives` and `cosent`: 20 is a temperature of 0.05."""
    symmetric: bool = False
    """Whether `multiple-negatives` also ranks the queries of the global batch for each positive."""
    pooling: Pooling = "mean"
    """Vector of a text: mean of its tokens' vectors (MiniLM, e5), or that of the first (`cls`: bge, gte) or last token
    (`last`: Qwen3-Embedding); the way that the model was trained is the best."""
    query_prefix: str = ""
    """Text in front of each query and `text_a`: "query: " for e5."""
    document_prefix: str = ""
    """Text in front of each document and `text_b`: "passage: " for e5."""

    @model_validator(mode="after")
    def _check_form(self) -> "EmbeddingParams":
        others = _QUERY_KEYS if self.is_scored else _PAIR_KEYS
        fields = type(self).model_fields
        # Values and not `model_fields_set`: the parameters of a run are stored with all their defaults.
        extra = next((key for key in others if getattr(self, key) != fields[key].default), None)
        if extra is not None:
            raise ValueError(f"{extra} has no meaning for loss {self.loss}; drop {extra}, or name another loss")
        if self.loss != "cosine" and self.max_score != 1.0:
            raise ValueError(f"max_score is for loss cosine, and loss is {self.loss}; drop max_score")
        return self

    @property
    def is_scored(self) -> bool:
        """Return True if rows are pairs with a score."""
        return self.loss != "multiple-negatives"

    @property
    def texts(self) -> tuple[str, ...]:
        """Columns of texts: that of the query first, then those of documents."""
        if self.is_scored:
            return (self.text_a, self.text_b)
        return (self.query, self.positive, *filter(None, [self.negatives]))

    @property
    def documents_per_row(self) -> int:
        """Largest number of documents of a row."""
        return 1 + (0 if self.negatives is None else self.negatives_per_row)

    def prediction_column(self, names: Sequence[str]) -> str:
        """Return the column that `predict` embeds of data with these: the query's, or without it the documents'."""
        first, second, *_ = self.texts
        return second if second in names and first not in names else first

    def read_texts(self, row: Mapping[str, object]) -> list[str]:
        """Return the query of a row and its documents, or both texts of a pair, with their prefixes.

        Raises:
            ValueError: A text is null, blank or no text.
        """
        query = self.query_prefix + read_text(row, self.texts[0])
        documents = [read_text(row, self.text_b)] if self.is_scored else self.read_documents(row)
        return [query, *(self.document_prefix + document for document in documents)]

    def read_score(self, row: Mapping[str, object]) -> float:
        """Return the score of a pair; 0 where rows have none.

        Raises:
            ValueError: The score is null, no number, or beyond the range that a cosine can reach.
        """
        if not self.is_scored:
            return 0.0
        score, most = Labels(self.score, "regression", ()).target(row[self.score])[0], self.max_score
        if self.loss == "cosine" and abs(score) > most:
            reason = f"not between {-most:g} and {most:g}; set task.max_score to the score of equal texts"
            raise ValueError(f"{self.score} is {score:g}, which is {reason}")
        return score


class RerankingParams(QueryParams):
    """`task:` with `type: reranking`."""

    negatives: str = "negatives"
    """Column that holds the documents that the positive must be ranked before: a text, or a list of any length."""
    negatives_per_row: int = Field(default=7, ge=1)
    """Negatives that are read of each row, in evaluations too; a row may have fewer, but not none."""
    max_length: int = Field(default=256, ge=8)
    """Tokens kept of a query and a document together; the longer of both is cut first."""

    def read_pairs(self, row: Mapping[str, object]) -> list[tuple[str, str]]:
        """Return the query of a row with its positive, and with each of its negatives.

        Raises:
            ValueError: A text is null, blank or no text, or there is no negative.
        """
        query = read_text(row, self.query)
        if row[self.negatives] is None:
            raise ValueError(f"{self.negatives} is null")
        documents = self.read_documents(row)
        if len(documents) == 1:
            raise ValueError(f"{self.negatives} has no document besides the positive, so there is nothing to rank")
        return [(query, document) for document in documents]


def read_text(row: Mapping[str, object], column: str) -> str:
    """Return a cell as text.

    Raises:
        ValueError: The cell is null, blank or no text.
    """
    text = as_text(row[column], column)
    # A tokenizer without special tokens would make nothing of it, and a model has no output for nothing.
    if not text.strip():
        raise ValueError(f"{column} is empty")
    return text


def read_rows(
    rows: pa.Table, columns: Sequence[str], read: Callable[[Mapping[str, object]], _Value]
) -> tuple[list[_Value], "np.ndarray", tuple[tuple[int, str], ...]]:
    """Return what `read` makes of each row, the positions of the rows, int64, and (position, reason) of the others."""
    values, valid_rows, problems = read_each(rows.select(list(columns)).to_pylist(), read)
    return values, np.array(valid_rows, np.int64), problems


@dataclass(frozen=True)
class EmbeddingRows:
    """Rows of `sentence-embedding` as samples and batches: a query, and its documents where there are targets.

    Args:
        params: Parameters of the task.
        tokenizer: Tokenizer of the model.
    """

    params: EmbeddingParams
    tokenizer: "PreTrainedTokenizerBase"

    def tokens(self, texts: Sequence[str], **limits: object) -> list[list[int]]:
        """Return the tokens of each text."""
        # Without token types: a lone text has one type, which is the model's default.
        options = {"return_attention_mask": False, "return_token_type_ids": False, **limits}
        ids: list[list[int]] = self.tokenizer(list(texts), **options)["input_ids"] if texts else []
        return ids

    def encode(self, rows: pa.Table, with_targets: bool) -> Encoded:
        """Return samples: tokens of the query, and lists of those of the documents, with hashes of all."""
        params, column = self.params, self.params.prediction_column(rows.column_names)
        prefix = params.query_prefix if column == params.texts[0] else params.document_prefix

        def read(row: Mapping[str, object]) -> tuple[list[str], float]:
            if not with_targets:
                return [prefix + read_text(row, column)], 0.0
            return params.read_texts(row), params.read_score(row)

        columns = [*params.texts, *[params.score] * params.is_scored] if with_targets else [column]
        values, valid_rows, problems = read_rows(rows, columns, read)
        flat = iter(
            self.tokens([text for texts, _ in values for text in texts], truncation=True, max_length=params.max_length)
        )
        tokens = [[next(flat) for _ in texts] for texts, _ in values]
        samples = {"input_ids": list_column([row[0] for row in tokens])}
        if with_targets:
            samples["documents"] = lists_column([row[1:] for row in tokens])
            samples["hashes"] = pa.array([list(map(hash_tokens, row)) for row in tokens], pa.list_(pa.int64()))
            samples["score"] = pa.array([score for _, score in values], pa.float32())
        lengths = np.array([sum(map(len, row)) for row in tokens], np.int64)
        return Encoded(pa.table(samples), valid_rows, lengths, np.ones(len(tokens)), problems)

    def collate(self, samples: pa.Table) -> Batch:
        """Pad queries to (B, T) as the inputs, and documents to (S, T) with the place of each as targets."""
        import torch

        pad, width = self.tokenizer.pad_token_id, self.params.documents_per_row
        targets: dict[str, torch.Tensor] = {}
        if "documents" in samples.column_names:
            documents, targets["places"] = flat_inputs(samples, {"input_ids": "documents"}, pad, width)
            targets |= {f"document_{name}": tensor for name, tensor in documents.items()}
            hashes = pad_lists(samples.column("hashes"), 0)
            targets["query_hash"] = torch.from_numpy(hashes[:, 0].copy())
            # One width for all micro-batches: the ranks gather the outputs, which need equal shapes.
            own = np.pad(hashes[:, 1:], ((0, 0), (0, width + 1 - hashes.shape[1])))
            targets["document_hash"] = torch.from_numpy(own)
            targets["score"] = torch.from_numpy(samples.column("score").to_numpy().copy())
        return Batch(text_inputs(samples, pad), torch.zeros(len(samples)), torch.ones(len(samples)), targets)


@dataclass(frozen=True)
class PairRows:
    """Rows of `reranking` as samples and batches: a query with its positive, and with each negative as a target.

    Args:
        params: Parameters of the task.
        tokenizer: Tokenizer of the model.
    """

    params: RerankingParams
    tokenizer: "PreTrainedTokenizerBase"

    def tokens(self, pairs: Sequence[tuple[str, str]], **limits: object) -> dict[str, list[list[int]]]:
        """Return `input_ids`, and `token_type_ids` where the model has them, of each query with a document."""
        if not pairs:
            return {"input_ids": []}
        queries, documents = zip(*pairs, strict=True)
        tokens = self.tokenizer(list(queries), list(documents), return_attention_mask=False, **limits)
        return {name: tokens[name] for name in _TOKENS if name in tokens}

    def encode(self, rows: pa.Table, with_targets: bool) -> Encoded:
        """Return samples: tokens of the query with its positive, and lists of those with its negatives."""
        params, columns = self.params, [self.params.query, self.params.positive]

        def read(row: Mapping[str, object]) -> list[tuple[str, str]]:
            return (
                params.read_pairs(row) if with_targets else [(read_text(row, columns[0]), read_text(row, columns[1]))]
            )

        values, valid_rows, problems = read_rows(rows, [*columns, *[params.negatives] * with_targets], read)
        flat = self.tokens([pair for pairs in values for pair in pairs], truncation=True, max_length=params.max_length)
        ends = np.cumsum([len(pairs) for pairs in values]).tolist()
        begins = [0, *ends[:-1]] if values else []
        spans = list(zip(begins, ends, strict=True))
        samples: dict[str, pa.ListArray] = {}
        for name, tokens in flat.items():
            samples[name] = list_column([tokens[begin] for begin, _ in spans])
            if with_targets:
                samples[f"negative_{name}"] = lists_column([tokens[begin + 1 : end] for begin, end in spans])
        lengths = np.array([sum(map(len, flat["input_ids"][begin:end])) for begin, end in spans], np.int64)
        return Encoded(pa.table(samples), valid_rows, lengths, np.ones(len(values)), problems)

    def collate(self, samples: pa.Table) -> Batch:
        """Pad pairs with positives to (B, T) as the inputs, and those with negatives to (S, T) as targets."""
        import torch

        pad, names = self.tokenizer.pad_token_id, [name for name in _TOKENS if name in samples.column_names]
        targets: dict[str, torch.Tensor] = {}
        if "negative_input_ids" in samples.column_names:
            counts = pc.list_value_length(samples.column("negative_input_ids")).to_numpy()
            columns = {name: f"negative_{name}" for name in names}
            negatives, targets["places"] = flat_inputs(samples, columns, pad, int(counts.max()))
            targets |= {f"negative_{name}": tensor for name, tensor in negatives.items()}
            # The positive is at 0, so there is always one document more than negatives.
            targets["is_document"] = torch.from_numpy(np.arange(counts.max() + 1) <= counts[:, None])
        labels = torch.zeros(len(samples), dtype=torch.int64)
        return Batch(text_inputs(samples, pad), labels, torch.ones(len(samples)), targets)


def lists_column(rows: list[list[list[int]]]) -> pa.ListArray:
    """Return lists of integer lists as an Arrow column: the tokens of each row's documents."""
    return pa.array(rows, type=pa.list_(pa.list_(pa.int32())))


def hash_tokens(ids: Sequence[int]) -> int:
    """Return a number of 64 bits, never 0, that is the same for the same tokens in every process."""
    digest = hashlib.blake2b(np.asarray(ids, np.int32).tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True) or 1


def flat_inputs(
    samples: pa.Table, columns: Mapping[str, str], pad_token_id: int | None, width: int
) -> "tuple[dict[str, torch.Tensor], torch.Tensor]":
    """Return the sequences of B rows as one batch, and where each belongs.

    Args:
        samples: Rows with lists of token lists.
        columns: Column of each of `input_ids` and, where the model has them, `token_type_ids`.
        pad_token_id: Padding token; None pads with 0.
        width: Number of places of each row.

    Returns:
        Inputs of `text_inputs`, (S, T), and the place of each sequence, int64 (S,): row * width + position in its row.
    """
    import torch

    lists = {name: samples.column(column).combine_chunks() for name, column in columns.items()}
    counts = pc.list_value_length(lists["input_ids"]).to_numpy()
    places = np.concatenate([row * width + np.arange(count) for row, count in enumerate(counts)])
    # `flatten` respects the offset of a sliced column; `values` would return the lists of its neighbours too.
    flat = pa.table({name: column.flatten() for name, column in lists.items()})
    return text_inputs(flat, pad_token_id), torch.from_numpy(places.astype(np.int64))


def to_places(values: "torch.Tensor", places: "torch.Tensor", rows: int, width: int, fill: float) -> "torch.Tensor":
    """Return S values (S, ...) in the places of their rows, (rows, width, ...); other places hold `fill`."""
    # Differentiable, without a loop over rows, and deterministic, as no place occurs twice.
    padded = values.new_full((rows * width, *values.shape[1:]), fill)
    return padded.index_copy(0, places, values).view(rows, width, *values.shape[1:])


def example_texts(rows: int, seed: int) -> tuple[list[str], list[str], list[float]]:
    """Return queries of five words, documents that have 0 to 5 of them, and that number, for `Task.example_rows`."""
    rng = np.random.default_rng(seed)
    queries, documents, shared = [], [], rng.integers(0, 6, rows)
    for common in shared:
        words = rng.choice(200, 10, replace=False)
        queries.append(" ".join(f"w{word}" for word in words[:5]))
        documents.append(" ".join(f"w{word}" for word in words[5 - common : 10 - common]))
    return queries, documents, shared.astype(float).tolist()


def example_rankings(rows: int, seed: int) -> tuple[list[str], list[str], list[list[str]]]:
    """Return queries, documents of the words w0..w99 to rank first, and one to three others of w100..w199."""
    rng = np.random.default_rng(seed)

    def text(first: int) -> str:
        return " ".join(f"w{first + word}" for word in rng.integers(0, 100, rng.integers(3, 9)))

    negatives = [[text(100) for _ in range(rng.integers(1, 4))] for _ in range(rows)]
    return [text(0) for _ in range(rows)], [text(0) for _ in range(rows)], negatives
