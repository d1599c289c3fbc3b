"""The peer of preference-dpo.yaml and preference-kto.yaml: TRL's DPOTrainer and KTOTrainer with LoRA.

Runs in one process of `torchrun --nproc_per_node 1`, from the repository's root: KTO's KL term is a mean over the rows
of one process. `run.py` starts it. The last line of its output is one JSON object with the loss on dev (validation)
and test, and the loss, accuracy and margin of the rewards at each step.
"""

import json

from datasets import Dataset
from peer import SCORED, option_parser, parquet_splits, training_arguments
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

DATA = "data/preference"
MODEL = "data/smollm2"
KINDS = {"dpo": (DPOConfig, DPOTrainer), "kto": (KTOConfig, KTOTrainer)}
KEPT = ("loss", "rewards/accuracies", "rewards/chosen", "rewards/rejected", "rewards/margins", "kl")


def main() -> None:
    parser = option_parser()
    parser.add_argument("--loss", choices=KINDS, required=True)
    said = parser.parse_args()
    config, kind = KINDS[said.loss]
    arguments = training_arguments(
        said.seed,
        said.scratch,
        config,
        max_steps=10,
        per_device_train_batch_size=8,
        per_device_eval_batch_size=32,  # a split is one batch: TRL's metrics are means over batches
        learning_rate=5e-4,
        lr_scheduler_type="cosine",
        beta=0.1,
        max_length=128,
        logging_steps=1,
        # TRL's defaults, which suit GPUs.
        bf16=False,
        gradient_checkpointing=False,
    )
    splits = parquet_splits(f"{DATA}/{said.loss}", said.scratch)
    trainer: Trainer = kind(
        AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32"),
        args=arguments,
        # KTOTrainer reads rows as they come, so the seed's order is made here.
        train_dataset=splits["train"].shuffle(seed=said.seed),
        eval_dataset={split: splits[split] for _, split in SCORED},
        processing_class=AutoTokenizer.from_pretrained(MODEL),
        peft_config=LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear"),
    )
    trainer.train()
    scores = {name: score(trainer, trainer.eval_dataset[split]) for name, split in SCORED}
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    curves = {key: [entry[key] for entry in steps if key in entry] for key in KEPT}
    losses = {name: scores[name]["loss"] for name, _ in SCORED}
    print(json.dumps(losses | {"metrics": scores, "curves": curves}), flush=True)


def score(trainer: Trainer, rows: Dataset) -> dict[str, float]:
    """Metrics of a split, which is one batch."""
    found = trainer.evaluate(rows)  # TRL's own metrics are `eval_...` whatever the prefix
    return {key: found[f"eval_{key}"] for key in KEPT if f"eval_{key}" in found} | {"rows": len(rows)}


if __name__ == "__main__":
    main()
