"""The peer of text-classification.yaml and text-classification-zh.yaml: transformers' Trainer on the same data.

Runs in every process of `torchrun --nproc_per_node 2`, from the repository's root; `run.py` starts it. The last line
of its output is one JSON object with the accuracy on dev (validation) and test.
"""

from dataclasses import dataclass

from peer import accuracy, label_names, option_parser, parquet_splits, train_and_score, training_arguments
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    set_seed,
)

LABELS = ("negative", "positive")


@dataclass(frozen=True)
class Comparison:
    """What the two job files differ in."""

    data: str
    model: str
    learning_rate: float
    length: dict[str, int]
    """Epochs or steps of the training."""


COMPARISONS = {
    "en": Comparison("../shared/data/text-classification/sst2", "data/quickstart/model", 5e-5, {"num_train_epochs": 1}),
    "zh": Comparison("../shared/data/text-classification/chnsenticorp", "data/e5", 1e-4, {"max_steps": 40}),
}


def main() -> None:
    parser = option_parser()
    parser.add_argument("--language", choices=COMPARISONS, required=True)
    said = parser.parse_args()
    compared = COMPARISONS[said.language]
    arguments = training_arguments(
        said.seed,
        said.scratch,
        per_device_train_batch_size=16,  # 32 over two processes
        per_device_eval_batch_size=32,
        learning_rate=compared.learning_rate,
        lr_scheduler_type="linear",
        # Grouped, the longest rows come first, and a run that ends within an epoch would see no others.
        train_sampling_strategy="random" if "max_steps" in compared.length else "group_by_length",
        # With the default, Trainer (transformers 5.23, compute_loss) multiplies the loss by the number of processes for
        # a model that is told the global count and divides by it. BERT's classifier is told and takes its own mean all
        # the same: losses and gradients would be doubled, and max_grad_norm would clip at half of what it says.
        average_tokens_across_devices=False,
        **compared.length,
    )
    set_seed(said.seed)  # the new head is drawn before the Trainer sets its own seed
    tokenizer = AutoTokenizer.from_pretrained(compared.model)
    model = AutoModelForSequenceClassification.from_pretrained(
        compared.model,
        dtype="float32",
        **label_names(LABELS),
    )
    with arguments.main_process_first():  # the other process reads the first one's cache
        splits = parquet_splits(compared.data, said.scratch).map(
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
