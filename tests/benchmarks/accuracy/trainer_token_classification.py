"""The peer of token-classification.yaml: transformers' Trainer with its collator for tokens, and seqeval.

Runs in every process of `torchrun --nproc_per_node 2`, from the repository's root; `run.py` starts it. The last line
of its output is one JSON object with the entity-level F1 on dev (validation) and test.
"""

import json

import numpy as np
import pyarrow.parquet as pq
from peer import encoded_splits, label_names, parse_options, train_and_score, training_arguments
from seqeval.metrics import f1_score
from transformers import (
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    EvalPrediction,
    PreTrainedTokenizerBase,
    Trainer,
    set_seed,
)

DATA = "../shared/data/token-classification/wnut17"
MODEL = "data/quickstart/model"
IGNORED = -100


def main() -> None:
    options = parse_options()
    arguments = training_arguments(
        options,
        num_train_epochs=3,
        per_device_train_batch_size=16,  # 32 over two processes
        per_device_eval_batch_size=32,
        learning_rate=2e-4,
    )
    set_seed(options.seed)  # the new head is drawn before the Trainer sets its own seed
    names = tag_names()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForTokenClassification.from_pretrained(MODEL, dtype="float32", **label_names(names))
    splits = encoded_splits(DATA, options, arguments, lambda rows: encode(rows, tokenizer))
    trainer = Trainer(
        model,
        arguments,
        train_dataset=splits["train"],
        processing_class=tokenizer,
        data_collator=DataCollatorForTokenClassification(tokenizer),
        compute_metrics=lambda scored: entities(scored, names),
    )
    train_and_score(trainer, splits, "f1")


def tag_names() -> list[str]:
    """Read the names of the tags from the files' own schema."""
    features = json.loads(pq.read_schema(f"{DATA}/train.parquet").metadata[b"huggingface"])["info"]["features"]
    return features["ner_tags"]["feature"]["names"]


def encode(rows: dict[str, list], tokenizer: PreTrainedTokenizerBase) -> dict[str, list]:
    """Return token ids, and each word's tag at its first token (the documentation's recipe)."""
    encoded = tokenizer(rows["tokens"], is_split_into_words=True, truncation=True, max_length=128)
    encoded["labels"] = []
    for i, tags in enumerate(rows["ner_tags"]):
        words = encoded.word_ids(i)
        first = [word is not None and (n == 0 or words[n - 1] != word) for n, word in enumerate(words)]
        encoded["labels"].append([tags[w] if is_first else IGNORED for w, is_first in zip(words, first, strict=True)])
    return encoded


def entities(scored: EvalPrediction, names: list[str]) -> dict[str, float]:
    """Compare logits (rows, tokens, tags) with labels (rows, tokens); words that were cut off are in neither."""
    best = np.argmax(scored.predictions, axis=-1)
    counted = scored.label_ids != IGNORED
    truth = [[names[t] for t in row[mask]] for row, mask in zip(scored.label_ids, counted, strict=True)]
    predicted = [[names[t] for t in row[mask]] for row, mask in zip(best, counted, strict=True)]
    return {"f1": float(f1_score(truth, predicted)), "rows": len(truth)}


if __name__ == "__main__":
    main()
