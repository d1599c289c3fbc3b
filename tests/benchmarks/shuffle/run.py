"""How well are rows sorted by class mixed, and what does it cost to read them so? Needs no Ray and no GPU.

Two million texts of 300 bytes, sorted by their two classes, in the row groups that pyarrow writes by itself, are read
as one data worker reads them: window after window of 32 batches of 32 rows. The peer reads the same windows by their
row ids, as was done before pools were kept; it is slow, and reads every tenth window. Pictures are counted only:
200,000 of 110 kB, sorted by 1,000 classes. The last line of the output is one JSON object:

    over_by_ids          seconds with pools kept over seconds by row ids
    one_class_windows    windows of texts that hold one class alone
    smaller_class        the smaller class's share of a window of texts, at least
    classes_of_8192      classes among 8,192 pictures that follow each other, at least
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT)]

import numpy as np  # noqa: E402  # the path is set before
import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402

from launcher.data.row_order import read_ranges, row_ranges  # noqa: E402
from launcher.data.sampler import EpochSampler  # noqa: E402
from launcher.data.splits import open_split  # noqa: E402
from launcher.data.stream import StreamSource  # noqa: E402
from launcher.data.windows import Window  # noqa: E402
from launcher.spec.job import JobSpec  # noqa: E402

_BATCH, _WINDOW = 32, 32
_COLUMNS = ("text", "label")
_COMPARED = 10


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--windows", type=int, default=440, help="how many are read, about two pools by default")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="bench-shuffle-"))
    try:
        write_texts(folder / "train.parquet", options.rows)
        figures = texts(folder, options.windows)
    finally:
        shutil.rmtree(folder)
    print(json.dumps({**figures, "classes_of_8192": pictures()}))
    return 0


def texts(folder: Path, windows: int) -> dict[str, float]:
    """Read windows both ways and count their classes."""
    split = open_split("train", [str(folder)])
    job = JobSpec.model_validate(
        {
            "name": "shuffle",
            "task": {"type": "text-classification"},
            "model": {"name": "none"},
            "data": {"train": str(folder), "window_steps": _WINDOW},
            "train": {"epochs": 1, "batch_size": _BATCH},
        }
    )
    source, seconds = StreamSource(job, {"train": split}, 1), {"pools": 0.0, "ids": 0.0}
    alone, least, compared = 0, 1.0, range(0, windows, _COMPARED)
    for index in range(windows):
        window = Window("train", 0, index, index * _WINDOW, 0, _WINDOW, batches=_WINDOW)
        begin = time.perf_counter()
        rows = read_ranges(row_ranges(source.job, split, window), _COLUMNS)
        seconds["pools"] += time.perf_counter() - begin
        if index in compared:
            begin = time.perf_counter()
            same = split.read(source.row_ids(window), _COLUMNS)
            seconds["ids"] += time.perf_counter() - begin
            if rows != same:
                sys.exit(f"window {index} differs")
        share = float(np.mean(rows.column("label").to_numpy()))
        alone += share in (0.0, 1.0)
        least = min(least, share, 1 - share)
    pools, ids = seconds["pools"] / windows, seconds["ids"] / len(compared)
    print(f"pools {pools * 1e3:.0f} ms a window, row ids {ids * 1e3:.0f} ms", flush=True)
    ratio = round(pools / ids, 3)
    return {"over_by_ids": ratio, "one_class_windows": alone, "smaller_class": round(least, 2)}


def pictures(rows: int = 200_000, classes: int = 1000) -> int:
    """Return the fewest classes among 8,192 pictures that follow each other, in row groups of 100."""
    order = EpochSampler(((100, 100 * 110_000),) * (rows // 100), "pictures", 1, 0, 8192, 64 << 20)
    return min(
        len(np.unique(order.rows_between(*order.bounds(i)) * classes // rows))
        for i in range(order.rows // order.window_rows)
    )


def write_texts(path: Path, rows: int) -> None:
    """Write random texts of 300 letters, sorted by their class."""
    dice = np.random.default_rng(0)
    with pq.ParquetWriter(path, pa.schema([("text", pa.string()), ("label", pa.int64())])) as writer:
        for begin in range(0, rows, 1 << 20):
            count = min(1 << 20, rows - begin)
            letters = dice.integers(97, 122, (count, 300), dtype=np.uint8)
            offsets = pa.py_buffer(np.arange(0, 300 * count + 1, 300, dtype=np.int32))
            cells = pa.StringArray.from_buffers(count, offsets, pa.py_buffer(letters))
            labels = np.arange(begin, begin + count) * 2 // rows
            writer.write_table(pa.table({"text": cells, "label": labels}), row_group_size=1 << 20)


if __name__ == "__main__":
    sys.exit(main())
