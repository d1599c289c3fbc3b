"""What does a run of 10^10 rows in 100,000 files on 1,024 workers cost before its workers go on, and per checkpoint?

The files are real: 100,000 names of Parquet files of 100,000 rows each, which compress to nothing. The run is one that
was interrupted after 1.2 million steps: its log has as many lines, its newest checkpoint the files of 1,024 workers.
Measured in a fresh process, imports apart: all that `train` does with it before workers start, what is sent to them,
what rank 0 and the stream do before the first window is read, and what rank 0 does to complete the next checkpoint.
No model is trained and no row is read but those that are tried first.
"""

import argparse
import json
import os
import pickle
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

_ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(_ROOT)]

from launcher.rundir.records import TrainerState  # noqa: E402
from launcher.spec.job import JobSpec  # noqa: E402
from tests.support.jobs import example_table, make_job  # noqa: E402

_LINKS = 50_000  # a file of ext4 may have 65,000 names
_LABELS = ("down", "up")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--rows", type=int, default=100_000, help="of each file")
    parser.add_argument("--workers", type=int, default=1024)
    parser.add_argument("--resume", metavar="FOLDER", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.resume:
        print(json.dumps(resume(Path(options.resume), options.workers)))
        return
    with tempfile.TemporaryDirectory() as folder:
        write_data(Path(folder), options.files, options.rows)
        command = [sys.executable, __file__, "--workers", str(options.workers), "--resume", folder]
        begun(Path(folder), options.workers)
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    details = json.loads(output.splitlines()[-1])
    print(json.dumps({"details": details}))
    seconds = sum(value for name, value in details.items() if name.endswith("_s") and name != "checkpoint_s")
    facts = {
        "seconds": round(seconds, 2),
        "peak_gib": round(details["peak_gib"], 2),
        "checkpoint_s": round(details["checkpoint_s"], 2),
        "files": options.files,
        "rows": options.files * options.rows,
        "workers": options.workers,
    }
    print(json.dumps(facts))


def write_data(folder: Path, files: int, rows: int) -> None:
    """Write the training data, and a model for it."""
    from tests.support.tiny_models import make_tiny_bert

    make_tiny_bert(folder / "model")
    half = rows // 2
    table = pa.table({"text": ["w1 w2 w3"] * rows, "label": [_LABELS[0]] * half + [_LABELS[1]] * (rows - half)})
    for number in range(files):
        path = folder / f"train/{number // 1000:03d}/part-{number:06d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        if number % _LINKS == 0:
            pq.write_table(table, path, compression="zstd")
            first = path
        else:
            os.link(first, path)
    pq.write_table(example_table(1000), folder / "validation.parquet")


def job_of(folder: Path, workers: int) -> JobSpec:
    """Return the job; the class names stand in it, or a first command would read all rows for them, once."""
    data = {"train": str(folder / "train"), "window_steps": 64}
    return make_job(
        folder / "model", data, folder / "runs", name="scale", task={"labels": list(_LABELS)},
        train={"batch_size": 8 * workers, "epochs": 3}, cluster={"workers": workers},
    )  # fmt: skip


def _state(step: int) -> TrainerState:
    return TrainerState(
        step=step, skipped_rows=0, elapsed_s=1.0, best_step=None, best_value=None, evaluations_without_improvement=0
    )


def begun(folder: Path, workers: int) -> None:
    """Write the run as its interruption left it."""
    from launcher.driver.prepare import prepare
    from launcher.rundir.records import FileEntry, ManifestRecord, StepRecord
    from launcher.spec.curve import spec_hash
    from launcher.spec.loader import dump_job
    from launcher.train.checkpoint import catalog

    prepared = prepare(job_of(folder, workers), measure=True)  # reads the footers
    run, step = prepared.run, prepared.plan.steps_per_epoch - 1000
    run.write_bytes("job.yaml", dump_job(prepared.job).encode())
    run.write_record("plan.json", prepared.plan)
    line = StepRecord(
        step=0, epoch=1, loss=0.6985800564289093, learning_rate=5e-5, grad_norm=1.0136091709136963,
        samples=8 * workers, skipped_rows=0, samples_per_s=1169.069, elapsed_s=2.7373987,
    ).model_dump_json()  # fmt: skip
    with open(run.path("metrics.jsonl"), "w") as stream:
        stream.writelines(line.replace('"step":0', f'"step":{n}') + "\n" for n in range(1, step + 500))
    entries = [FileEntry(path=f"{r:05d}/{kind}.pt", size_bytes=1, sha256="0" * 64)
               for r in range(workers) for kind in ("optimizer", "rest")]  # fmt: skip
    for entry in entries:
        run.write_bytes(f"{catalog.checkpoint_dir(step)}/attempt-000001/{entry.path}", b"0")
    state = _state(step)
    run.write_record(f"{catalog.checkpoint_dir(step)}/attempt-000001/state.json", state)
    manifest = ManifestRecord(step=step, world_size=workers, zero=2, spec_hash=spec_hash(prepared.job),
                              files=tuple(entries))  # fmt: skip
    run.write_record(f"{catalog.checkpoint_dir(step)}/attempt-000001/manifest.json", manifest)


def resume(folder: Path, workers: int) -> dict[str, float]:
    """Return the seconds of each part, and the peak of this process."""
    from launcher.data.checks import check_first_rows
    from launcher.data.rank_batches import BatchLayout, cut_into_parts
    from launcher.data.stream import StreamSource
    from launcher.data.windows import TRAIN, stream_segments
    from launcher.driver.preflight import check_resumable
    from launcher.driver.prepare import prepare
    from launcher.rundir import metrics_log
    from launcher.rundir.lease import Lease
    from launcher.rundir.records import FileEntry
    from launcher.train.checkpoint import catalog
    from launcher.train.checkpoint.writer import CheckpointWriter, PartRecord, _PendingSave
    from launcher.train.worker_config import WorkerConfig

    seconds: dict[str, float] = {}

    @contextmanager
    def timed(name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        seconds[f"{name}_s"] = time.perf_counter() - began

    job = job_of(folder, workers)
    few = make_job(folder / "model", {"train": str(folder / "validation.parquet")}, folder / "few")
    prepare(few, measure=True)  # imports what any job imports; `make bench-start` has those
    with timed("prepare"):
        prepared = prepare(job, measure=True)
    run, plan = prepared.run, prepared.plan
    with timed("check_run"):
        check_resumable(prepared)
    with timed("try_rows"):
        check_first_rows(prepared.job, prepared.splits, 64)
    with timed("checkpoint_found"):
        step = catalog.latest_step(run)
        assert step == plan.steps_per_epoch - 1000 and catalog.find_corruption(run, step) is None
        lease = Lease.acquire(run)
    with timed("sent"):
        sent = pickle.dumps(
            WorkerConfig(run, prepared.job, plan, prepared.splits, resume_step=step, lease=lease), protocol=5
        )
        pickle.loads(sent)
    with timed("log_cut"):
        metrics_log.truncate_after(run, step)
    with timed("first_window"):
        source = StreamSource(prepared.job, prepared.splits, workers)
        pieces = stream_segments(TRAIN, (plan.train_rows,), plan, prepared.job, step)
        window = next(pieces)[0]
        ids = source.row_ids(window)
        lengths = np.zeros(len(ids), np.int64)
        batch = np.arange(plan.batch_size)
        cut_into_parts(batch, lengths, BatchLayout(workers, prepared.job.virtual_ranks, None), lengths)
        assert next(pieces)
    engine = cast(Any, SimpleNamespace(rank=0, world_size=workers, zero=2))
    saver = CheckpointWriter(run, prepared.job, engine, lease)
    state = _state(step + 1)
    for rank in range(workers):
        part = PartRecord(rank=rank, files=(FileEntry(path=f"{rank:05d}/all.pt", size_bytes=1, sha256="0" * 64),))
        run.write_record(f"{saver._files_dir(state)}/parts/rank-{rank:05d}.json", part)
    with timed("checkpoint"):
        saver._complete(_PendingSave(state))
    assert catalog.latest_step(run) == step + 1
    catalog.remove(run, step + 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {**seconds, "sent_mib": len(sent) / 2**20, "peak_gib": peak}


if __name__ == "__main__":
    main()
