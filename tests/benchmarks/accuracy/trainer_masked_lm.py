"""The peer of masked-lm.yaml: transformers' Trainer by the method of run_mlm, line by line.

Runs in every process of `torchrun --nproc_per_node 2`, from the repository's root; `run.py` starts it. The last line
of its output is one JSON object with the loss per masked token on dev (validation) and test, which are masked once.
"""

import torch
from datasets import Dataset
from peer import SCORED, encoded_splits, evaluate, parse_options, print_scores, training_arguments
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorForTokenClassification,
    EvalPrediction,
    Trainer,
    set_seed,
)

DATA = "../shared/data/text-classification/sst2"
MODEL = "data/quickstart/model"
MAX_LENGTH = 128
MASK_FRACTION = 0.15
IGNORED = -100


def main() -> None:
    options = parse_options()
    arguments = training_arguments(
        options,
        max_steps=100,
        per_device_train_batch_size=16,  # 32 over two processes
        per_device_eval_batch_size=32,
        learning_rate=5e-4,
    )
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    masking = DataCollatorForLanguageModeling(tokenizer, mlm_probability=MASK_FRACTION)
    splits = encoded_splits(
        DATA,
        options,
        arguments,
        lambda rows: tokenizer(rows["text"], truncation=True, max_length=MAX_LENGTH, return_special_tokens_mask=True),
    )
    set_seed(0)
    scored = {split: masked_once(splits[split], masking) for _, split in SCORED}
    set_seed(options.seed)  # the new head is drawn before the Trainer sets its own seed
    model = AutoModelForMaskedLM.from_pretrained(MODEL, dtype="float32")
    trainer = Trainer(
        model,
        arguments,
        train_dataset=splits["train"],
        processing_class=tokenizer,
        data_collator=masking,
        preprocess_logits_for_metrics=token_losses,
        compute_metrics=mean_loss,
    )
    trainer.train()
    trainer.data_collator = DataCollatorForTokenClassification(tokenizer)  # pads what is masked already
    print_scores(trainer, "token_loss", evaluate(trainer, scored, ("token_loss", "accuracy")))


def masked_once(rows: Dataset, masking: DataCollatorForLanguageModeling) -> Dataset:
    """Return rows with masks that stay: the same for every seed and batch size."""

    def mask(row: dict[str, list]) -> dict[str, list]:
        masked = masking([row])
        return {key: masked[key][0].tolist() for key in ("input_ids", "attention_mask", "labels")}

    return Dataset.from_list([mask(row) for row in rows])


def token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return (rows, 3): each row's loss, summed, tokens that are right, masked tokens; logits would fill the memory."""
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
    masked = labels != IGNORED
    right = (logits.argmax(-1) == labels) & masked
    return torch.stack([losses.sum(1), right.sum(1).float(), masked.sum(1).float()], 1)


def mean_loss(scored: EvalPrediction) -> dict[str, float]:
    """Return loss and accuracy, each the mean over all masked tokens of all rows."""
    loss, right, masked = scored.predictions.sum(0, dtype="float64")
    return {"token_loss": loss / masked, "accuracy": right / masked, "rows": len(scored.predictions)}


if __name__ == "__main__":
    main()
