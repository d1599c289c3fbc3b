"""The peer of seq2seq.yaml and seq2seq-zh.yaml: transformers' Seq2SeqTrainer, scored by what it generates.

Runs in every process of `torchrun --nproc_per_node 2`, from the repository's root; `run.py` starts it. The last line
of its output is one JSON object with sacrebleu's BLEU on dev (validation) and test.
"""

from dataclasses import dataclass

import numpy as np
from datasets import Dataset
from peer import SCORED, option_parser, parquet_splits, print_scores, training_arguments
from sacrebleu.metrics import BLEU, CHRF
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


@dataclass(frozen=True)
class Comparison:
    """What the two job files differ in."""

    data: str
    model: str
    max_steps: int


COMPARISONS = {
    "de": Comparison("../shared/data/translation/multi30k_en_de", "data/minilm-twice", 120),
    "zh": Comparison("../shared/data/translation/tatoeba_zh_en", "data/e5-twice", 120),
}


def main() -> None:
    parser = option_parser()
    parser.add_argument("--source", choices=COMPARISONS, required=True)
    said = parser.parse_args()
    compared = COMPARISONS[said.source]
    arguments = training_arguments(
        said.seed,
        said.scratch,
        Seq2SeqTrainingArguments,
        max_steps=compared.max_steps,
        per_device_train_batch_size=16,  # 32 over two processes
        per_device_eval_batch_size=64,
        learning_rate=5e-4,
        lr_scheduler_type="linear",
        train_sampling_strategy="random",  # grouped, the longest rows come first, and the run ends within an epoch
        # Told the global count, EncoderDecoderModel takes its own mean all the same (see trainer_text_classification).
        average_tokens_across_devices=False,
        predict_with_generate=True,
        generation_max_length=MAX_TARGET_LENGTH + 1,  # with the decoder's start token
        generation_num_beams=1,
    )
    tokenizer = AutoTokenizer.from_pretrained(compared.model)
    model = EncoderDecoderModel.from_pretrained(compared.model, dtype="float32")
    with arguments.main_process_first():  # the other process reads the first one's cache
        raw = parquet_splits(compared.data, said.scratch)
        splits = raw.map(
            lambda rows: encode(rows, said.source, tokenizer), batched=True, remove_columns=[said.source, TARGET]
        )
    texts = {split: list(raw[split][TARGET]) for _, split in SCORED}
    trainer = Seq2SeqTrainer(
        model,
        arguments,
        train_dataset=splits["train"],
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )
    trainer.train()
    scores = {name: score(trainer, splits[split], texts[split]) for name, split in SCORED}
    print_scores(trainer, "bleu", scores)


def encode(rows: dict[str, list], source: str, tokenizer: PreTrainedTokenizerBase) -> dict[str, list]:
    """Token ids of both languages; the model shifts the labels into the decoder's input itself."""
    found = tokenizer(rows[source], truncation=True, max_length=MAX_SOURCE_LENGTH)
    target = tokenizer(text_target=rows[TARGET], truncation=True, max_length=MAX_TARGET_LENGTH)
    return {
        "input_ids": found["input_ids"],
        "attention_mask": found["attention_mask"],
        "labels": target["input_ids"],
    }


def score(trainer: Seq2SeqTrainer, rows: Dataset, references: list[str]) -> dict[str, float]:
    """BLEU and chrF2 of generated texts against the true texts, as they are written."""
    predicted = trainer.predict(rows)
    ids = np.where(predicted.predictions == IGNORED, trainer.processing_class.pad_token_id, predicted.predictions)
    said = trainer.processing_class.batch_decode(ids, skip_special_tokens=True)
    return {
        "bleu": BLEU().corpus_score(said, [references]).score,
        "chrf": CHRF().corpus_score(said, [references]).score,
        "loss": predicted.metrics["test_loss"],  # the mean over batches
        "rows": len(said),
    }


if __name__ == "__main__":
    main()
