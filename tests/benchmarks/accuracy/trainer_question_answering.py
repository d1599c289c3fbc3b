"""The peer of question-answering.yaml and question-answering-zh.yaml: transformers' Trainer by the method of run_qa.

Runs in every process of `torchrun --nproc_per_node 2`, from the repository's root; `run.py` starts it. The last line
of its output is one JSON object with SQuAD's F1 on dev (validation) and test.
"""

import unicodedata
from collections.abc import Callable, Iterator

import numpy as np
from datasets import Dataset
from peer import SCORED, Comparison, encoded_splits, parquet_splits, parse_options, print_scores, training_arguments
from torchmetrics.functional.text import squad
from transformers import (
    AutoModelForQuestionAnswering,
    AutoTokenizer,
    BatchEncoding,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    Trainer,
    set_seed,
)

MAX_LENGTH = 384
STRIDE = 128
N_BEST = 20
MAX_ANSWER_LENGTH = 30
FIRST_CHINESE = "\u2e80"
COMPARISONS = {
    # Windows of two processes: 16 of XQuAD, one a row; 12 of CMRC 2018, whose 8 rows a step have 1.54 each.
    "en": Comparison(
        "../shared/data/question-answering/xquad_en",
        "data/quickstart/model",
        {"num_train_epochs": 3, "per_device_train_batch_size": 8},
    ),
    "zh": Comparison(
        "../shared/data/question-answering/cmrc2018", "data/e5", {"max_steps": 60, "per_device_train_batch_size": 6}
    ),
}


def characters(text: str) -> str:
    """Return each Chinese character as a word, as CMRC 2018 does; punctuation is left out."""
    letters = (c for c in text if unicodedata.category(c)[0] != "P")
    return "".join(f" {c} " if c >= FIRST_CHINESE else c for c in letters)


def main() -> None:
    options = parse_options(language=COMPARISONS)
    compared = COMPARISONS[options.language]
    arguments = training_arguments(
        options,
        per_device_eval_batch_size=32,
        learning_rate=2e-4,
        **compared.numbers,
    )
    set_seed(options.seed)  # the new head is drawn before the Trainer sets its own seed
    tokenizer = AutoTokenizer.from_pretrained(compared.model)
    model = AutoModelForQuestionAnswering.from_pretrained(compared.model, dtype="float32")
    training = encoded_splits(
        compared.data, options, arguments, lambda rows: with_places(rows, tokenizer), names=["train"]
    )
    windows = encoded_splits(
        compared.data, options, arguments, lambda rows: with_contexts(rows, tokenizer), names=["validation", "test"]
    )
    splits = parquet_splits(compared.data, options)
    words = characters if options.language == "zh" else str
    trainer = Trainer(
        model,
        arguments,
        train_dataset=training["train"],
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
    )
    trainer.train()
    # With group_by_length the Trainer predicts in the order of lengths, and says nothing of it (transformers 5.23).
    trainer.args.train_sampling_strategy = "random"
    scores = {}
    for name, split in SCORED:
        predicted = trainer.predict(windows[split].remove_columns(["row", "offset_mapping"]))
        starts, ends = predicted.predictions
        scores[name] = score(splits[split], answers(splits[split], windows[split], starts, ends), words)
    print_scores(trainer, "f1", scores)


def tokenize(rows: dict[str, list], tokenizer: PreTrainedTokenizerBase) -> BatchEncoding:
    """Encode question and context as overlapping windows; the question is whole in each of them."""
    return tokenizer(
        [question.lstrip() for question in rows["question"]],
        rows["context"],
        truncation="only_second",
        max_length=MAX_LENGTH,
        stride=STRIDE,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )


def with_places(rows: dict[str, list], tokenizer: PreTrainedTokenizerBase) -> BatchEncoding:
    """Return windows for training: first and last token of the answer, or the first of all where a window lacks it."""
    windows = tokenize(rows, tokenizer)
    windows["start_positions"], windows["end_positions"] = [], []
    for i, row in enumerate(windows.pop("overflow_to_sample_mapping")):
        answer = rows["answers"][row]
        begin = answer["answer_start"][0]
        end = begin + len(answer["text"][0])
        context = [n for n, part in enumerate(windows.sequence_ids(i)) if part == 1]
        offsets = windows["offset_mapping"][i]
        first = last = 0
        if context and offsets[context[0]][0] <= begin and offsets[context[-1]][1] >= end:
            first = max(n for n in context if offsets[n][0] <= begin)
            last = min(n for n in context if offsets[n][1] >= end)
        windows["start_positions"].append(first)
        windows["end_positions"].append(last)
    windows.pop("offset_mapping")
    return windows


def with_contexts(rows: dict[str, list], tokenizer: PreTrainedTokenizerBase) -> BatchEncoding:
    """Return windows for scoring: the row's id, and the characters of each token of the context, none for others."""
    windows = tokenize(rows, tokenizer)
    windows["row"] = [rows["id"][row] for row in windows.pop("overflow_to_sample_mapping")]
    for i, offsets in enumerate(windows["offset_mapping"]):
        parts = windows.sequence_ids(i)
        windows["offset_mapping"][i] = [place if parts[n] == 1 else None for n, place in enumerate(offsets)]
    return windows


def answers(rows: Dataset, windows: Dataset, starts: np.ndarray, ends: np.ndarray) -> dict[str, str]:
    """Return the text of each row's best span over all its windows; starts and ends are logits (windows, tokens)."""
    best: dict[str, tuple[float, str]] = {}
    contexts = dict(zip(rows["id"], rows["context"], strict=True))
    for window, start, end in zip(windows, starts, ends, strict=True):
        row, context = window["row"], contexts[window["row"]]
        for value, begin, stop in spans(start, end, window["offset_mapping"]):
            if row not in best or value > best[row][0]:
                best[row] = (value, context[begin:stop])
    return {row: best[row][1] if row in best else "" for row in contexts}


def spans(start: np.ndarray, end: np.ndarray, offsets: list) -> Iterator[tuple[float, int, int]]:
    """Yield value, first and last character of the spans between the best tokens of either kind."""
    for first in np.argsort(start)[: -N_BEST - 1 : -1]:
        for last in np.argsort(end)[: -N_BEST - 1 : -1]:
            # Rows of logits are padded to the longest of the split.
            if max(first, last) >= len(offsets) or offsets[first] is None or offsets[last] is None:
                continue
            if first <= last < first + MAX_ANSWER_LENGTH:
                yield float(start[first] + end[last]), offsets[first][0], offsets[last][1]


def score(rows: Dataset, texts: dict[str, str], words: Callable[[str], str]) -> dict[str, float]:
    """Return SQuAD's exact match and F1, each row by its best gold answer.

    Args:
        rows: Rows with their gold answers.
        texts: Predicted answer of each row, by its id.
        words: Function that returns an answer as F1 counts it: words with spaces between.
    """
    predictions = [{"id": row, "prediction_text": words(texts[row])} for row in rows["id"]]
    targets = [
        {"id": row, "answers": {**gold, "text": [words(text) for text in gold["text"]]}}
        for row, gold in zip(rows["id"], rows["answers"], strict=True)
    ]
    percentages = squad(predictions, targets)
    return {name: float(percentages[name]) / 100 for name in ("exact_match", "f1")} | {"rows": len(predictions)}


if __name__ == "__main__":
    main()
