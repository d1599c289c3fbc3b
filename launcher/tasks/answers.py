"""Parameters and rows of extractive question answering: answers, and their tokens in the windows of a context.

Runs on the client and the head (parameters) and in data workers (rows), without torch. Read `metrics/answer_spans.py`
next for how a model's answer is found, and `metrics/squad.py` for how it is scored.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from launcher.errors import DataError
from launcher.formatting import as_text, show_value
from launcher.models.windows import Window, read_windows, room_beside
from launcher.tasks.params import TaskParams, TrainingColumns, item_type
from launcher.tasks.samples import Encoded, read_each

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FORMS = "{text: [...], answer_start: [...]} as SQuAD has it, or a list of {text, start}"


class AnswerParams(TaskParams):
    """`task:` with `type: question-answering`."""

    question: str = "question"
    """Column that holds the question."""
    context: str = "context"
    """Column that holds the text with the answer; one longer than max_length is read in several windows."""
    answers: str = "answers"
    """Column that holds the right answers: {text: [...], answer_start: [...]} as SQuAD has it, or a list of {text,
    start}. Starts count characters from 0. The first answer is learned; empty lists are questions without an answer."""
    max_length: int = Field(default=384, ge=8)
    """Tokens of a window: the question and a part of the context. All windows of a row are in memory together."""
    doc_stride: int | None = Field(default=None, ge=0)
    """Tokens of the context that two windows in a row share; null takes a third of max_length. An answer that is
    longer may be whole in no window."""
    n_best: int = Field(default=20, ge=1)
    """First and last tokens in each window that are combined to find the best answer."""
    max_answer_length: int = Field(default=30, ge=1)
    """Tokens of the longest answer that is predicted."""
    unanswerable: bool | None = None
    """Whether "no answer" may be predicted, as in SQuAD 2; null does so if the training data has such rows."""
    null_threshold: float = 0.0
    """Logits by which "no answer" must be better than the best answer to be predicted."""

    @model_validator(mode="after")
    def _check_stride(self) -> "AnswerParams":
        if self.overlap >= self.max_length:
            raise ValueError(f"doc_stride {self.overlap} leaves nothing new in windows of {self.max_length}; lower it")
        return self

    @property
    def overlap(self) -> int:
        """Tokens of the context that consecutive windows share."""
        return self.max_length // 3 if self.doc_stride is None else self.doc_stride

    def with_column(self, data: TrainingColumns) -> "AnswerParams":
        """Return the parameters with `unanswerable`, unless the job file has it.

        Raises:
            DataError: The column of answers has a type that holds none.
        """
        arrow_type = data.type_of(self.answers)
        kind = item_type(arrow_type)
        names = {field.name for field in kind} if pa.types.is_struct(kind) else set()
        if "text" not in names or names.isdisjoint(("start", "answer_start")):
            raise DataError(
                f"task: column {self.answers} of the training data is of type {arrow_type}; give {_FORMS}, in Parquet "
                "or JSON"
            )
        if self.unanswerable is not None:
            return self
        cells = (cell for piece in data.pieces(self.answers) for cell in piece.to_pylist())
        return self.model_copy(update={"unanswerable": any(_is_unanswerable(cell) for cell in cells)})


def _is_unanswerable(cell: object) -> bool:
    try:
        return not read_answers(cell, "")
    except ValueError:
        # `encode` refuses such a row, or leaves it out.
        return False


@dataclass(frozen=True)
class Answer:
    """Right answer of a question: a span of its context."""

    text: str
    start: int
    """First character in the context."""

    @property
    def end(self) -> int:
        """Character after the last one."""
        return self.start + len(self.text)


def read_answers(cell: object, column: str) -> list[Answer]:
    """Return the answers in a cell; none if the context has no answer.

    Args:
        cell: Lists under the keys `text` and `answer_start`, or a list with a struct for each answer.
        column: Name of the column, for messages.

    Raises:
        ValueError: The cell is null or has another form; the text says why.
    """
    if cell is None:
        raise ValueError(f"{column} is null")
    if isinstance(cell, dict):
        texts, starts = cell.get("text"), cell.get("answer_start", cell.get("start"))
    elif isinstance(cell, list) and all(isinstance(item, dict) for item in cell):
        texts = [item.get("text") for item in cell]
        starts = [item.get("start", item.get("answer_start")) for item in cell]
    else:
        raise ValueError(f"{column} is {show_value(cell)}, which is not {_FORMS}")
    if not isinstance(texts, list) or not isinstance(starts, list):
        raise ValueError(f"{column} is {show_value(cell)}, which is not {_FORMS}")
    if len(texts) != len(starts):
        raise ValueError(f"{column} has {len(texts)} texts for {len(starts)} starts")
    answers = []
    for text, start in zip(texts, starts, strict=True):
        if not isinstance(text, str) or not isinstance(start, int):
            raise ValueError(
                f"{column} has the answer {show_value(text)} at {show_value(start)}; give text and integer"
            )
        # Some conversions of SQuAD 2 write an empty text where there is no answer; its evaluation drops such texts too.
        if text.strip():
            answers.append(Answer(text, start))
    return answers


def check_place(answer: Answer, context: str, column: str, context_column: str) -> Answer:
    """Return an answer without the spaces around it, if it stands in the context where it says.

    Args:
        answer: Answer of the row.
        context: Context of the row.
        column: Name of the answers' column, for messages.
        context_column: Name of the context's column.

    Raises:
        ValueError: Other characters stand there; the text says which.
    """
    there = context[answer.start : answer.end] if answer.start >= 0 else ""
    if there != answer.text:
        place = context.find(answer.text)
        hint = f"it stands at {place}, in characters from 0" if place >= 0 else f"{context_column} does not contain it"
        raise ValueError(
            f"{column} has the answer {show_value(answer.text)} at {answer.start}, where {context_column} has "
            f"{show_value(there)} ({hint})"
        )
    stripped = answer.text.strip()
    return Answer(stripped, answer.start + answer.text.index(stripped))


@dataclass(frozen=True)
class Example:
    """Row of the data, checked."""

    question: str
    context: str
    answers: tuple[Answer, ...]
    """Right answers; empty if there is none, or if they are not read."""


def answer_spans(windows: Sequence[Window], answers: Sequence[Answer]) -> list[tuple[int, int]] | None:
    """Return first and last token of the first answer in each window; where it is not whole, twice the null token.

    Args:
        windows: All windows of a context, in order.
        answers: Right answers, without spaces around them; empty if there is none.

    Returns:
        Pair for each window, or None if there is an answer that is whole in no window.
    """
    spans = [(window.null, window.null) for window in windows]
    for answer in answers[:1]:
        for number, window in enumerate(windows):
            in_context = np.flatnonzero(window.starts >= 0)
            touched = in_context[(window.starts[in_context] < answer.end) & (window.ends[in_context] > answer.start)]
            # The first and the last window reach to the ends of the context, also where the tokenizer drops characters.
            begins = len(touched) > 0 and (number == 0 or window.starts[in_context[0]] <= answer.start)
            if begins and (number == len(windows) - 1 or window.ends[in_context[-1]] >= answer.end):
                spans[number] = (int(touched[0]), int(touched[-1]))
        if all(span == (window.null, window.null) for span, window in zip(spans, windows, strict=True)):
            return None
    return spans


_OF_TOKENS = pa.list_(pa.list_(pa.int32()))
_OF_WINDOWS = pa.list_(pa.int32())
_SCHEMA = pa.schema(
    {
        "input_ids": _OF_TOKENS, "token_type_ids": _OF_TOKENS, "starts": _OF_TOKENS, "ends": _OF_TOKENS,
        "null": _OF_WINDOWS, "first": _OF_WINDOWS, "last": _OF_WINDOWS,
        "context": pa.string(), "answers": pa.list_(pa.string()), "answer_starts": pa.list_(pa.int32()),
    }
)  # fmt: skip


@dataclass(frozen=True)
class AnswerReader:
    """Encoder of rows with questions, contexts and answers.

    Args:
        params: Columns, and sizes of the windows.
        tokenizer: Fast tokenizer of the model.
    """

    params: AnswerParams
    tokenizer: "PreTrainedTokenizerBase"

    def encode(self, rows: pa.Table, with_targets: bool) -> Encoded:
        """Return the samples of some rows: lists of windows, and what is needed to score and show them."""
        examples, positions, refused = self._read(rows, with_targets)
        questions, contexts = [e.question for e in examples], [e.context for e in examples]
        windows = read_windows(self.tokenizer, questions, contexts, self.params.max_length, self.params.overlap)
        schema = _SCHEMA
        if "token_type_ids" not in self.tokenizer.model_input_names:
            schema = schema.remove(schema.get_field_index("token_type_ids"))
        valid_rows, samples, problems = [], [], [*refused]
        for i, example, parts in zip(positions, examples, windows, strict=True):
            spans = answer_spans(parts, example.answers)
            if spans is None:
                # It would be learned as "no answer" otherwise.
                reason = f"whole in no window, as two share {self.params.overlap} tokens (task.doc_stride); raise it"
                text = show_value(example.answers[0].text)
                problems.append((i, f"{self.params.answers} has the answer {text}, which is {reason}"))
                continue
            valid_rows.append(i)
            samples.append(_sample(example, parts, spans))
        table = pa.table({name: [sample[name] for sample in samples] for name in schema.names}, schema)
        # Tokens of all windows; and their number, so that the loss of a global batch is the mean over windows.
        lengths = np.array([sum(map(len, sample["input_ids"])) for sample in samples], np.int64)
        weights = np.array([len(sample["input_ids"]) for sample in samples], np.float64)
        return Encoded(table, np.array(valid_rows, np.int64), lengths, weights, tuple(sorted(problems)))

    def _read(self, rows: pa.Table, with_targets: bool) -> tuple[list[Example], list[int], tuple[tuple[int, str], ...]]:
        """Return the rows that can be read, their positions, and (position, reason) of each other row."""
        params = self.params
        questions, contexts = rows.column(params.question).to_pylist(), rows.column(params.context).to_pylist()
        cells = rows.column(params.answers).to_pylist() if with_targets else [None] * len(rows)
        # One call for all rows; one for each would take as long as the whole encoding.
        rooms = room_beside(self.tokenizer, [str(question or "").strip() for question in questions], params.max_length)

        def read(row: tuple[object, object, object, int]) -> Example:
            question_cell, context_cell, answers_cell, room = row
            question, context = _text(question_cell, params.question), _text(context_cell, params.context)
            answers = read_answers(answers_cell, params.answers) if with_targets else []
            places = tuple(check_place(answer, context, params.answers, params.context) for answer in answers)
            if room <= params.overlap:
                raise ValueError(
                    f"{params.question} leaves {max(room, 0)} of the {params.max_length} tokens of a window "
                    f"(task.max_length) for {params.context}, and {params.overlap} are shared with the next one "
                    "(task.doc_stride); raise the first or lower the second"
                )
            return Example(question.strip(), context, places)

        return read_each(zip(questions, contexts, cells, rooms, strict=True), read)


def _text(cell: object, column: str) -> str:
    text = as_text(cell, column)
    if not text.strip():
        raise ValueError(f"{column} is empty")
    return text


def _sample(example: Example, windows: Sequence[Window], spans: Sequence[tuple[int, int]]) -> dict[str, Any]:
    of_windows = {
        name: [getattr(window, name) for window in windows]
        for name in ("input_ids", "token_type_ids", "starts", "ends", "null")
    }
    return of_windows | {
        "first": [first for first, _ in spans],
        "last": [last for _, last in spans],
        "context": example.context,
        "answers": [answer.text for answer in example.answers],
        "answer_starts": [answer.start for answer in example.answers],
    }


def answer_notes(samples: pa.Table, max_tokens: int) -> tuple[str, ...]:
    """Return a note on answers that are too long to be predicted.

    Args:
        samples: Samples of `AnswerReader.encode`.
        max_tokens: Tokens of the longest answer that is predicted.
    """
    rows = samples.select(["null", "first", "last"]).to_pylist()
    spans = ([*zip(row["null"], row["first"], row["last"], strict=True)] for row in rows)
    sizes = [max(last - first + 1 if first != null else 0 for null, first, last in row) for row in spans]
    answers, longer = [size for size in sizes if size], [size for size in sizes if size > max_tokens]
    if not longer:
        return ()
    return (
        f"task.max_answer_length: {len(longer)} of the {len(answers)} answers looked at have more than {max_tokens} "
        f"tokens (up to {max(longer)}), and none so long is ever predicted; raise it",
    )
