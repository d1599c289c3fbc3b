"""Packing against padding for an encoder: real tokens per CPU second of forward and backward passes, on one thread.

MiniLM-L6 as a masked language model on SST-2, in one process without Ray or an optimizer: batches as the stream cuts
them, packed, padded, and padded after grouping by length, in turn. CPU seconds and not wall time, so that other work on
the machine counts little. `make bench-packing-encoder`; figures in ../README.md.
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(_ROOT)]
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")

_DATA = _ROOT.parent / "shared" / "data" / "text-classification" / "sst2" / "train.parquet"
_MODEL = _ROOT / "data" / "quickstart" / "model"
_BATCH, _PARTS = 32, 8


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", type=int, default=4)
    asked = parser.parse_args()

    import numpy as np
    import pyarrow.parquet as pq

    from launcher.data.rank_batches import BatchLayout, build_shard, cut_into_parts
    from launcher.spec.model import ModelSpec
    from launcher.tasks.masked_lm import MaskedLM, MaskedParams

    task = MaskedLM(MaskedParams(packing=True), ModelSpec(name=str(_MODEL), dropout=0.0), 0)
    model = task.build_model().train()
    encoded = task.encode(pq.read_table(_DATA).slice(0, _BATCH * asked.batches), True)
    lengths = encoded.lengths
    rows = np.arange(len(lengths))
    shuffled = np.split(rows, asked.batches)
    grouped = np.split(np.argsort(-lengths, kind="stable"), asked.batches)
    sides = {"packed": (grouped, task.pack_length), "padded": (shuffled, None), "padded_grouped": (grouped, None)}

    def run(batches: list[np.ndarray], pack_length: int | None) -> tuple[float, float]:
        """Return real tokens per CPU second, and the sum of the losses."""
        layout = BatchLayout(1, _PARTS, None, pack_length)
        parts = [cut_into_parts(batch, lengths, layout, np.zeros(len(rows), np.int64)) for batch in batches]
        table, _ = build_shard(encoded, rows, batches, parts, 0, layout)
        begin, total = time.process_time(), 0.0
        keys = list(zip(table["__step"].to_pylist(), table["__micro"].to_pylist(), strict=True))
        for key in sorted(set(keys)):
            batch = task.collate(table.take([i for i, own in enumerate(keys) if own == key]))
            loss = task.sample_losses(task.forward(model, batch), batch).sum()
            loss.backward()
            total += float(loss.detach())
        model.zero_grad()
        return int(lengths.sum()) / (time.process_time() - begin), total

    speeds: dict[str, list[float]] = {side: [] for side in sides}
    losses: dict[str, float] = {}
    run(*sides["padded"])
    for _ in range(asked.rounds):
        for side, (batches, pack_length) in sides.items():
            speed, losses[side] = run(batches, pack_length)
            speeds[side].append(speed)
            print(f"{side:<15} {speed:8.0f} tokens/s", flush=True)
    median = {side: statistics.median(values) for side, values in speeds.items()}
    figures = {
        "over_padding": round(median["packed"] / median["padded"], 3),
        "over_padding_grouped": round(median["packed"] / median["padded_grouped"], 3),
        "relative_loss_difference": abs(losses["packed"] / losses["padded_grouped"] - 1),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
