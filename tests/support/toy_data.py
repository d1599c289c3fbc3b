"""Small tables in every form that `launcher init` knows, and in some that it does not."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from launcher.data.splits import open_split
from launcher.init.profile import DataProfile, profile_data

ROWS = 60


def words(rows: int = ROWS, low: int = 6, high: int = 14, seed: int = 0) -> list[str]:
    """Return texts of the words w0..w199, all different."""
    rng = np.random.default_rng(seed)
    return [" ".join(f"w{w}" for w in rng.integers(0, 200, rng.integers(low, high))) + f" w{i}" for i in range(rows)]


def picture(seed: int = 0) -> bytes:
    """Return a PNG of 16 x 16 pixels."""
    stream = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 255, (16, 16, 3))
    Image.fromarray(noise.astype(np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def cycle(*values: object, rows: int = ROWS) -> list[object]:
    """Repeat values up to a number of rows."""
    return [values[i % len(values)] for i in range(rows)]


def chats(rows: int = ROWS, answerer: str = "assistant", keys: tuple[str, str] = ("role", "content")) -> list[object]:
    """Return conversations of a question and an answer."""
    role, content = keys
    return [
        [{role: "user", content: question}, {role: answerer, content: answer}]
        for question, answer in zip(words(rows), words(rows, seed=1), strict=True)
    ]


def named_classes(table: pa.Table, column: str, names: list[str]) -> pa.Table:
    """Return a table with the metadata that `datasets` writes for a ClassLabel."""
    features = {column: {"names": names, "_type": "ClassLabel"}}
    return table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


SINGLE = pa.table({"id": range(ROWS), "review": words(), "stars": cycle(1, 2, 3)})
PAIR = pa.table({"premise": words(), "hypothesis": words(seed=1), "label": cycle("yes", "no", "maybe")})
REGRESSION = pa.table({"question": words(), "passage": words(seed=1), "score": [i / 10 for i in range(ROWS)]})
SCORED = pa.table({"sentence1": words(), "sentence2": words(seed=1), "score": [i / 10 for i in range(ROWS)]})
QUERIES = pa.table({"query": words(), "positive": words(seed=1)})
RANKED = pa.table(
    {"anchor": words(), "positive": words(seed=1), "negatives": [words(i % 3 + 1, seed=i) for i in range(ROWS)]}
)
MULTI = pa.table({"text": words(), "labels": cycle(["a"], ["b", "c"], ["a", "c"])})
TAGS = pa.table(
    {"id": [f"r{i}" for i in range(ROWS)], "tokens": [text.split() for text in words()],
     "pos_tags": [[0] * len(text.split()) for text in words()],
     "ner_tags": [["B-x" if w == "w1" else "O" for w in text.split()[1:]] + ["B-x"] for text in words()]}
)  # fmt: skip
SPANS = pa.table(
    {
        "text": words(),
        "entities": [
            [{"start": 0, "end": len(text.split()[0]), "label": "x"}] if i % 2 == 0 else []
            for i, text in enumerate(words())
        ],
    }
)
ANSWERS = pa.table(
    {"id": [f"q{i}" for i in range(ROWS)], "title": cycle("w1", "w2"), "context": words(), "question": cycle("w1 w2?"),
     "answers": [{"text": [text.split()[1]], "answer_start": [len(text.split()[0]) + 1]} for text in words()]}
)  # fmt: skip
TEXTS = pa.table({"url": [f"http://x/{i}" for i in range(ROWS)], "text": words()})
MESSAGES = pa.table({"prompt_id": [f"p{i}" for i in range(ROWS)], "messages": chats()})
PROMPTS = pa.table({"instruction": words(), "input": cycle("", "w1 w2"), "output": words(seed=1)})
IMAGES = pa.table(
    {"image": [{"bytes": picture(i), "path": None} for i in range(ROWS)], "label": cycle("cat", "dog")}
)  # fmt: skip


def look_at(table: pa.Table, folder: Path) -> DataProfile:
    """Profile a table, through a file."""
    pq.write_table(table, folder / "toy.parquet")
    return profile_data(open_split("train", [str(folder / "toy.parquet")]), "toy.parquet")
