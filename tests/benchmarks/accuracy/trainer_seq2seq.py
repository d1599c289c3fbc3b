"""The peer of seq2seq.yaml and seq2seq-zh.yaml: transformers' Seq2SeqTrainer, scored by its loss.

Runs in every process of `torchrun --nproc_per_node 2`, from the repository's root; `run.py` starts it. The last line
of its output is one JSON object with the loss per target token on dev (validation) and test, and sacrebleu's BLEU.
"""

import numpy as np
import torch
from datasets import Dataset
from peer import SCORED, Comparison, encoded_splits, parquet_splits, parse_options, print_scores, training_arguments
from sacrebleu.metrics import BLEU, CHRF
from torch.utils.data import DataLoader
from transformers import (
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    EncoderDecoderModel,
    PreTrainedTokenizerBase,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)

TARGET = "en"
MAX_SOURCE_LENGTH = 64
MAX_TARGET_LENGTH = 40
IGNORED = -100
COMPARISONS = {
    "de": Comparison("../shared/data/translation/multi30k_en_de", "data/minilm-twice", {"max_steps": 120}),
    "zh": Comparison("../shared/data/translation/tatoeba_zh_en", "data/e5-twice", {"max_steps": 120}),
}


def main() -> None:
    options = parse_options(source=COMPARISONS)
    compared = COMPARISONS[options.source]
    arguments = training_arguments(
        options,
        Seq2SeqTrainingArguments,
        per_device_train_batch_size=16,  # 32 over two processes
        per_device_eval_batch_size=64,
        learning_rate=5e-4,
        predict_with_generate=True,
        generation_max_length=MAX_TARGET_LENGTH + 1,  # with the decoder's start token
        generation_num_beams=1,
        **compared.numbers,
    )
    tokenizer = AutoTokenizer.from_pretrained(compared.model)
    model = EncoderDecoderModel.from_pretrained(compared.model, dtype="float32")
    splits = encoded_splits(compared.data, options, arguments, lambda rows: encode(rows, options.source, tokenizer))
    texts = parquet_splits(compared.data, options)
    trainer = Seq2SeqTrainer(
        model,
        arguments,
        train_dataset=splits["train"],
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )
    trainer.train()
    scores = {name: score(trainer, splits[split], list(texts[split][TARGET])) for name, split in SCORED}
    print_scores(trainer, "loss", scores)


def encode(rows: dict[str, list], source: str, tokenizer: PreTrainedTokenizerBase) -> dict[str, list]:
    """Return token ids of both languages; the model shifts the labels into the decoder's input itself."""
    inputs = tokenizer(rows[source], truncation=True, max_length=MAX_SOURCE_LENGTH)
    target = tokenizer(text_target=rows[TARGET], truncation=True, max_length=MAX_TARGET_LENGTH + 1)
    return {
        "input_ids": inputs["input_ids"],
        "attention_mask": inputs["attention_mask"],
        # Without the start token, which the decoder reads anyway: as a label it costs nothing and lowers the mean.
        "labels": [ids[1:] for ids in target["input_ids"]],
    }


def score(trainer: Seq2SeqTrainer, rows: Dataset, references: list[str]) -> dict[str, float]:
    """Return BLEU and chrF2 of generated texts against the true texts, as they are written, and the loss."""
    predicted = trainer.predict(rows)
    ids = np.where(predicted.predictions == IGNORED, trainer.processing_class.pad_token_id, predicted.predictions)
    generated = trainer.processing_class.batch_decode(ids, skip_special_tokens=True)
    return {
        "bleu": BLEU().corpus_score(generated, [references]).score,
        "chrf": CHRF().corpus_score(generated, [references]).score,
        "loss": token_loss(trainer, rows),
        "rows": len(generated),
    }


def token_loss(trainer: Seq2SeqTrainer, rows: Dataset) -> float:
    """Return the mean loss of all target tokens; the Trainer's own is a mean of the batches' means."""
    total, tokens = 0.0, 0
    trainer.model.eval()
    for batch in DataLoader(rows, batch_size=64, collate_fn=trainer.data_collator):
        with torch.no_grad():
            loss = trainer.model(**batch).loss
        counted = int((batch["labels"] != IGNORED).sum())
        total += loss.item() * counted
        tokens += counted
    return total / tokens


if __name__ == "__main__":
    main()
