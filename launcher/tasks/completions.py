"""Parameters and samples of the tasks that compare completions of a prompt. Runs wherever a task runs.

Read `preference.py` and `reward.py` for the tasks, `models/completions.py` for what the cells may hold.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from launcher.formatting import format_percent, show_value
from launcher.models.chat import IGNORED, load_chat_tokenizer
from launcher.models.completions import CompletionWriter, Tokens, fit
from launcher.models.conversation import to_display_text
from launcher.spec.model import ModelSpec
from launcher.tasks.base import Task
from launcher.tasks.padding import list_column
from launcher.tasks.params import TaskParams
from launcher.tasks.results import RowInputs
from launcher.tasks.samples import Encoded, read_each

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Defaults of `beta`: those of the papers, of SimPO the smallest that its authors advise.
_BETA = {"dpo": 0.1, "ipo": 0.1, "orpo": 0.1, "simpo": 2.0, "kto": 0.1}
_HAS_REFERENCE = ("dpo", "ipo", "kto")
# Keys that one loss alone reads.
_OWN_KEYS = {
    "label_smoothing": "dpo", "gamma": "simpo", "desirable_weight": "kto", "undesirable_weight": "kto",
}  # fmt: skip

_JUDGEMENTS = {"true": 1, "1": 1, "1.0": 1, "false": 0, "0": 0, "0.0": 0}
PAIR = ("chosen", "rejected")
"""Names of the two sequences of a row."""
_Row = Mapping[str, object]


class CompletionParams(TaskParams):
    """Parameters of tasks that learn from a chosen and a rejected completion."""

    prompt: str | None = "prompt"
    """Column with the prompts: texts, or lists of {role, content}; null if completions are whole conversations."""
    chosen: str = "chosen"
    """Column with the better completion of each prompt: texts, lists of messages, or whole conversations, which differ
    from the rejected ones in their last messages."""
    rejected: str = "rejected"
    """Column with the worse completion, in the same form."""
    system: str | None = None
    """Column with the system message of each prompt."""
    chat_template: str | None = None
    """Jinja template of conversations; `chatml` for that one; null takes the tokenizer's own."""
    max_length: int = Field(default=512, ge=8)
    """Tokens kept of each prompt with its completion: a long prompt loses its beginning, then a completion its end."""
    max_prompt_length: int | None = Field(default=None, ge=1)
    """Tokens that a long prompt keeps; null is half of max_length."""

    @model_validator(mode="after")
    def _check_lengths(self) -> "CompletionParams":
        if self.prompt_limit >= self.max_length:
            raise ValueError(
                f"max_prompt_length: {self.prompt_limit} leaves nothing of max_length: {self.max_length} to the "
                "completion; lower it"
            )
        return self

    @property
    def prompt_limit(self) -> int:
        """Number of tokens that a long prompt keeps."""
        return self.max_prompt_length or self.max_length // 2

    @property
    def completion_columns(self) -> tuple[str, ...]:
        """Columns with completions."""
        return (self.chosen, self.rejected)

    @property
    def context_columns(self) -> tuple[str, ...]:
        """Columns that are read in addition to prompts and completions."""
        return (self.system,) if self.system else ()

    def writer(self, tokenizer: "PreTrainedTokenizerBase") -> CompletionWriter:
        """Return what turns rows into tokens."""
        return CompletionWriter(tokenizer, self.completion_columns, self.prompt or "", self.system or "")

    def fit(self, sequences: Sequence[Tokens]) -> list[Tokens]:
        """Cut completions of one prompt to `max_length`."""
        return fit(sequences, self.max_length, self.prompt_limit)

    def encode_row(self, writer: CompletionWriter, row: _Row) -> list[Tokens]:
        """Return the prompt of a row with each completion, cut to `max_length`.

        Raises:
            ValueError: The row cannot be used; the text says why.
        """
        sequences = self.fit(writer.tokens(row))
        names, limit = writer.columns, f"first {self.max_length} tokens (task.max_length)"
        for name, sequence in zip(names, sequences, strict=True):
            if max(sequence.labels) == IGNORED:
                raise ValueError(f"{name} has nothing to learn among its {limit}; lower task.max_prompt_length")
        if len(sequences) > 1 and sequences[0] == sequences[1]:
            raise ValueError(f"{' and '.join(names)} are the same in their {limit}")
        return sequences


class RewardParams(CompletionParams):
    """`task:` with `type: reward`."""

    margin: str | None = None
    """Column with the least difference of rewards that each pair should have, a number (arXiv:2307.09288)."""


class PreferenceParams(CompletionParams):
    """`task:` with `type: preference`."""

    loss: Literal["dpo", "ipo", "orpo", "simpo", "kto"] = "dpo"
    """Loss: of pairs dpo (arXiv:2305.18290), ipo (2310.12036), orpo (2403.07691) or simpo (2405.14734); kto
    (2402.01306) of single completions with a label. orpo and simpo need no reference model."""
    completion: str = "completion"
    """Column with the completions of kto."""
    label: str = "label"
    """Column with the judgements of kto: true or 1 for a desirable completion, false or 0 for an undesirable one."""
    beta: float | None = Field(default=None, gt=0.0)
    """Strength of the pull towards the reference (tau of ipo), weight of orpo's odds ratio (lambda), or scale of
    simpo's rewards; null is 0.1, and 2.0 for simpo."""
    label_smoothing: float = Field(default=0.0, ge=0.0, lt=0.5)
    """Probability that a preference of dpo is the wrong way round (conservative DPO); evaluations use 0."""
    gamma: float = Field(default=1.0, ge=0.0)
    """Margin of the rewards that simpo asks for."""
    desirable_weight: float = Field(default=1.0, ge=0.0)
    """Weight of kto's desirable rows; with unequal numbers of both kinds, weight times number should be about equal."""
    undesirable_weight: float = Field(default=1.0, ge=0.0)
    """Weight of kto's undesirable rows."""
    reference: str | None = None
    """Reference model, an absolute path or a name on the Hub; null is the model that training starts from."""
    reference_revision: str | None = None
    """Commit, branch or tag of the reference on the Hub; null means the default branch."""
    max_new_tokens: int = Field(default=64, ge=1)
    """Most tokens that `predict`, and the samples in the report, generate."""

    @model_validator(mode="after")
    def _check_keys(self) -> "PreferenceParams":
        for key, loss in _OWN_KEYS.items():
            if loss != self.loss and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} is for loss: {loss}, and loss is {self.loss}; drop {key}")
        if self.reference is not None and not self.has_reference:
            raise ValueError(f"reference: loss {self.loss} compares with no reference; drop reference")
        return self

    @property
    def completion_columns(self) -> tuple[str, ...]:
        """Columns with completions."""
        return (self.completion,) if self.loss == "kto" else (self.chosen, self.rejected)

    @property
    def has_reference(self) -> bool:
        """Return True if the loss compares with a reference model."""
        return self.loss in _HAS_REFERENCE

    @property
    def strength(self) -> float:
        """Value of `beta`."""
        return _BETA[self.loss] if self.beta is None else self.beta

    def with_reference(self, name: str, revision: str | None) -> "PreferenceParams":
        """Return the parameters with a reference, where the loss compares with one and none is set."""
        if not self.has_reference or self.reference is not None:
            return self
        return self.model_copy(update={"reference": name, "reference_revision": revision})


def encode_prompts(params: PreferenceParams, writer: CompletionWriter, rows: pa.Table) -> Encoded:
    """Return the prompts of rows, in the column `input_ids`; a long one loses its beginning."""
    prompts, valid_rows, problems = read_each(rows.to_pylist(), writer.prompt_tokens)
    # `max_length` may be the number of the model's positions, and the answer needs some of them.
    limit = max(params.prompt_limit, params.max_length - params.max_new_tokens)
    ids = [prompt[-limit:] for prompt in prompts]
    return _encoded({"input_ids": list_column(ids)}, ids, valid_rows, problems)


def encode_pairs(
    params: CompletionParams, writer: CompletionWriter, rows: pa.Table, margin: str | None = None
) -> Encoded:
    """Return chosen and rejected sequences (`*_ids`, `*_labels`), and the number of chosen tokens that are learned.

    Args:
        params: Parameters of the task.
        writer: Writer of both completions.
        rows: Rows of the data.
        margin: Column with a number for each pair, which the samples get as `margin`; None for none.
    """

    def encode(row: _Row) -> tuple[list[Tokens], float]:
        return params.encode_row(writer, row), _number(row[margin], margin) if margin else 0.0

    pairs, valid_rows, problems = read_each(rows.to_pylist(), encode)
    columns: dict[str, pa.Array] = {}
    for k, name in enumerate(PAIR):
        columns[f"{name}_ids"] = list_column([pair[k].ids for pair, _ in pairs])
        columns[f"{name}_labels"] = list_column([pair[k].labels for pair, _ in pairs])
    columns["chosen_tokens"] = pa.array([len(chosen.completion) for (chosen, _), _ in pairs], pa.int64())
    if margin:
        columns["margin"] = pa.array([value for _, value in pairs], pa.float64())
    ids = [chosen.ids + rejected.ids for (chosen, rejected), _ in pairs]
    return _encoded(columns, ids, valid_rows, problems)


def _number(value: object, column: str) -> float:
    if value is None:
        raise ValueError(f"{column} is null")
    try:
        number = float(str(value))
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{column} is {show_value(value)}, which is not a finite number")
    return number


def encode_single(params: CompletionParams, writer: CompletionWriter, rows: pa.Table) -> Encoded:
    """Return sequences of a single completion, in the column `input_ids`."""
    sequences, valid_rows, problems = read_each(rows.to_pylist(), lambda row: params.encode_row(writer, row)[0])
    ids = [sequence.ids for sequence in sequences]
    return _encoded({"input_ids": list_column(ids)}, ids, valid_rows, problems)


def encode_judged(params: PreferenceParams, writer: CompletionWriter, rows: pa.Table) -> Encoded:
    """Return sequences (`input_ids`, `labels`) and 1 for each desirable one, 0 for an undesirable one."""

    def encode(row: _Row) -> tuple[Tokens, int]:
        label = row[params.label]
        if label is None:
            raise ValueError(f"{params.label} is null")
        if str(label).lower() not in _JUDGEMENTS:
            raise ValueError(f"{params.label} is {show_value(label)}, which is neither true nor false")
        return params.encode_row(writer, row)[0], _JUDGEMENTS[str(label).lower()]

    judged, valid_rows, problems = read_each(rows.to_pylist(), encode)
    ids = [sequence.ids for sequence, _ in judged]
    columns = {
        "input_ids": list_column(ids),
        "labels": list_column([sequence.labels for sequence, _ in judged]),
        "desirable": pa.array([judgement for _, judgement in judged], pa.int64()),
    }
    return _encoded(columns, ids, valid_rows, problems)


def mismatched(params: CompletionParams, samples: pa.Table) -> list[Tokens]:
    """Return the prompt of each sample with the completion of its partner (`Task.partner_columns`)."""
    names = ("input_ids", "labels", "partner_input_ids", "partner_labels")
    rows = zip(*(samples.column(name).to_pylist() for name in names), strict=True)
    pairs = (Tokens(ids, labels).with_completion_of(Tokens(*partner)) for ids, labels, *partner in rows)
    return [params.fit([pair])[0] for pair in pairs]


def _encoded(
    columns: dict[str, pa.Array],
    ids: Sequence[Sequence[int]],
    valid_rows: Sequence[int],
    problems: tuple[tuple[int, str], ...],
) -> Encoded:
    """Return samples whose cost is the number of their tokens. Each row weighs 1, however long it is."""
    lengths = np.array([len(row) for row in ids], np.int64)
    return Encoded(pa.table(columns), np.array(valid_rows, np.int64), lengths, np.ones(len(ids)), problems)


def cut_notes(params: CompletionParams, writer: CompletionWriter, rows: pa.Table) -> tuple[str, ...]:
    """Return remarks on the prompts and completions that are cut, among some rows with bad ones among them."""
    looked_at = prompts = completions = 0
    for row in rows.to_pylist():
        # Bad rows are reported elsewhere (`data.on_bad_row`).
        with suppress(ValueError):
            whole = writer.tokens(row)
            pairs = list(zip(whole, params.fit(whole), strict=True))
            looked_at += 1
            prompts += any(cut.prompt_length < sequence.prompt_length for sequence, cut in pairs)
            completions += any(len(cut.completion) < len(sequence.completion) for sequence, cut in pairs)
    notes = []
    for count, what in ((prompts, "prompts lose their beginning"), (completions, "completions lose their end")):
        if count:
            share = f"{format_percent(count / looked_at)} ({count} of the {looked_at} rows looked at)"
            notes.append(f"task.max_length: in {share}, {what} beyond {params.max_length} tokens; raise it")
    return tuple(notes)


def example_completions(rows: int, seed: int) -> pa.Table:
    """Return prompts with an answer of the words w0..w99 (chosen, desirable) and one of w100..w199.

    Args:
        rows: Number of rows.
        seed: Seed of the words.
    """
    rng = np.random.default_rng(seed)
    prompts = [" ".join(f"w{w}" for w in rng.integers(0, 200, n)) for n in rng.integers(2, 8, rows)]
    good, bad = (
        [" ".join(f"w{w}" for w in rng.integers(0, 100, n) + first) for n in rng.integers(2, 12, rows)]
        for first in (0, 100)
    )
    labels = rng.integers(0, 2, rows).astype(bool)
    completions = [good[i] if label else bad[i] for i, label in enumerate(labels)]
    columns = {"prompt": prompts, "chosen": good, "rejected": bad, "completion": completions, "label": labels}
    return pa.table(columns)


class CompletionTask(Task):
    """Task that compares completions of a prompt: what does not depend on the loss. Data workers and train workers."""

    params: CompletionParams
    augments = False
    from_scratch = "decoder"

    def __init__(self, params: CompletionParams, model: ModelSpec, seed: int) -> None:
        # Without dropout, unless the job asks for it: its noise would count as a difference of what is compared.
        model = model if model.dropout is not None else model.model_copy(update={"dropout": 0.0})
        self.params, self.model, self.seed = params, model, seed

    @cached_property
    def _tokenizer(self) -> "PreTrainedTokenizerBase":
        return load_chat_tokenizer(self.model, self.params.chat_template, required=True)

    def processor(self) -> "PreTrainedTokenizerBase":
        return self._tokenizer

    @cached_property
    def _writer(self) -> CompletionWriter:
        return self.params.writer(self._tokenizer)

    def remarks(self, rows: pa.Table, unread: Sequence[str] = ()) -> tuple[str, ...]:
        return cut_notes(self.params, self._writer, rows)

    def display_inputs(self, row: Mapping[str, object]) -> RowInputs:
        return RowInputs({name: to_display_text(row[name]) for name in self.input_columns})

    def example_rows(self, rows: int, seed: int) -> pa.Table:
        """Return prompts with an answer of the words w0..w99 (chosen, desirable) and one of w100..w199."""
        return example_completions(rows, seed)
