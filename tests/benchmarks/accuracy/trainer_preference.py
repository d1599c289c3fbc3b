"""The peer of preference-dpo.yaml and preference-kto.yaml: TRL's DPOTrainer and KTOTrainer with LoRA.

Runs in one process of `torchrun --nproc_per_node 1`, from the repository's root: KTO's KL term is a mean over the rows
of one process. `run.py` starts it. The last line of its output is one JSON object with the loss on dev (validation)
and test, and the loss, accuracy and margin of the rewards at each step.
"""

import json

from datasets import Dataset
from peer import SCORED, parquet_splits, parse_options, training_arguments
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

DATA = "data/preference"
MODEL = "data/smollm2"
KINDS = {"dpo": (DPOConfig, DPOTrainer), "kto": (KTOConfig, KTOTrainer)}
METRICS = ("loss", "rewards/accuracies", "rewards/chosen", "rewards/rejected", "rewards/margins", "kl")


def main() -> None:
    options = parse_options(loss=KINDS)
    config, kind = KINDS[options.loss]
    arguments = training_arguments(
        options,
        config,
        max_steps=10,
        per_device_train_batch_size=8,
        per_device_eval_batch_size=32,  # a split is one batch: TRL's metrics are means over batches
        learning_rate=5e-4,
        lr_scheduler_type="cosine",
        train_sampling_strategy=config.train_sampling_strategy,  # TRL's own: KTOTrainer refuses another
        beta=0.1,
        max_length=128,
        logging_steps=1,
        # TRL's defaults, which suit GPUs.
        bf16=False,
        gradient_checkpointing=False,
    )
    splits = parquet_splits(f"{DATA}/{options.loss}", options)
    trainer: Trainer = kind(
        AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32"),
        args=arguments,
        # KTOTrainer reads rows as they come, so the seed's order is made here.
        train_dataset=splits["train"].shuffle(seed=options.seed),
        eval_dataset={split: splits[split] for _, split in SCORED},
        processing_class=AutoTokenizer.from_pretrained(MODEL),
        peft_config=LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear"),
    )
    trainer.train()
    scores = {name: score(trainer, trainer.eval_dataset[split]) for name, split in SCORED}
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    curves = {key: [entry[key] for entry in steps if key in entry] for key in METRICS}
    losses = {name: scores[name]["loss"] for name, _ in SCORED}
    print(json.dumps(losses | {"metrics": scores, "curves": curves}), flush=True)


def score(trainer: Trainer, rows: Dataset) -> dict[str, float]:
    """Return the metrics of a split, which is one batch."""
    results = trainer.evaluate(rows)  # TRL's own metrics are `eval_...` whatever the prefix
    return {key: results[f"eval_{key}"] for key in METRICS if f"eval_{key}" in results} | {"rows": len(rows)}


if __name__ == "__main__":
    main()
