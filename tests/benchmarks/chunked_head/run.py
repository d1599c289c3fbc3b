"""Measures the chunked cross entropy: peak memory and tokens per second of a step of SmolLM2-135M.

The same forward and backward pass, with the loss from the whole logits and by `tasks/metrics/chunked_head.py`, each in
a process of its own, in turn. Weights are random, as their values cost nothing; sizes are SmolLM2's. Prints one JSON
object on its last line. `make bench-chunked-head`; figures in ../README.md.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(_ROOT))

_STEPS = 3


def _measure(side: str, rows: int, tokens: int, labelled: float) -> dict[str, float]:
    """Train for a few steps in this process.

    Args:
        side: Way to compute the loss, `chunked` or `whole`.
        rows: Sequences of the micro-batch.
        tokens: Tokens of each sequence.
        labelled: Share of the tokens that have a label.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from launcher.tasks.metrics.chunked_head import token_outputs
    from launcher.tasks.metrics.losses import token_losses
    from launcher.tasks.samples import Batch

    torch.manual_seed(0)
    torch.set_num_threads(2)
    sizes: dict[str, Any] = {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
    }
    heads: dict[str, Any] = {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads))
    ids = torch.randint(0, 49152, (rows, tokens))
    labels = ids.roll(-1, 1)
    labels[:, : round(tokens * (1 - labelled))] = -100
    batch = Batch({"input_ids": ids, "use_cache": False}, labels, torch.ones(rows))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for _ in range(_STEPS):
        begin = time.perf_counter()
        if side == "chunked":
            loss = token_outputs("AutoModelForCausalLM", model, batch.inputs, labels)["losses"].sum()
        else:
            loss = token_losses(model(**batch.inputs).logits, labels).sum()
        loss.backward()
        seconds.append(time.perf_counter() - begin)
        del loss
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"mib": (peak - before) / 1024, "tokens_per_s": rows * tokens / statistics.median(seconds)}


def main() -> None:
    """Measure both sides in turn, or one of them in this process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", choices=("chunked", "whole"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--labelled", type=float, default=1.0)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(_measure(options.side, options.rows, options.tokens, options.labelled)))
        return
    figures = {}
    for labelled in (1.0, 0.5):
        sides: dict[str, list[dict[str, float]]] = {"whole": [], "chunked": []}
        for _ in range(options.rounds):
            for side, runs in sides.items():
                words = [sys.executable, __file__, "--side", side, "--labelled", str(labelled)]
                words += ["--rows", str(options.rows), "--tokens", str(options.tokens)]
                output = subprocess.run(words, check=True, capture_output=True, text=True).stdout
                runs.append(json.loads(output.splitlines()[-1]))
        median = {
            side: {name: statistics.median(run[name] for run in runs) for name in runs[0]}
            for side, runs in sides.items()
        }
        figures[f"labelled {labelled:g}"] = {
            "mib_whole": round(median["whole"]["mib"]),
            "mib_chunked": round(median["chunked"]["mib"]),
            "memory": round(median["chunked"]["mib"] / median["whole"]["mib"], 3),
            "speed": round(median["chunked"]["tokens_per_s"] / median["whole"]["tokens_per_s"], 3),
        }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
