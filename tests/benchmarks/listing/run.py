"""What does opening a split of 100,000 files cost, the first time and again? And in an object store?

Tiny Parquet files of three rows, opened as `check` and `train` do (list, footers, schema, fingerprint), each time in a
fresh process; the second one finds the footers in the cache. The page cache is warm both times. Where moto's S3 server
is installed (`make moto`), 2,000 of the files are opened there too, with several numbers of threads; the server is a
Python process on the same cores, so its figures say what threads are worth, and nothing of S3.
"""

import argparse
import json
import os
import pickle
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

_ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(_ROOT)]

from launcher.data import footers  # noqa: E402
from launcher.data.convert import splittable_files  # noqa: E402
from launcher.data.sampler import EpochSampler  # noqa: E402
from launcher.data.splits import open_files  # noqa: E402
from tests.support.s3 import clean_environment, s3_server, server_command, upload  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--remote", type=int, default=2_000)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--open", nargs=3, metavar=("LOCATION", "CACHE", "THREADS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.open:
        print(json.dumps(open_once(*options.open)))
        return
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), options.files)
        rounds = [in_turn(folder + "/data", f"{folder}/cache/{n}.arrow", os.environ) for n in range(options.rounds)]
        first, cached = (statistics.median(pair[i]["seconds"] for pair in rounds) for i in (0, 1))
        print(json.dumps({"details": rounds[-1]}))
        if server_command() is not None:
            print(json.dumps({"remote": remote(Path(folder), options.remote)}))
    facts = {
        "cached_over_first": round(cached / first, 3),
        "files": options.files,
        "seconds_first": round(first, 2),
        "seconds_cached": round(cached, 2),
        "peak_gib": round(max(opening["peak_gib"] for pair in rounds for opening in pair), 2),
    }
    print(json.dumps(facts))


def write(folder: Path, files: int) -> None:
    """Write one file, and copies of it with another number in the name."""
    (folder / "data").mkdir()
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": ["a", "b", "c"], "label": [0, 1, 0]}), sink)
    content = sink.getvalue().to_pybytes()
    for number in range(files):
        with open(folder / f"data/part-{number:06d}.parquet", "wb") as stream:
            stream.write(content)


def in_turn(
    location: str, cache: str, environment: "os._Environ[str] | dict[str, str]", threads: int = 0
) -> list[dict]:
    """Open the files twice, each time in a process of its own."""
    command = [sys.executable, __file__, "--open", location, cache, str(threads)]
    return [
        json.loads(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)
        for _ in range(2)
    ]


def open_once(location: str, cache: str, threads: str) -> dict[str, float]:
    """Return the seconds of one opening, and what travels to workers afterwards."""
    if int(threads):
        footers._THREADS = footers._REMOTE_THREADS = int(threads)
    began = time.perf_counter()
    files = splittable_files("train", [location], "auto", "nowhere")
    listed = time.perf_counter()
    split = open_files("train", files, cache)
    opened = time.perf_counter()
    sent = pickle.dumps(split, protocol=5)
    pickle.loads(sent)
    pickled = time.perf_counter()
    fragments = split.fragments
    sizes = tuple(zip(fragments.rows.tolist(), fragments.size_bytes.tolist(), strict=True))
    order = EpochSampler(sizes, split.fingerprint, 0, 0, 32 * 32, 64 << 20)
    order.rows_between(*order.bounds(0))
    ordered = time.perf_counter()
    return {
        "seconds": opened - began,
        "listing_s": listed - began,
        "pickle_s": pickled - opened,
        "pickle_mib": len(sent) / 2**20,
        "order_s": ordered - pickled,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def remote(folder: Path, files: int) -> dict[str, float]:
    """Return the seconds on the server by number of threads, and again with the cache there."""
    (folder / "some").mkdir()
    for number in range(files):
        os.link(folder / f"data/part-{number:06d}.parquet", folder / f"some/part-{number:06d}.parquet")
    seconds: dict[str, float] = {"files": files}
    with s3_server("bench") as address:
        upload(address, folder / "some", "bench/data")
        for threads in (8, 16, 64):
            cache = f"s3://bench/cache-{threads}.arrow"
            first, again = in_turn("s3://bench/data", cache, clean_environment(address), threads)
            seconds[f"first_{threads}_threads_s"], seconds["cached_s"] = first["seconds"], again["seconds"]
    return seconds


if __name__ == "__main__":
    main()
