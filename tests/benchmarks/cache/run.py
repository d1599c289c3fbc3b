"""What does `data.cache` bring? Seconds for the windows of an epoch, without it, as it is filled, and out of it.

Pictures (MNIST, 8,002 files of 28 x 28 made 224 x 224 for a ViT) and short texts (SST-2, 6,920 sentences, MiniLM's
tokenizer), from ../shared, in turn, in this process; the epoch out of the cache is the second one, whose windows hold
other rows. `make bench-cache`; figures in ../README.md. Runs on the client; needs no GPU.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.update(DS_ACCELERATOR="cpu", HF_HUB_OFFLINE="1")
ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT)]

from launcher.data import encoded_cache  # noqa: E402
from launcher.data.stream import StreamSource  # noqa: E402
from launcher.data.windows import train_windows  # noqa: E402
from launcher.driver.prepare import PreparedJob, prepare  # noqa: E402
from tests.support.jobs import make_job  # noqa: E402  # the environment is pinned before

_DATA = ROOT.parent / "shared" / "data"
_ROUNDS = 3


def main() -> None:
    """Measure both kinds, several rounds each."""
    from tests.support.tiny_models import make_tiny_vit

    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        vit = make_tiny_vit(folder / "vit", size=224)
        kinds: dict[str, tuple[Path, Path, dict[str, Any]]] = {
            "pictures": (vit, _DATA / "image-classification/mnist_10k/train.parquet", {"type": "image-classification"}),
            "texts": (
                ROOT / "data/quickstart/model",
                _DATA / "text-classification/sst2/train.parquet",
                {"max_length": 128},
            ),
        }
        for kind, (model, data, task) in kinds.items():
            rounds = [_round(folder / f"{kind}-{number}", model, data, task) for number in range(_ROUNDS)]
            for name in ("first_over_plain", "again_over_plain"):
                figures[f"{kind}_{name}"] = round(statistics.median(ratios[name] for ratios in rounds), 3)
    print(json.dumps(figures))


def _round(folder: Path, model: Path, data: Path, task: dict[str, Any]) -> dict[str, float]:
    sections = {"task": task, "train": {"epochs": 2, "batch_size": 32}, "parallel": {"zero": 0}}
    plain = prepare(make_job(model, {"train": str(data)}, folder, **sections))
    cache = {"path": str(folder / "cache")}
    cached = prepare(make_job(model, {"train": str(data), "cache": cache}, folder, **sections))
    usual, first, again = _epoch(plain, 0), _epoch(cached, 0), _epoch(cached, 1)
    print(f"{folder.name}: {usual:.2f} s without, {first:.2f} s as it fills, {again:.2f} s out of it", flush=True)
    return {"first_over_plain": first / usual, "again_over_plain": again / usual}


def _epoch(prepared: PreparedJob, epoch: int) -> float:
    """Return the seconds for an epoch's windows."""
    encoded_cache._entry.cache_clear()  # as in another process
    source = StreamSource(prepared.job, prepared.splits, 2)
    source.task(for_evaluation=False)
    started = time.perf_counter()
    for window in train_windows(prepared.plan, prepared.job, 0):
        if window.kind == "train" and window.epoch == epoch:
            list(source.read(window))
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
