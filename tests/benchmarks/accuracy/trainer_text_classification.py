"""The peer of text-classification.yaml and text-classification-zh.yaml: transformers' Trainer on the same data.

Runs in every process of `torchrun --nproc_per_node 2`, from the repository's root; `run.py` starts it. The last line
of its output is one JSON object with the accuracy on dev (validation) and test.
"""

from peer import (
    Comparison,
    accuracy,
    encoded_splits,
    label_names,
    parse_options,
    train_and_score,
    training_arguments,
)
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    set_seed,
)

LABELS = ("negative", "positive")
SETS = "../shared/data/text-classification"
COMPARISONS = {
    "en": Comparison(f"{SETS}/sst2", "data/quickstart/model", {"num_train_epochs": 1, "learning_rate": 5e-5}),
    "zh": Comparison(f"{SETS}/chnsenticorp", "data/e5", {"max_steps": 40, "learning_rate": 1e-4}),
}


def main() -> None:
    options = parse_options(language=COMPARISONS)
    compared = COMPARISONS[options.language]
    arguments = training_arguments(
        options,
        per_device_train_batch_size=16,  # 32 over two processes
        per_device_eval_batch_size=32,
        **compared.numbers,
    )
    set_seed(options.seed)  # the new head is drawn before the Trainer sets its own seed
    tokenizer = AutoTokenizer.from_pretrained(compared.model)
    model = AutoModelForSequenceClassification.from_pretrained(compared.model, dtype="float32", **label_names(LABELS))

    def encode(rows: dict[str, list]) -> dict[str, list]:
        return {**tokenizer(rows["text"], truncation=True, max_length=128), "labels": rows["label"]}

    splits = encoded_splits(compared.data, options, arguments, encode)
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
