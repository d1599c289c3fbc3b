"""Does `launcher predict` go on after a kill without losing a row, and does its memory stay flat? Runs on the client.

An input of N rows (10 million by default) of short texts, a thousandth of them without one, is made on the spot with a
tiny BERT: one file is a single row group, one has row groups of 500 rows, the rest ordinary ones. N / 100 and N / 10
rows are predicted by the command a user types, then N rows: that command and every process below it are killed
(SIGKILL) at `--kill-at` of the rows, the same command goes on, and the output is read back part by part. The resident
memory of the whole process tree (driver, Ray, workers; pages they share count several times) is sampled all along.

The last line of the output is one JSON object:
    rows            N
    growth          peak memory with N rows over that with N / 100, less 1
    growth_tenth    the same with N / 10 rows over N / 100
    rows_lost       row ids that are not in the output, or not in order
    rows_repeated   row ids that are there again
    redone_fraction rows that were done when the kill came and had to be done again, of all
    rows_per_s      by the uninterrupted part of the second command
    seconds         both commands with N rows, start and stop of Ray included
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT)]
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402  # the environment is pinned before
import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402

from tests.benchmarks.tree import PeakMemory, kill_tree  # noqa: E402
from tests.support.finished_run import finished_run  # noqa: E402

_BAD = 1000
_CHUNK = 100_000
_PROGRESS = re.compile(r"rows (\d+)/\d+ .*?([\d.]+) rows/s")
_GOES_ON = re.compile(r"resuming: (\d+) of")


@dataclass
class Command:
    """One call of `launcher predict`, and what was seen of it.

    Args:
        words: Arguments of `predict`.
        kill_at: Number of rows at which the whole tree is killed; None lets it end.
    """

    words: list[str]
    kill_at: int | None = None
    peak_bytes: int = 0
    rows_done: int = 0
    rows_resumed: int = 0
    rows_per_s: float = 0.0
    seconds: float = 0.0

    def run(self) -> "Command":
        """Run to the end, or to the kill."""
        began = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-m", "launcher", "predict", *self.words], stdout=subprocess.PIPE, text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"}, start_new_session=True,
        )  # fmt: skip
        memory = PeakMemory(process)
        assert process.stdout is not None
        for line in process.stdout:
            print("   ", line.rstrip(), flush=True)
            if progress := _PROGRESS.search(line):
                self.rows_done, self.rows_per_s = int(progress[1]), float(progress[2])
            if resumed := _GOES_ON.search(line):
                self.rows_resumed = int(resumed[1])
            if self.kill_at is not None and self.rows_done >= self.kill_at:
                kill_tree(process)
                break
        code = process.wait()
        self.peak_bytes = memory.close()
        self.seconds = time.monotonic() - began
        if code != (0 if self.kill_at is None else -signal.SIGKILL):
            raise SystemExit(f"`launcher predict` ended with {code}; a kill needs more rows than a few seconds' worth")
        return self


def write_input(folder: Path, rows: int) -> None:
    """Write rows with their ids and texts of two to five words."""
    rng = np.random.default_rng(0)
    pool = pa.array([" ".join(f"w{w}" for w in rng.integers(0, 200, rng.integers(2, 6))) for _ in range(4096)])
    folder.mkdir(parents=True)
    edges = np.linspace(0, rows, 5).astype(int).tolist()
    groups = [rows, 500, _CHUNK, _CHUNK]
    for number, (begin, stop, group) in enumerate(zip(edges[:-1], edges[1:], groups, strict=True)):
        tables = [_chunk(rng, pool, at, min(stop, at + _CHUNK)) for at in range(begin, stop, _CHUNK)]
        pq.write_table(pa.concat_tables(tables), folder / f"{number}.parquet", row_group_size=group)


def _chunk(rng: np.random.Generator, pool: pa.Array, begin: int, stop: int) -> pa.Table:
    ids = np.arange(begin, stop)
    places = pa.array(rng.integers(0, len(pool), len(ids)), mask=ids % _BAD == 7)
    return pa.table({"id": ids, "text": pool.take(places)})


def check(output: Path, rows: int) -> tuple[int, int]:
    """Return the numbers of rows lost or out of order, and repeated, read part by part in the order of their names."""
    times = np.zeros(rows, np.uint8)
    at = disorder = without = 0
    for path in sorted(output.glob("part-*.parquet")):
        for batch in pq.ParquetFile(path).iter_batches(65536, columns=["id", "prediction"]):
            ids = batch.column("id").to_numpy()
            np.add.at(times, ids, 1)
            disorder += int((ids != np.arange(at, at + len(ids))).sum())
            without += batch.column("prediction").null_count
            at += len(ids)
    summary = json.loads((output / "_SUCCESS").read_text())
    bad = len(range(7, rows, _BAD))
    if (summary["rows"], summary["skipped_rows"], without) != (rows, bad, bad):
        raise SystemExit(f"_SUCCESS says {summary}, {without} rows have no prediction; {rows} and {bad} are due")
    return max(int((times == 0).sum()), disorder), int((times > 1).sum())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--kill-at", type=float, default=0.4, help="share of the rows")
    parser.add_argument("--work", type=Path, help="where to put input and output, which are removed afterwards")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="bench-predict-", dir=options.work))
    try:
        print(json.dumps(measure(folder, options.rows, options.workers, options.kill_at)))
    finally:
        shutil.rmtree(folder)
    return 0


def measure(folder: Path, rows: int, workers: int, kill_at: float) -> dict[str, float]:
    """Run all commands in turn."""
    from tests.support.tiny_models import make_tiny_bert

    run = finished_run(
        make_tiny_bert(folder / "model"), folder / "runs", task={"max_length": 8}, data={"on_bad_row": "skip"},
        evaluation={"batch_size": 1024}, cluster={"workers": workers, "cpus_per_worker": 1.0},
    )  # fmt: skip
    peaks = []
    for size in (rows // 100, rows // 10):
        words = _words(run.uri, folder, size)
        done = Command(words).run()
        peaks.append(done.peak_bytes)
        print(f"{size} rows: {done.peak_bytes / 2**20:.0f} MiB at most, {done.seconds:.0f} s", flush=True)
        if any(check(folder / f"out-{size}", size)):
            raise SystemExit(f"{size} rows: lost or repeated some")
    words = _words(run.uri, folder, rows)
    killed = Command(words, int(rows * kill_at)).run()
    print(f"{rows} rows: killed when {killed.rows_done} were done, after {killed.seconds:.0f} s", flush=True)
    again = Command(words).run()
    peaks.append(max(killed.peak_bytes, again.peak_bytes))
    print(f"{rows} rows: {peaks[-1] / 2**20:.0f} MiB at most, {again.seconds:.0f} s more", flush=True)
    lost, repeated = check(folder / f"out-{rows}", rows)
    return {
        "rows": rows, "growth": round(peaks[2] / peaks[0] - 1, 4), "growth_tenth": round(peaks[1] / peaks[0] - 1, 4),
        "rows_lost": lost, "rows_repeated": repeated,
        "redone_fraction": round(max(0, killed.rows_done - again.rows_resumed) / rows, 5),
        "rows_per_s": again.rows_per_s, "seconds": round(killed.seconds + again.seconds, 1),
    }  # fmt: skip


def _words(run: str, folder: Path, rows: int) -> list[str]:
    write_input(folder / f"in-{rows}", rows)
    return [run, str(folder / f"in-{rows}"), "--output", str(folder / f"out-{rows}")]


if __name__ == "__main__":
    sys.exit(main())
