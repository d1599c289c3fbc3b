"""What does comparing the splits cost? Rows per second of the check against plain reading of the same columns.

Both read the same Parquet files (2 million texts of 20 to 160 characters, zstd, row groups of 100,000) with one thread
per core, in turn, three rounds; validation and test have 20,000 rows, a tenth of which are training rows.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from launcher.data.leakage.duplicates import find_duplicates
from launcher.data.splits import Split, open_split, read_batches
from launcher.spec.model import ModelSpec
from launcher.tasks.text_classification import TextClassification, TextParams

_WORDS = 50_000
_EVALUATION_ROWS = 20_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    threads = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as folder:
        splits = write(Path(folder), options.rows)
        task = TextClassification(TextParams(labels=("a", "b")), ModelSpec(name="none"), 0)
        checks, reads = [], []
        for _ in range(options.rounds):
            started = time.perf_counter()
            read_all(splits, threads)
            read = time.perf_counter()
            record = find_duplicates(splits, task, threads)
            reads.append(read - started)
            checks.append(time.perf_counter() - read)
        rows = sum(split.rows for split in splits.values())
    check, read = statistics.median(checks), statistics.median(reads)
    facts = {
        "rows": rows,
        "rows_per_s": round(rows / check),
        "read_rows_per_s": round(rows / read),
        "over_reading": round(check / read, 2),
        "threads": threads,
        "duplicates": {f"{pair.split} in {pair.other}": pair.duplicates for pair in record.pairs},
    }
    print(json.dumps(facts))


def write(folder: Path, rows: int) -> dict[str, Split]:
    """Write Parquet files of random texts; a tenth of the evaluation rows are copies of training rows."""
    rng = np.random.default_rng(0)
    words = np.array(["".join(chr(97 + c) for c in rng.integers(0, 26, rng.integers(2, 9))) for _ in range(_WORDS)])
    with pq.ParquetWriter(folder / "train.parquet", SCHEMA, compression="zstd") as writer:
        for begin in range(0, rows, 100_000):
            writer.write_table(texts(rng, words, min(100_000, rows - begin)))
    first = pq.ParquetFile(folder / "train.parquet").read_row_group(0)
    for name in ("validation", "test"):
        fresh = texts(rng, words, _EVALUATION_ROWS * 9 // 10)
        copies = first.take(rng.integers(0, len(first), _EVALUATION_ROWS // 10))
        pq.write_table(pa.concat_tables([fresh, copies]), folder / f"{name}.parquet", compression="zstd")
    names = ("train", "validation", "test")
    return {name: open_split(name, [str(folder / f"{name}.parquet")]) for name in names}


SCHEMA = pa.schema({"text": pa.string(), "label": pa.string()})


def texts(rng: np.random.Generator, words: np.ndarray, rows: int) -> pa.Table:
    """Return rows of 4 to 28 words."""
    counts = rng.integers(4, 29, rows)
    drawn = words[rng.integers(0, len(words), counts.sum())].tolist()
    ends = np.cumsum(counts).tolist()
    lines = [" ".join(drawn[end - count : end]) for end, count in zip(ends, counts.tolist(), strict=True)]
    return pa.table({"text": lines, "label": np.where(rng.integers(0, 2, rows), "a", "b")}, schema=SCHEMA)


def read_all(splits: dict[str, Split], threads: int) -> None:
    """Decode the input columns of every split, and do nothing with them."""
    with ThreadPoolExecutor(threads) as pool:
        for split in splits.values():
            list(pool.map(lambda f: sum(b.num_rows for b in read_batches(f, ["text"])), split.fragments))


if __name__ == "__main__":
    main()
