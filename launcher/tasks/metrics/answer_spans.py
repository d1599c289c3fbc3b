"""Search for the best answer of each question among the spans of its windows. Runs in train and predict workers.

The method is that of transformers' `run_qa.py`: the `n_best` first and last tokens of each window are combined, the
best span of all windows wins, and for data with unanswerable questions the window that believes least in "no answer"
speaks for it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch.nn.functional import cross_entropy

from launcher.rundir.records import SpanMark
from launcher.tasks.metrics.squad import best_scores
from launcher.tasks.padding import pad_lists
from launcher.tasks.results import RowResult
from launcher.tasks.samples import Outputs

_NO_ANSWER = "no answer"


@dataclass(frozen=True)
class Search:
    """Limits of the search.

    Args:
        n_best: First and last tokens that are combined.
        max_tokens: Longest answer.
        null_threshold: Logits by which no answer must be better than the best one; None always answers.
    """

    n_best: int
    max_tokens: int
    null_threshold: float | None


@dataclass(frozen=True)
class Prediction:
    """Predicted answer of a row.

    Args:
        text: Answer as it stands in the context; "" for none.
        start: First character in the context; None for no answer.
        score: Product of the probabilities of first and last token in their window.
    """

    text: str
    start: int | None
    score: float


def flat_windows(samples: pa.Table, names: tuple[str, ...]) -> pa.Table:
    """Return the windows of B rows as one table of S rows, with those of the columns that there are."""
    present = [name for name in names if name in samples.column_names]
    return pa.table({name: pc.list_flatten(samples.column(name)) for name in present})


def span_losses(outputs: Outputs, labels_S2: torch.Tensor, attention_mask_ST: torch.Tensor) -> torch.Tensor:
    """Return the mean cross entropy of first and last token of each window, float32 (S,).

    Args:
        outputs: Logits `start_logits` and `end_logits` (S, T).
        labels_S2: First and last token of the answer in each window, int64.
        attention_mask_ST: 1 for tokens and 0 for padding, int64.
    """
    # Padding is no place to point to. In `run_qa` it takes part in the softmax, as all windows there are padded to
    # `max_length`; here the loss would depend on the other rows of the micro-batch.
    is_padding_ST = attention_mask_ST == 0
    first_S, last_S = (
        cross_entropy(outputs[name].float().masked_fill(is_padding_ST, -torch.inf), labels_S, reduction="none")
        for name, labels_S in zip(("start_logits", "end_logits"), labels_S2.unbind(1), strict=True)
    )
    return (first_S + last_S) / 2


def find_answers(outputs: Outputs, samples: pa.Table, search: Search) -> list[Prediction]:
    """Return the best answer of each of B rows.

    Args:
        outputs: Logits `start_logits` and `end_logits` of all windows of the rows, in order, (S, T) or longer.
        samples: Rows with `context`, and lists of windows: `starts`, `ends` (characters of tokens), `null`.
        search: Limits of the search.
    """
    windows = flat_windows(samples, ("starts", "ends", "null"))
    starts_ST, ends_ST = pad_lists(windows.column("starts"), -1), pad_lists(windows.column("ends"), -1)
    lengths_S = pc.list_value_length(windows.column("starts")).to_numpy().copy()
    device = outputs["start_logits"].device
    is_real_ST = torch.arange(starts_ST.shape[1], device=device) < torch.from_numpy(lengths_S).to(device)[:, None]
    # float32: scores are compared across windows, and bf16 has ties.
    # Of some rows of a micro-batch, the longest window may be shorter than that of the whole.
    first_ST, last_ST = (
        outputs[name][:, : is_real_ST.shape[1]].float().masked_fill(~is_real_ST, -torch.inf)
        for name in ("start_logits", "end_logits")
    )
    best_S, token_S2 = best_spans(first_ST, last_ST, torch.from_numpy(starts_ST >= 0).to(device), search)
    null_S = torch.from_numpy(windows.column("null").to_numpy().copy()).to(device).long()
    null_logits_S = _sum_at(first_ST, last_ST, null_S, null_S)
    norms_S = first_ST.logsumexp(-1) + last_ST.logsumexp(-1)
    # One copy to the host for all of them.
    columns = torch.stack([best_S, null_logits_S, norms_S]).double().cpu().numpy()
    tokens = token_S2.cpu().numpy()
    predictions = []
    begin = 0
    counts = pc.list_value_length(samples.column("null")).to_pylist()
    for context, count in zip(samples.column("context").to_pylist(), counts, strict=True):
        best, null, norms = columns[:, begin : begin + count]
        window, null_window = int(best.argmax()), int(null.argmin())
        none = Prediction("", None, float(np.exp(null[null_window] - norms[null_window])))
        # With an infinite score, a window has no span within the limits, as `run_qa` may have it too.
        is_answered = np.isfinite(best[window]) and (
            search.null_threshold is None or null[null_window] - best[window] <= search.null_threshold
        )
        first, last = tokens[begin + window]
        start, end = int(starts_ST[begin + window, first]), int(ends_ST[begin + window, last])
        # Tokens of byte-level BPE and SentencePiece may begin with the space before a word.
        text = context[start:end] if is_answered else ""
        start += len(text) - len(text.lstrip())
        score = float(np.exp(best[window] - norms[window]))
        predictions.append(Prediction(text.strip(), start, score) if text.strip() else none)
        begin += count
    return predictions


def best_spans(
    first_ST: torch.Tensor, last_ST: torch.Tensor, is_context_ST: torch.Tensor, search: Search
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the best span of each window among the combinations of its best first and last tokens.

    Args:
        first_ST: Logits of each token as the first of the answer, float32.
        last_ST: Logits as its last.
        is_context_ST: True for the tokens that an answer may have.
        search: Limits of the search.

    Returns:
        Sum of both logits (S,), -inf where no combination is a span; first and last token (S, 2).
    """
    n = min(search.n_best, first_ST.shape[1])
    first_SN, firsts_SN = first_ST.masked_fill(~is_context_ST, -torch.inf).topk(n, -1)
    last_SN, lasts_SN = last_ST.masked_fill(~is_context_ST, -torch.inf).topk(n, -1)
    tokens_SNN = lasts_SN[:, None, :] - firsts_SN[:, :, None] + 1
    is_span_SNN = (tokens_SNN >= 1) & (tokens_SNN <= search.max_tokens)
    sums_SNN = (first_SN[:, :, None] + last_SN[:, None, :]).masked_fill(~is_span_SNN, -torch.inf)
    best_S, index_S = sums_SNN.flatten(1).max(-1)
    first_S1 = firsts_SN.gather(1, (index_S // n)[:, None])
    return best_S, torch.cat([first_S1, lasts_SN.gather(1, (index_S % n)[:, None])], 1)


def _sum_at(first_ST: torch.Tensor, last_ST: torch.Tensor, first_S: torch.Tensor, last_S: torch.Tensor) -> torch.Tensor:
    """Return the sum of the logits of one span of each window, (S,)."""
    return (first_ST.gather(1, first_S[:, None]) + last_ST.gather(1, last_S[:, None])).squeeze(1)


def to_result(prediction: Prediction, answers: Sequence[str], answer_starts: Sequence[int]) -> RowResult:
    """Return truth and prediction of a row in words, with marks in its context.

    Args:
        prediction: Predicted answer.
        answers: All right answers.
        answer_starts: First character of each; a missed answer is marked where the first one stands.
    """
    is_right = best_scores(prediction.text, answers)[1] == 1
    marks = []
    if prediction.start is not None:
        end = prediction.start + len(prediction.text)
        marks.append(SpanMark(start=prediction.start, end=end, label="answer", kind="found" if is_right else "wrong"))
    if answers and not is_right:
        end = answer_starts[0] + len(answers[0])
        marks.append(SpanMark(start=answer_starts[0], end=end, label="answer", kind="missed"))
    target = "; ".join(dict.fromkeys(answers)) or _NO_ANSWER
    return RowResult(target, prediction.text or _NO_ANSWER, tuple(marks))
