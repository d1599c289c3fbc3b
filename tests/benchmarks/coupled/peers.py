"""Does a peer's training curve depend on the batch of one device? Runs on the client; needs no GPU.

Each peer trains several times in one process from the same weights, without dropout, on the same rows in the same order
with the same global batch, cut into micro-batches of other sizes (`per_device_train_batch_size` x
`gradient_accumulation_steps`). If the curve were a function of the global batch, the losses of a step would be equal.

- mnrl: sentence-transformers, MultipleNegativesRankingLoss: the other rows of a micro-batch are the negatives;
- kto: TRL's KTOTrainer: the KL term is a mean over a micro-batch;
- seq2seq: Seq2SeqTrainer on an EncoderDecoderModel: token means of micro-batches of uneven lengths.

`make bench-coupled-peers` runs it. The last line of the output is one JSON object.
"""

import argparse
import json
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from datasets import Dataset
from peft import LoraConfig
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    EncoderDecoderModel,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
    set_seed,
)
from trl import KTOConfig, KTOTrainer

SHARED = Path("../shared/data")
MINILM, MINILM_TWICE, SMOLLM2 = "data/quickstart/model", "data/minilm-twice", "data/smollm2"


class Cut(NamedTuple):
    """How a global batch is cut into micro-batches."""

    rows: int
    accumulation: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.accumulation}"


class Peer(NamedTuple):
    """A trainer and the cuts to compare, the whole global batch first."""

    trainer: Callable[[Cut, int, str], Trainer]
    cuts: tuple[Cut, ...]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--steps", type=int, default=4)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(2)
    report: dict[str, object] = {}
    for name in options.peers:
        peer = PEERS[name]
        curves = {str(cut): curve(peer, cut, options.steps) for cut in peer.cuts}
        report[name] = curves
        report[f"{name}_difference"] = difference(curves)
        if name == "seq2seq":
            # Logged losses, and gradients, are multiplied by the accumulation (transformers 5.23: Trainer does not
            # divide for a model that takes `num_items_in_batch`, and this model takes it and ignores it).
            means = {str(cut): [loss / cut.accumulation for loss in curves[str(cut)]] for cut in peer.cuts}
            report["seq2seq_means_difference"] = difference(means)
        print_table(name, curves)
    print(json.dumps(report))


def difference(curves: dict[str, list[float]]) -> float:
    """Return the largest difference of a step's loss to that of the whole global batch, which comes first."""
    whole, *others = curves.values()
    return round(max(abs(a - b) for other in others for a, b in zip(whole, other, strict=True)), 6)


def curve(peer: Peer, cut: Cut, steps: int) -> list[float]:
    """Return the loss of each step, as the trainer logs it."""
    set_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = peer.trainer(cut, steps, scratch)
        trainer.train()
    return [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]


def arguments(kind: type[TrainingArguments], cut: Cut, steps: int, scratch: str, **own: object) -> TrainingArguments:
    """Return the arguments of a cut: the same for each, but for the cut."""
    return kind(
        output_dir=scratch,
        max_steps=steps,
        per_device_train_batch_size=cut.rows,
        gradient_accumulation_steps=cut.accumulation,
        lr_scheduler_type="constant",
        use_cpu=True,
        dataloader_pin_memory=False,
        train_sampling_strategy="sequential",
        save_strategy="no",
        report_to="none",
        logging_steps=1,
        disable_tqdm=True,
        **own,  # type: ignore[arg-type]
    )


def mnrl(cut: Cut, steps: int, scratch: str) -> Trainer:
    """Build MiniLM's trainer on medical questions and answers."""
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    encoder = Transformer(MINILM, max_seq_length=48, model_kwargs={"dtype": "float32"}, config_kwargs=still)
    model = SentenceTransformer(modules=[encoder, Pooling(encoder.get_embedding_dimension(), "mean")], device="cpu")
    rows = Dataset.from_parquet(str(SHARED / "retrieval/medquad/train.parquet"), cache_dir=scratch)
    return SentenceTransformerTrainer(
        model,
        arguments(SentenceTransformerTrainingArguments, cut, steps, scratch, learning_rate=5e-5),
        train_dataset=rows.select_columns(["query", "positive"]).shuffle(seed=0),
        loss=MultipleNegativesRankingLoss(model, scale=20.0),
    )


def kto(cut: Cut, steps: int, scratch: str) -> Trainer:
    """Build a trainer of SmolLM2's first six layers with LoRA on rated answers; the model has no dropout."""
    rows = Dataset.from_parquet("data/preference/kto/train.parquet", cache_dir=scratch)
    return KTOTrainer(
        AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype="float32", num_hidden_layers=6),
        args=arguments(
            KTOConfig, cut, steps, scratch, learning_rate=2e-3, max_length=112, bf16=False, gradient_checkpointing=False
        ),
        train_dataset=rows.shuffle(seed=0),
        processing_class=AutoTokenizer.from_pretrained(SMOLLM2),
        peft_config=LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear"),
    )


def seq2seq(cut: Cut, steps: int, scratch: str) -> Trainer:
    """Build a trainer of MiniLM twice on translations."""
    tokenizer = AutoTokenizer.from_pretrained(MINILM_TWICE)
    model = EncoderDecoderModel.from_pretrained(MINILM_TWICE, dtype="float32")
    for half in (model.encoder, model.decoder):
        half.config.attention_probs_dropout_prob = 0.0
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0

    def encode(row: dict[str, str]) -> dict[str, list]:
        return {**tokenizer(row["de"]), "labels": tokenizer(row["en"])["input_ids"]}

    rows = Dataset.from_parquet(str(SHARED / "translation/multi30k_en_de/train.parquet"), cache_dir=scratch)
    rows = rows.select(range(cut.rows * cut.accumulation * steps))
    return Seq2SeqTrainer(
        model,
        arguments(Seq2SeqTrainingArguments, cut, steps, scratch, learning_rate=5e-5),
        train_dataset=rows.map(encode, remove_columns=["de", "en"]),
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )


def print_table(name: str, curves: dict[str, list[float]]) -> None:
    """Print a line per step, a column per cut."""
    print(f"\n{name}\n" + "step  " + "".join(f"{cut:>12}" for cut in curves))
    for step, losses in enumerate(zip(*curves.values(), strict=True), start=1):
        print(f"{step:<6}" + "".join(f"{loss:>12.5f}" for loss in losses), flush=True)


PEERS = {
    "mnrl": Peer(mnrl, (Cut(64, 1), Cut(16, 4), Cut(4, 16))),
    "kto": Peer(kto, (Cut(8, 1), Cut(4, 2), Cut(2, 4))),
    "seq2seq": Peer(seq2seq, (Cut(16, 1), Cut(4, 4), Cut(2, 8))),
}


if __name__ == "__main__":
    main()
