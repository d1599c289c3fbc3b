"""The peer of causal-lm.yaml: transformers' Trainer on conversations, with loss on the answers only.

Runs in every process of `torchrun --nproc_per_node 2`, from the repository's root; `run.py` starts it. The last line
of its output is one JSON object with the perplexity of the answers' tokens on dev (validation) and test.
"""

import math

import torch
from peer import encoded_splits, parse_options, train_and_score, training_arguments
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    EvalPrediction,
    PreTrainedTokenizerBase,
    Trainer,
)

DATA = "../shared/data/instruction-sft/alpaca_en"
MODEL = "data/smollm2"
MAX_LENGTH = 256
IGNORED = -100


def main() -> None:
    options = parse_options()
    arguments = training_arguments(
        options,
        max_steps=16,
        per_device_train_batch_size=4,  # 8 over two processes
        per_device_eval_batch_size=4,
        learning_rate=1e-4,
        lr_scheduler_type="cosine",
        # Llama divides by the number of tokens it is told: the mean is over the tokens of both processes.
        average_tokens_across_devices=True,
    )
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32")
    splits = encoded_splits(DATA, options, arguments, lambda row: encode(row, tokenizer), batched=False)
    trainer = Trainer(
        model,
        arguments,
        train_dataset=splits["train"],
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        preprocess_logits_for_metrics=token_losses,
        compute_metrics=perplexity,
    )
    train_and_score(trainer, splits, "perplexity")


def encode(row: dict[str, list], tokenizer: PreTrainedTokenizerBase) -> dict[str, list]:
    """Encode a conversation of one question and its answer by the chat template, with labels on the answer."""
    prompt = tokenizer.apply_chat_template(row["messages"][:-1], add_generation_prompt=True)["input_ids"]
    ids = tokenizer.apply_chat_template(row["messages"])["input_ids"]
    labels = [IGNORED] * len(prompt) + ids[len(prompt) :]
    return {"input_ids": ids[:MAX_LENGTH], "labels": labels[:MAX_LENGTH], "attention_mask": [1] * len(ids[:MAX_LENGTH])}


def token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return (rows, 2): each row's loss, summed, and its number of tokens; whole logits would fill the memory."""
    following = labels[:, 1:]
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), following, ignore_index=IGNORED, reduction="none"
    )
    return torch.stack([losses.sum(1), (following != IGNORED).sum(1).float()], 1)


def perplexity(scored: EvalPrediction) -> dict[str, float]:
    """Return exp of the mean loss over all tokens of all rows."""
    loss, tokens = scored.predictions.sum(0, dtype="float64")
    return {"perplexity": math.exp(loss / tokens), "rows": len(scored.predictions)}


if __name__ == "__main__":
    main()
