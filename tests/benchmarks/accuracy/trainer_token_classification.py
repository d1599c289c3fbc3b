"""The peer of token-classification.yaml: transformers' Trainer with its collator for tokens, and seqeval.

Runs in every process of `torchrun --nproc_per_node 2`, from the repository's root; `run.py` starts it. The last line
of its output is one JSON object with the entity-level F1 on dev (validation) and test.
"""

import json

import numpy as np
import pyarrow.parquet as pq
from peer import label_names, options, parquet_splits, train_and_score, training_arguments
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
    said = options()
    arguments = training_arguments(
        said.seed,
        said.scratch,
        num_train_epochs=3,
        per_device_train_batch_size=16,  # 32 over two processes
        per_device_eval_batch_size=32,
        learning_rate=2e-4,
        lr_scheduler_type="linear",
        train_sampling_strategy="group_by_length",
        average_tokens_across_devices=False,  # see trainer_text_classification.py: BERT takes its own mean
    )
    set_seed(said.seed)  # the new head is drawn before the Trainer sets its own seed
    names = tag_names()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForTokenClassification.from_pretrained(
        MODEL,
        dtype="float32",
        **label_names(names),
    )
    with arguments.main_process_first():  # the other process reads the first one's cache
        splits = parquet_splits(DATA, said.scratch)
        splits = splits.map(
            lambda rows: encode(rows, tokenizer), batched=True, remove_columns=splits["train"].column_names
        )
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
    """Names of the tags, from the files' own schema."""
    features = json.loads(pq.read_schema(f"{DATA}/train.parquet").metadata[b"huggingface"])["info"]["features"]
    return features["ner_tags"]["feature"]["names"]


def encode(rows: dict[str, list], tokenizer: PreTrainedTokenizerBase) -> dict[str, list]:
    """Token ids, and each word's tag at its first token (the documentation's recipe for token classification)."""
    found = tokenizer(rows["tokens"], is_split_into_words=True, truncation=True, max_length=128)
    found["labels"] = []
    for i, tags in enumerate(rows["ner_tags"]):
        words = found.word_ids(i)
        first = [word is not None and (n == 0 or words[n - 1] != word) for n, word in enumerate(words)]
        found["labels"].append([tags[w] if here else IGNORED for w, here in zip(words, first, strict=True)])
    return found


def entities(scored: EvalPrediction, names: list[str]) -> dict[str, float]:
    """Of logits (rows, tokens, tags) against labels (rows, tokens); words that were cut off are in neither."""
    said = np.argmax(scored.predictions, axis=-1)
    counted = scored.label_ids != IGNORED
    truth = [[names[t] for t in row[here]] for row, here in zip(scored.label_ids, counted, strict=True)]
    found = [[names[t] for t in row[here]] for row, here in zip(said, counted, strict=True)]
    return {"f1": float(f1_score(truth, found)), "rows": len(truth)}


if __name__ == "__main__":
    main()
