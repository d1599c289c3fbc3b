"""The peer of the sweep benchmark: Ray Tune around Ray Train as Ray's documentation has it. Runs on the client.

A Tune function builds a `TorchTrainer` per trial (docs.ray.io, "Hyperparameter Tuning with Ray Tune" of Ray Train V2);
the training function is the documentation's PyTorch recipe with Hugging Face's model, tokenizer and padding.
"""

import json
import os
import sys
import time
from pathlib import Path

import ray
from ray import train, tune
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer, prepare_data_loader, prepare_model
from ray.tune.integration.ray_train import TuneReportCallback


def train_function(config: dict) -> None:
    """Train one trial in one of its workers."""
    import pyarrow.parquet as pq
    import torch
    from torch.utils.data import DataLoader
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        get_linear_schedule_with_warmup,
    )

    torch.set_num_threads(1)
    torch.manual_seed(0)
    world, share = train.get_context().get_world_size(), config["batch_size"] // train.get_context().get_world_size()
    tokenizer = AutoTokenizer.from_pretrained(config["model"])
    loaders = []
    for split in ("train", "validation"):
        rows = pq.read_table(config[split]).to_pylist()
        encoded = [{**tokenizer(row["text"], truncation=True, max_length=64), "labels": row["label"]} for row in rows]
        loader = DataLoader(encoded, share, shuffle=split == "train", collate_fn=DataCollatorWithPadding(tokenizer))
        loaders.append(prepare_data_loader(loader))
    model = AutoModelForSequenceClassification.from_pretrained(config["model"], dtype=torch.float32, num_labels=2)
    model = prepare_model(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config["learning_rate"], weight_decay=0.01)
    schedule = get_linear_schedule_with_warmup(optimizer, config["steps"] // 10, config["steps"])
    model.train()
    for step, batch in enumerate(loaders[0], 1):
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step == config["steps"]:
            break
    model.eval()
    right = torch.zeros(2)
    with torch.no_grad():
        for batch in loaders[1]:
            predicted = model(**batch).logits.argmax(-1)
            right += torch.tensor([float((predicted == batch["labels"]).sum()), float(len(predicted))])
    if world > 1:
        torch.distributed.all_reduce(right)
    train.report({"accuracy": float(right[0] / right[1])})


def trial(config: dict) -> None:
    """Start a trainer of its own for a trial, as Tune's function."""
    TorchTrainer(
        train_function,
        train_loop_config=config,
        scaling_config=ScalingConfig(num_workers=config["workers"], resources_per_worker={"CPU": 1}),
        run_config=RunConfig(
            name=f"trial-{config['number']}", storage_path=config["storage"], callbacks=[TuneReportCallback()]
        ),
    ).fit()


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    os.environ["OMP_NUM_THREADS"] = "1"
    started = time.monotonic()
    ray.init(
        address="local", num_cpus=settings["concurrent"] * settings["workers"] + 1, include_dashboard=False,
        log_to_driver=False, logging_level="ERROR", runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}},
    )  # fmt: skip
    shared = {key: settings[key] for key in ("model", "train", "validation", "steps", "workers", "storage")}
    configs = [{**shared, "number": i, **params} for i, params in enumerate(settings["trials"])]
    tuner = tune.Tuner(
        # The trainers reserve the CPUs; the function that waits for one takes next to nothing.
        tune.with_resources(lambda config: trial(config["trial"]), {"cpu": 0.01}),
        param_space={"trial": tune.grid_search(configs)},
        tune_config=tune.TuneConfig(metric="accuracy", mode="max", max_concurrent_trials=settings["concurrent"]),
        run_config=tune.RunConfig(name="sweep", storage_path=settings["storage"], verbose=0),
    )
    results = tuner.fit()
    seconds = time.monotonic() - started
    assert not results.num_errors, results.errors
    print(json.dumps({"seconds": seconds, "trials": len(results)}))


if __name__ == "__main__":
    main()
