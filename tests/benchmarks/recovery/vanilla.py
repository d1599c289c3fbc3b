"""The peer: Ray Train with DeepSpeed as their documentations write it, checkpoints every N steps or every epoch.

https://docs.ray.io/en/latest/train/deepspeed.html and .../user-guides/fault-tolerance.html: `FailureConfig` restarts
the workers, which load the newest reported checkpoint. A checkpoint knows its epoch and step; the loader skips what the
epoch's steps before it have seen. Appends one line per optimizer step to `steps.jsonl`. Runs on the head.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import ray
import ray.train
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

LABELS = {"negative": 0, "positive": 1, 0: 0, 1: 1}


def train(config: dict) -> None:
    import deepspeed
    import pyarrow.parquet as pq
    import torch
    from torch.utils.data import DataLoader, DistributedSampler
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    rank, world = ray.train.get_context().get_world_rank(), ray.train.get_context().get_world_size()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))
    torch.manual_seed(0)
    rows = list(enumerate(pq.read_table(config["data"]).slice(0, config["rows"]).to_pylist()))
    tokenizer = AutoTokenizer.from_pretrained(config["model"])

    def collate(batch: list) -> tuple:
        texts = [row["text"] for _, row in batch]
        encoded = tokenizer(texts, padding=True, truncation=True, max_length=128, return_tensors="pt")
        return [number for number, _ in batch], encoded | {
            "labels": torch.tensor([LABELS[row["label"]] for _, row in batch])
        }

    model = AutoModelForSequenceClassification.from_pretrained(config["model"], num_labels=2)
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=model.parameters(),
        config={
            "train_micro_batch_size_per_gpu": config["batch"] // world,
            "optimizer": {"type": "AdamW", "params": {"lr": 5e-5, "torch_adam": True}},
            "zero_optimization": {"stage": config["zero"]},
        },
    )
    epoch, skip = 0, 0
    checkpoint = ray.train.get_checkpoint()
    if checkpoint:
        with checkpoint.as_directory() as folder:
            engine.load_checkpoint(folder, tag="state")
            position = json.loads((Path(folder) / "position.json").read_text())
            epoch, skip = position["epoch"], position["step"]
    sampler = DistributedSampler(rows, num_replicas=world, rank=rank, shuffle=True, seed=0)
    loader = DataLoader(rows, batch_size=config["batch"] // world, sampler=sampler, collate_fn=collate)
    while epoch < config["epochs"]:
        sampler.set_epoch(epoch)
        engine.train()
        for step, (numbers, batch) in enumerate(loader):
            if step < skip:
                continue
            loss = engine(**batch).loss
            engine.backward(loss)
            engine.step()
            with open(config["log"], "a") as log:
                line = {
                    "rank": rank,
                    "epoch": epoch,
                    "step": step + 1,
                    "rows": numbers,
                    "at": time.time(),
                    "pid": os.getpid(),
                }
                log.write(json.dumps(line) + "\n")
            if config["every"] and (step + 1) % config["every"] == 0:
                save(engine, epoch, step + 1, rank)
        epoch, skip = epoch + 1, 0
        save(engine, epoch, 0, rank)


def save(engine: object, epoch: int, step: int, rank: int) -> None:
    """Save on all ranks, each into a directory of its own; Ray Train merges them in the storage."""
    with tempfile.TemporaryDirectory() as folder:
        engine.save_checkpoint(folder, tag="state")
        if rank == 0:
            (Path(folder) / "position.json").write_text(json.dumps({"epoch": epoch, "step": step}))
        ray.train.report({"epoch": epoch, "step": step}, checkpoint=Checkpoint.from_directory(folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=json.loads)
    config = parser.parse_args().config
    ray.init(address="local", include_dashboard=False, log_to_driver=False, num_cpus=4)
    TorchTrainer(
        train,
        train_loop_config=config,
        scaling_config=ScalingConfig(num_workers=2, resources_per_worker={"CPU": 0.5}),
        run_config=RunConfig(
            name="vanilla",
            storage_path=config["storage"],
            failure_config=FailureConfig(max_failures=3),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    ).fit()


if __name__ == "__main__":
    main()
