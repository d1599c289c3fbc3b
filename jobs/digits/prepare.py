"""Writes scikit-learn's handwritten digits as Parquet with PNG pictures to `data/digits/`. Runs on the client.

1,797 pictures of 8 x 8 pixels (Alpaydin & Kaynak 1998, UCI); needs scikit-learn and Pillow (`pip install -e .[dev]`).
"""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from sklearn.datasets import load_digits  # type: ignore[import-untyped]

FOLDER = Path(__file__).resolve().parents[2] / "data" / "digits"
SPLITS = {"train": 1437, "validation": 180, "test": 180}


def main() -> None:
    """Write the three splits."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.images))
    FOLDER.mkdir(parents=True, exist_ok=True)
    begin = 0
    for name, rows in SPLITS.items():
        chosen = order[begin : begin + rows]
        begin += rows
        pictures = [{"bytes": _png(digits.images[i]), "path": f"{i:04}.png"} for i in chosen]
        labels = [str(digits.target[i]) for i in chosen]
        pq.write_table(pa.table({"image": pictures, "label": labels}), FOLDER / f"{name}.parquet")
    print(f"{len(order)} pictures are in {FOLDER}")


def _png(pixels: np.ndarray) -> bytes:
    Image.fromarray(np.clip(pixels * 16, 0, 255).astype(np.uint8)).save(sink := io.BytesIO(), "PNG")
    return sink.getvalue()


if __name__ == "__main__":
    main()
