"""Packing against padding: real tokens per second of the same samples in the same global batches, and the same curve.

Runs the launcher's own loop in two gloo processes, packed and padded in turn, several rounds; prints the medians as one
JSON object on its last line. `make bench-packing`; figures in ../README.md.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(_ROOT)]
os.environ.update(DS_ACCELERATOR="cpu", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

_DATA = _ROOT.parent / "shared" / "data" / "instruction-sft" / "alpaca_en" / "train.parquet"
_WARM_STEPS = 3


def _job(data: Path, storage: str, packing: bool, grouped: bool, steps: int) -> Any:
    from launcher.driver.prepare import prepare
    from launcher.spec.job import JobSpec

    shape = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 4}
    return prepare(
        JobSpec.model_validate(
            {
                "name": f"{'packed' if packing else 'padded'}-{'grouped' if grouped else 'plain'}",
                "task": {"type": "causal-lm", "messages": "messages", "max_length": 512, "packing": packing},
                "model": {"from_config": {"model_type": "llama", "vocab_size": 4096, **shape}},
                "data": {"train": str(data), "group_by_length": grouped},
                "train": {"batch_size": 32, "max_steps": steps, "learning_rate": 1e-3, "log_every_steps": 1000},
                "cluster": {"workers": 2},
                "checkpoint": {"every_minutes": None},
                "output": {"storage": storage},
            }
        )
    )


def _measure(prepared: Any) -> dict[str, Any]:
    """Return tokens per second behind the first steps, and every step's loss. In a worker."""
    from launcher.train import loop

    marks: list[float] = []
    tokens: list[int] = []
    step = loop.train_step

    def timed(ctx: Any, share: Any, number: int, lr: float) -> Any:
        result = step(ctx, share, number, lr)
        marks.append(time.perf_counter())
        tokens.append(sum(len(row) for table in share.micro_batches for row in table.column("input_ids")))
        return result

    loop.train_step = timed  # type: ignore[assignment]  # the loop is measured, not changed
    from tests.support.worker_group import train_here

    lines = train_here(prepared)["lines"]
    seconds = marks[-1] - marks[_WARM_STEPS - 1]
    return {"tokens_per_s": 2 * sum(tokens[_WARM_STEPS:]) / seconds, "losses": [loss for _, loss in lines]}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--data", type=Path, default=_DATA)
    options = parser.parse_args()
    from tests.support.worker_group import run_group

    sides = {"packed": (True, True), "padded": (False, False), "padded_grouped": (False, True)}
    speeds: dict[str, list[float]] = {side: [] for side in sides}
    losses: dict[str, list[float]] = {}
    for number in range(options.rounds):
        for side, (packing, grouped) in sides.items():
            with tempfile.TemporaryDirectory() as storage:
                measured = run_group(2, _measure, _job(options.data, storage, packing, grouped, options.steps))
            speeds[side].append(measured["tokens_per_s"])
            losses[side] = measured["losses"]
            print(f"round {number + 1}  {side:<15} {measured['tokens_per_s']:8.0f} tokens/s", flush=True)
    median = {side: statistics.median(values) for side, values in speeds.items()}
    apart = max(abs(a - b) for a, b in zip(losses["packed"], losses["padded_grouped"], strict=True))
    figures = {
        "over_padding": round(median["packed"] / median["padded"], 3),
        "over_padding_grouped": round(median["packed"] / median["padded_grouped"], 3),
        "largest_loss_difference": apart,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
