"""The peer: transformers' Trainer on the same model and texts with the same numbers, as its documentation recommends.

Batches are grouped by length, as it knows no packing. Its last line is one JSON object: real tokens per second from the
end of the warm-up to the last step. `parts.py` starts it.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from workload import LARGE, TEXTS


class Counted(Trainer):
    """Keeps the order of its first epoch, which tells the real tokens of each batch at no cost."""

    order: list[int]

    def _get_train_sampler(self, *arguments: Any) -> Any:
        self.order = list(super()._get_train_sampler(*arguments))
        return self.order


class Marks(TrainerCallback):
    """The moment each step ended, with the device's work done."""

    def __init__(self, warm: int) -> None:
        self.warm, self.at = warm, {}

    def on_step_end(self, arguments: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step in (self.warm, state.max_steps):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.at[state.global_step] = time.perf_counter()


def main() -> None:
    """Train, and print the speed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--warm", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--gpu", action="store_true")
    options = parser.parse_args()
    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(options.folder / LARGE)
    model: Any = AutoModelForCausalLM.from_pretrained(options.folder / LARGE, dtype=torch.float32)
    if options.lora:
        from peft import LoraConfig, get_peft_model

        # The launcher's defaults: every linear layer but the head.
        model = get_peft_model(
            model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        )
    texts = pq.read_table(options.folder / TEXTS, columns=["text"]).column("text").to_pylist()
    rows = [{"input_ids": ids} for ids in tokenizer(texts)["input_ids"]]
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            max_steps=options.steps,
            # Padded, the longest texts of a whole batch would not fit on a GPU of 80 GB.
            per_device_train_batch_size=options.batch // 2 if options.gpu else options.batch,
            gradient_accumulation_steps=2 if options.gpu else 1,
            learning_rate=2e-4,
            lr_scheduler_type="linear",
            warmup_steps=0.1,
            weight_decay=0.01,
            max_grad_norm=1.0,
            bf16=options.gpu,
            use_cpu=not options.gpu,
            seed=0,
            save_strategy="no",
            report_to="none",
            logging_steps=options.warm,
            disable_tqdm=True,
            train_sampling_strategy="group_by_length",
            dataloader_num_workers=4 if options.gpu else 0,
            dataloader_pin_memory=options.gpu,
        )
        marks = Marks(options.warm)
        trainer = Counted(
            model,
            arguments,
            train_dataset=rows,  # type: ignore[arg-type]  # a list has a length and items
            data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
            callbacks=[marks],
        )
        trainer.train()
    measured = trainer.order[options.warm * options.batch : options.steps * options.batch]
    tokens = sum(len(rows[row]["input_ids"]) for row in measured)
    print(json.dumps({"tokens_per_s": tokens / (marks.at[options.steps] - marks.at[options.warm])}), flush=True)


if __name__ == "__main__":
    main()
