"""The peer of text-classification.yaml: transformers' Trainer on the same data, with the same numbers.

Runs in every process of `torchrun --nproc_per_node 2`, from the repository's root; `run.py` starts it. The last line
of its output is one JSON object with the accuracy on dev (validation) and test.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from datasets import DatasetDict, load_dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

DATA = Path("../shared/data/text-classification/sst2")
MODEL = "data/quickstart/model"
LABELS = ("negative", "positive")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--scratch", required=True, help="directory for caches; nothing in it is needed afterwards")
    options = parser.parse_args()

    arguments = training_arguments(options.seed, options.scratch)
    set_seed(options.seed)  # the new head is drawn before the Trainer sets its own seed
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForSequenceClassification.from_pretrained(
        MODEL,
        dtype="float32",
        id2label=dict(enumerate(LABELS)),
        label2id={name: i for i, name in enumerate(LABELS)},
    )
    with arguments.main_process_first():  # the other process reads the first one's cache
        splits = encoded_splits(tokenizer, options.scratch)
    trainer = Trainer(
        model,
        arguments,
        train_dataset=splits["train"],
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=accuracy,
    )
    trainer.train()
    scores = {}
    for name, split in (("dev", "validation"), ("test", "test")):
        found = trainer.evaluate(splits[split], metric_key_prefix=name)
        assert found[f"{name}_rows"] == len(splits[split]), "every row is scored once"
        scores[name] = found[f"{name}_accuracy"]
    if trainer.is_world_process_zero():
        print(json.dumps(scores), flush=True)


def training_arguments(seed: int, scratch: str) -> TrainingArguments:
    """The numbers of text-classification.yaml; AdamW's betas and epsilon are the defaults of both sides."""
    return TrainingArguments(
        output_dir=scratch,
        seed=seed,
        num_train_epochs=1,
        per_device_train_batch_size=16,  # 32 over two processes
        per_device_eval_batch_size=32,
        learning_rate=5e-5,
        lr_scheduler_type="linear",
        warmup_steps=0.1,  # below 1: the share of all steps
        weight_decay=0.01,  # not on biases and norms
        max_grad_norm=1.0,
        train_sampling_strategy="group_by_length",
        # With the default, Trainer (transformers 5.23, compute_loss) multiplies the loss by the number of processes for
        # a model that is told the global count and divides by it. BERT's classifier is told and takes its own mean all
        # the same: losses and gradients would be doubled, and max_grad_norm would clip at half of what it says.
        average_tokens_across_devices=False,
        use_cpu=True,
        ddp_backend="gloo",
        dataloader_pin_memory=False,  # there is no GPU to pin for
        save_strategy="no",
        eval_strategy="no",
        report_to="none",
        logging_steps=10,
        disable_tqdm=True,
    )


def encoded_splits(tokenizer: PreTrainedTokenizerBase, scratch: str) -> DatasetDict:
    """Token ids of each split, not yet padded."""
    files = {split: str(DATA / f"{split}.parquet") for split in ("train", "validation", "test")}
    splits = load_dataset("parquet", data_files=files, cache_dir=scratch)
    return splits.map(
        lambda rows: tokenizer(rows["text"], truncation=True, max_length=128), batched=True, remove_columns=["text"]
    )


def accuracy(scored: EvalPrediction) -> dict[str, float]:
    """Of logits (rows, classes) against labels (rows,)."""
    right = np.argmax(scored.predictions, axis=-1) == scored.label_ids
    return {"accuracy": float(right.mean()), "rows": len(right)}


if __name__ == "__main__":
    main()
