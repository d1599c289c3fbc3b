"""Does our training curve depend on the batch of one device? The launcher's side of `peers.py`. Needs no GPU.

Trains the launcher's own loop in plain processes, without Ray: multiple negatives with MiniLM on MedQuAD, and KTO of
SmolLM2-135M with LoRA, with the same global batches cut into micro-batches of several sizes, on one to three workers.
`make bench-coupled` runs it. The last line of the output is one JSON object: for each cut the largest difference of a
step's loss from the whole batch on one worker.
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(_ROOT)]
os.environ.update(DS_ACCELERATOR="cpu", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

_DATA = _ROOT.parent / "shared" / "data" / "retrieval" / "medquad" / "train.parquet"
_JOBS: dict[str, tuple[dict[str, Any], dict[str, Any], str, dict[str, Any]]] = {
    "mnrl": (
        {"type": "sentence-embedding", "query": "query", "positive": "positive", "scale": 20, "max_length": 64},
        {"name": str(_ROOT / "data" / "quickstart" / "model"), "dropout": 0.0},
        str(_DATA),
        {"batch_size": 64, "learning_rate": 1e-4, "max_steps": 4},
    ),
    "kto": (
        {"type": "preference", "loss": "kto", "beta": 0.1, "max_length": 128},
        {"name": str(_ROOT / "data" / "smollm2"), "lora": {"rank": 16, "alpha": 32.0}},
        str(_ROOT / "data" / "preference" / "kto" / "train.parquet"),
        {"batch_size": 8, "learning_rate": 5e-4, "max_steps": 3},
    ),
}
_CUTS = ((1, 0, None), (1, 0, 4), (1, 0, 1), (2, 2, 4), (3, 2, None), (3, 3, 1))
"""Workers, ZeRO stage and micro-batch; the first is what the others are compared with."""


def _curve(job: dict[str, Any]) -> list[float]:
    from launcher.driver.prepare import prepare
    from launcher.spec.job import JobSpec
    from tests.support.worker_group import train_curve

    return train_curve(prepare(JobSpec.model_validate(job)))


def main() -> None:
    """Train every job with every cut, and print the differences."""
    from tests.support.worker_group import run_group

    figures: dict[str, dict[str, Any]] = {}
    for name, (task, model, data, train) in _JOBS.items():
        figures[name] = {}
        reference: list[float] = []
        for workers, zero, micro_batch in _CUTS:
            with tempfile.TemporaryDirectory() as storage:
                job = {
                    "name": name,
                    "task": task,
                    "model": model,
                    "data": {"train": data, "group_by_length": False},
                    "train": {**train, "log_every_steps": 1},
                    "parallel": {"zero": zero, "micro_batch": micro_batch},
                    "checkpoint": {"every_minutes": None},
                    "cluster": {"workers": workers},
                    "output": {"storage": storage},
                }
                losses = run_group(workers, _curve, job)
            reference = reference or losses
            difference = max(abs(own - other) for own, other in zip(losses, reference, strict=True))
            cut = f"{workers} workers, ZeRO {zero}, micro-batch {micro_batch or 'whole'}"
            print(name, cut, [round(loss, 6) for loss in losses], f"{difference:.1e}", flush=True)
            figures[name][cut] = difference
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
