"""The peer of sentence-embedding.yaml: SentenceTransformerTrainer with MultipleNegativesRankingLoss.

Runs in one process of `torchrun --nproc_per_node 1`, from the repository's root: with two, the other rows of a global
batch would not be negatives. `run.py` starts it. The last line of its output is one JSON object with recall@1 on dev
(validation) and test: each query among all answers of its split.
"""

from collections import defaultdict

import numpy as np
from datasets import Dataset
from peer import SCORED, parquet_splits, parse_options, print_scores, training_arguments
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Pooling

DATA = "../shared/data/retrieval/medquad"
MODEL = "data/quickstart/model"
MAX_LENGTH = 64
DEPTH = 10


def main() -> None:
    options = parse_options()
    arguments = training_arguments(
        options,
        SentenceTransformerTrainingArguments,
        max_steps=16,
        per_device_train_batch_size=64,
        learning_rate=1e-4,
        logging_steps=1,
    )
    model = load_model()
    splits = parquet_splits(DATA, options).select_columns(["query", "positive"])
    trainer = SentenceTransformerTrainer(
        model, arguments, train_dataset=splits["train"], loss=MultipleNegativesRankingLoss(model, scale=20.0)
    )
    trainer.train()
    print_scores(trainer, "recall_at_1", {name: score(model, splits[split]) for name, split in SCORED})


def load_model() -> SentenceTransformer:
    """Load MiniLM, whose vectors are means over the tokens."""
    encoder = Transformer(MODEL, max_seq_length=MAX_LENGTH, model_kwargs={"dtype": "float32"})
    return SentenceTransformer(modules=[encoder, Pooling(encoder.get_embedding_dimension(), "mean")], device="cpu")


def score(model: SentenceTransformer, rows: Dataset) -> dict[str, float]:
    """Score the rank of each query's own answer among the answers of other queries, by cosine.

    A fifth of the rows repeat a query: its answers in other rows are right too, and have no rank, as with us.
    """
    answers = sorted(set(rows["positive"]))
    places = {answer: i for i, answer in enumerate(answers)}
    queries, corpus = (
        model.encode(list(texts), batch_size=64, normalize_embeddings=True, show_progress_bar=False)
        for texts in (rows["query"], answers)
    )
    cosines = queries @ corpus.T
    own = np.array([cosines[i, places[answer]] for i, answer in enumerate(rows["positive"])])
    answers_of = defaultdict(list)
    for query, answer in zip(rows["query"], rows["positive"], strict=True):
        answers_of[query].append(places[answer])
    for i, query in enumerate(rows["query"]):
        # Neither is the own answer before itself.
        cosines[i, answers_of[query]] = -np.inf
    ranks = (cosines > own[:, None]).sum(1)  # 0 for the nearest
    shown = ranks < DEPTH
    return {
        "recall_at_1": float((ranks == 0).mean()),
        f"mrr_at_{DEPTH}": float(np.where(shown, 1 / (ranks + 1), 0).mean()),
        f"ndcg_at_{DEPTH}": float(np.where(shown, 1 / np.log2(ranks + 2), 0).mean()),
        "rows": len(ranks),
    }


if __name__ == "__main__":
    main()
