"""The peer: transformers' Trainer on the same data with the same numbers, as its documentation recommends.

Runs in every process of `torchrun --nproc_per_node 2`; `run.py` starts it. The last line of its output is one JSON
object: samples per second behind the first steps, and the seconds from the start of the process to the end of step 1.
"""

import argparse
import json
import os
import time

import psutil
from datasets import load_dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)


class Marks(TrainerCallback):
    """Moments at which steps ended, in seconds since the epoch."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def on_step_end(self, *_: object, **__: object) -> None:
        self.at.append(time.time())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--scratch", required=True)
    parser.add_argument("--sampling", choices=["random", "group_by_length"], default="random")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--warm", type=int, required=True)
    options = parser.parse_args()
    arguments = TrainingArguments(
        output_dir=options.scratch, max_steps=options.steps, per_device_train_batch_size=16, learning_rate=5e-5,
        lr_scheduler_type="linear", warmup_steps=0.1, weight_decay=0.01, max_grad_norm=1.0, use_cpu=True, seed=0,
        ddp_backend="gloo", dataloader_pin_memory=False, save_strategy="no", eval_strategy="no", report_to="none",
        logging_steps=16, disable_tqdm=True, train_sampling_strategy=options.sampling,
        average_tokens_across_devices=False,
    )  # fmt: skip
    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForSequenceClassification.from_pretrained(options.model, num_labels=2, dtype="float32")
    with arguments.main_process_first():  # the other process reads the first one's cache
        rows = load_dataset("parquet", data_files={"train": options.data}, cache_dir=options.scratch)["train"].map(
            lambda rows: tokenizer(rows["text"], truncation=True, max_length=128), batched=True, remove_columns=["text"]
        )
    marks = Marks()
    trainer = Trainer(
        model, arguments, train_dataset=rows, processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer), callbacks=[marks],
    )  # fmt: skip
    trainer.train()
    if trainer.is_world_process_zero():
        launched = psutil.Process(os.getppid()).create_time()  # torchrun, the command a user types
        answer = {"first_step_s": marks.at[0] - launched}
        if options.steps > options.warm:
            batch = 16 * int(os.environ["WORLD_SIZE"])
            answer["samples_per_s"] = (
                batch * (options.steps - options.warm) / (marks.at[-1] - marks.at[options.warm - 1])
            )
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
