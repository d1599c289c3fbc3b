"""Does the memory of `launcher train` stay flat as the data grow? Runs on the client; needs no GPU.

A tiny BERT is trained for 200 steps by the command a user types, with two workers, from N / 100, N / 10 and N rows (10
million by default) of short texts that are made on the spot, and validated on 1,000 others; the check for rows that
training and validation have in common reads all of them. The resident memory of the whole process tree (driver, Ray,
workers; pages they share count several times) is sampled all along. The last line of the output is one JSON object:

    rows          N
    growth        peak memory with N rows over that with N / 100, less 1
    growth_tenth  the same with N / 10 rows over N / 100
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT)]
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402  # the environment is pinned before
import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
import yaml  # noqa: E402

from tests.benchmarks.tree import PeakMemory  # noqa: E402

_STEPS = 200
_FILES = 4
_VALIDATION = 1000
_CHUNK = 100_000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--work", type=Path, help="where to put data and runs, which are removed afterwards")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="bench-memory-", dir=options.work))
    try:
        peaks = [measure(folder, rows) for rows in (options.rows // 100, options.rows // 10, options.rows)]
    finally:
        shutil.rmtree(folder)
    growth, tenth = (round(peaks[i] / peaks[0] - 1, 4) for i in (2, 1))
    print(json.dumps({"rows": options.rows, "growth": growth, "growth_tenth": tenth}))
    return 0


def measure(folder: Path, rows: int) -> int:
    """Return the peak bytes of a run from so many rows."""
    from tests.support.tiny_models import make_tiny_bert

    model = folder / "model"
    if not model.exists():
        make_tiny_bert(model)
        write_rows(folder / "validation", _VALIDATION, seed=1)
    write_rows(folder / f"train-{rows}", rows, seed=0)
    job = folder / f"{rows}.yaml"
    job.write_text(yaml.safe_dump({
        "name": f"rows-{rows}",
        "task": {"type": "text-classification", "labels": ["a", "b"], "max_length": 32},
        "model": {"name": str(model)},
        "data": {"train": str(folder / f"train-{rows}"), "validation": str(folder / "validation")},
        "train": {"max_steps": _STEPS, "batch_size": 32, "log_every_steps": 50},
        "cluster": {"workers": 2, "data_workers": 1},  # by itself, workers would read few rows without Ray Data
        "output": {"storage": str(folder / "runs")},
    }))  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", "launcher", "train", str(job)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    memory = PeakMemory(process)
    output, _ = process.communicate()
    peak = memory.close()
    if process.returncode:
        sys.exit(f"{output}\n`launcher train` ended with {process.returncode}")
    print(f"{rows} rows: {peak / 2**20:.0f} MiB at most", flush=True)
    return peak


def write_rows(folder: Path, rows: int, seed: int) -> None:
    """Write texts of two to twelve words that do not repeat (their first word is the row's number), and labels."""
    rng = np.random.default_rng(seed)
    pool = pa.array([" ".join(f"w{w}" for w in rng.integers(0, 200, rng.integers(2, 12))) for _ in range(4096)])
    folder.mkdir(parents=True)
    edges = np.linspace(0, rows, _FILES + 1).astype(int).tolist()
    for number, (begin, stop) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
        path = folder / f"{number}.parquet"
        schema = pa.schema({"text": pa.string(), "label": pa.string()})
        with pq.ParquetWriter(path, schema) as writer:
            for at in range(begin, stop, _CHUNK):
                writer.write_table(_chunk(rng, pool, at, min(stop, at + _CHUNK)).cast(schema))


def _chunk(rng: np.random.Generator, pool: pa.Array, begin: int, stop: int) -> pa.Table:
    import pyarrow.compute as pc

    ids = np.arange(begin, stop)
    number = pa.array(ids).cast(pa.string())
    texts = pc.binary_join_element_wise(number, pool.take(pa.array(rng.integers(0, len(pool), len(ids)))), " ")
    labels = pa.array(["a", "b"]).take(pa.array(ids % 2))
    return pa.table({"text": texts, "label": labels})


if __name__ == "__main__":
    sys.exit(main())
