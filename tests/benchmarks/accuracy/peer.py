"""What the peers share: the Trainer of transformers with the numbers of our job files, scored on dev and test."""

import argparse
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, load_dataset
from transformers import EvalPrediction, Trainer, TrainingArguments

SPLITS = ("train", "validation", "test")
SCORED = (("dev", "validation"), ("test", "test"))


@dataclass(frozen=True)
class Comparison:
    """What the job files of one peer differ in."""

    data: str
    model: str
    numbers: dict[str, Any]
    """Training arguments: epochs or steps, and the learning rate if that differs too."""


def parse_options(**choices: Iterable[str]) -> argparse.Namespace:
    """Parse what run.py passes to a peer.

    Args:
        choices: Names and values of further options, which tell the job files of one peer apart.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--scratch", required=True, help="directory for caches; nothing in it is needed afterwards")
    for name, values in choices.items():
        parser.add_argument(f"--{name}", choices=list(values), required=True)
    return parser.parse_args()


def training_arguments(
    options: argparse.Namespace, kind: type[TrainingArguments] = TrainingArguments, **own: object
) -> TrainingArguments:
    """Return the numbers of all our job files, and a task's own; AdamW's betas and epsilon are both sides' defaults."""
    shared: dict[str, object] = {
        "output_dir": options.scratch,
        "seed": options.seed,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0.1,  # below 1: the share of all steps
        "weight_decay": 0.01,  # not on biases and norms
        "max_grad_norm": 1.0,
        # Grouped, the longest rows come first, and a run that ends within an epoch would see no others.
        "train_sampling_strategy": "random" if "max_steps" in own else "group_by_length",
        # With the default, Trainer (transformers 5.23, compute_loss) multiplies the loss by the number of processes for
        # a model that is told the global count and divides by it. BERT's heads and EncoderDecoderModel are told and
        # take their own mean all the same: losses and gradients would be doubled, and max_grad_norm would clip at half
        # of what it says.
        "average_tokens_across_devices": False,
        "use_cpu": True,
        "ddp_backend": "gloo",
        "dataloader_pin_memory": False,  # there is no GPU to pin for
        "save_strategy": "no",
        "eval_strategy": "no",
        "report_to": "none",
        "logging_steps": 10,
        "disable_tqdm": True,
    }
    return kind(**shared | own)  # type: ignore[arg-type]


def parquet_splits(folder: str, options: argparse.Namespace) -> DatasetDict:
    """Load the splits of a set of real data."""
    files = {split: f"{folder}/{split}.parquet" for split in SPLITS}
    return load_dataset("parquet", data_files=files, cache_dir=options.scratch)


def encoded_splits(
    folder: str,
    options: argparse.Namespace,
    arguments: TrainingArguments,
    encode: Callable[[dict[str, Any]], Mapping[str, Any]],
    *,
    names: Iterable[str] = SPLITS,
    batched: bool = True,
) -> dict[str, Dataset]:
    """Load splits whose columns are those that `encode` makes of a batch of rows, or of one row without `batched`."""
    with arguments.main_process_first():  # the other process reads the first one's cache
        splits = parquet_splits(folder, options)
        return {
            name: splits[name].map(encode, batched=batched, remove_columns=splits[name].column_names) for name in names
        }


def label_names(names: Sequence[str]) -> dict[str, dict]:
    """Return the entries of a model's config that name its labels."""
    return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}


def accuracy(scored: EvalPrediction) -> dict[str, float]:
    """Compare logits (rows, classes) with labels (rows,)."""
    right = np.argmax(scored.predictions, axis=-1) == scored.label_ids
    return {"accuracy": float(right.mean()), "rows": len(right)}


def train_and_score(trainer: Trainer, splits: Mapping[str, Dataset], metric: str) -> None:
    """Train, then print the metric on dev and test."""
    trainer.train()
    print_scores(trainer, metric, evaluate(trainer, splits, (metric,)))


def evaluate(trainer: Trainer, splits: Mapping[str, Dataset], metrics: Iterable[str]) -> dict[str, dict[str, float]]:
    """Return metrics and the number of rows on dev and test; `compute_metrics` counts the rows it saw."""
    scores = {}
    for name, split in SCORED:
        results = trainer.evaluate(splits[split], metric_key_prefix=name)
        scores[name] = {metric: results[f"{name}_{metric}"] for metric in (*metrics, "rows")}
        assert scores[name]["rows"] == len(splits[split]), "every row is scored once"
    return scores


def print_scores(trainer: Trainer, metric: str, scores: Mapping[str, Mapping[str, float]]) -> None:
    """Print one JSON object: a metric on dev and test for run.py, then all metrics and the losses that were logged."""
    if trainer.is_world_process_zero():
        chosen = {name: scores[name][metric] for name, _ in SCORED}
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        print(json.dumps(chosen | {"metrics": scores, "losses": losses}), flush=True)
