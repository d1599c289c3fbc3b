"""The peer of text-classification.yaml: transformers' Trainer on the same data, with the same numbers.

Runs in every process of `torchrun --nproc_per_node 2`, from the repository's root; `run.py` starts it. The last line
of its output is one JSON object with the accuracy on dev (validation) and test.
"""

from peer import accuracy, label_names, options, parquet_splits, train_and_score, training_arguments
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    set_seed,
)

DATA = "../shared/data/text-classification/sst2"
MODEL = "data/quickstart/model"
LABELS = ("negative", "positive")


def main() -> None:
    said = options()
    arguments = training_arguments(
        said.seed,
        said.scratch,
        num_train_epochs=1,
        per_device_train_batch_size=16,  # 32 over two processes
        per_device_eval_batch_size=32,
        learning_rate=5e-5,
        lr_scheduler_type="linear",
        train_sampling_strategy="group_by_length",
        # With the default, Trainer (transformers 5.23, compute_loss) multiplies the loss by the number of processes for
        # a model that is told the global count and divides by it. BERT's classifier is told and takes its own mean all
        # the same: losses and gradients would be doubled, and max_grad_norm would clip at half of what it says.
        average_tokens_across_devices=False,
    )
    set_seed(said.seed)  # the new head is drawn before the Trainer sets its own seed
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForSequenceClassification.from_pretrained(
        MODEL,
        dtype="float32",
        **label_names(LABELS),
    )
    with arguments.main_process_first():  # the other process reads the first one's cache
        splits = parquet_splits(DATA, said.scratch).map(
            lambda rows: tokenizer(rows["text"], truncation=True, max_length=128), batched=True, remove_columns=["text"]
        )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=splits["train"],
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=accuracy,
    )
    train_and_score(trainer, splits, "accuracy")


if __name__ == "__main__":
    main()
