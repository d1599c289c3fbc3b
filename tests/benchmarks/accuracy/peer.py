"""What the peers share: the Trainer of transformers with the numbers of our job files, scored on dev and test."""

import argparse
import json
from collections.abc import Mapping, Sequence

import numpy as np
from datasets import Dataset, DatasetDict, load_dataset
from transformers import EvalPrediction, Trainer, TrainingArguments

SPLITS = ("train", "validation", "test")
SCORED = (("dev", "validation"), ("test", "test"))


def options() -> argparse.Namespace:
    """What run.py says to a peer."""
    return option_parser().parse_args()


def option_parser() -> argparse.ArgumentParser:
    """What run.py says to every peer; those of several job files add what tells them apart."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--scratch", required=True, help="directory for caches; nothing in it is needed afterwards")
    return parser


def training_arguments(
    seed: int, scratch: str, kind: type[TrainingArguments] = TrainingArguments, **own: object
) -> TrainingArguments:
    """The numbers all our job files hold, and a task's own; AdamW's betas and epsilon are both sides' defaults."""
    shared: dict[str, object] = {
        "output_dir": scratch,
        "seed": seed,
        "warmup_steps": 0.1,  # below 1: the share of all steps
        "weight_decay": 0.01,  # not on biases and norms
        "max_grad_norm": 1.0,
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


def parquet_splits(folder: str, scratch: str) -> DatasetDict:
    """The splits of a set of real data."""
    files = {split: f"{folder}/{split}.parquet" for split in SPLITS}
    return load_dataset("parquet", data_files=files, cache_dir=scratch)


def label_names(names: Sequence[str]) -> dict[str, dict]:
    """The entries of a model's config that name its labels."""
    return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}


def accuracy(scored: EvalPrediction) -> dict[str, float]:
    """Of logits (rows, classes) against labels (rows,)."""
    right = np.argmax(scored.predictions, axis=-1) == scored.label_ids
    return {"accuracy": float(right.mean()), "rows": len(right)}


def train_and_score(trainer: Trainer, splits: Mapping[str, Dataset], metric: str) -> None:
    """Train, then print the metric on dev and test as one JSON object. `compute_metrics` counts the rows it saw."""
    trainer.train()
    scores = {}
    for name, split in SCORED:
        found = trainer.evaluate(splits[split], metric_key_prefix=name)
        assert found[f"{name}_rows"] == len(splits[split]), "every row is scored once"
        scores[name] = found[f"{name}_{metric}"]
    if trainer.is_world_process_zero():
        print(json.dumps(scores), flush=True)


def print_scores(trainer: Trainer, metric: str, scores: Mapping[str, Mapping[str, float]]) -> None:
    """Print one JSON object: a metric on dev and test for run.py, then all metrics and the losses that were logged."""
    if trainer.is_world_process_zero():
        chosen = {name: scores[name][metric] for name, _ in SCORED}
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        print(json.dumps(chosen | {"metrics": scores, "losses": losses}), flush=True)
