"""Memory that the plan predicts beside memory that training uses: six models, ZeRO 0 to 3, two workers.

`make bench-plan-memory` prints a table and, as its last line, one JSON object. Used is the peak of the bytes that the
CPU allocator of torch has given out, from before the engine is built to the end of the third step, by the profiler:
what `torch.cuda.max_memory_allocated` counts on a GPU.
"""

import gc
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

os.environ.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
_TESTS = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(_TESTS.parent)]

_STEPS = 3
_TEXT, _LM, _IMAGE = "text-classification", "causal-lm", "image-classification"
_VOCABULARY = 30_522  # BERT's; GPT-2's is larger still, and so are its logits
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "bert-mini": (_TEXT, {"batch_size": 16}, {
        "model_type": "bert", "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
        "intermediate_size": 1024, "vocab_size": _VOCABULARY, "max_position_embeddings": 128,
    }),
    "minilm": (_TEXT, {"batch_size": 16}, {
        "model_type": "bert", "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12,
        "intermediate_size": 1536, "vocab_size": _VOCABULARY, "max_position_embeddings": 128,
    }),
    "distilbert": (_TEXT, {"batch_size": 8}, {
        "model_type": "distilbert", "dim": 768, "n_layers": 4, "n_heads": 12, "hidden_dim": 3072,
        "vocab_size": _VOCABULARY, "max_position_embeddings": 128,
    }),
    "gpt2": (_LM, {"batch_size": 8}, {
        "model_type": "gpt2", "n_embd": 384, "n_layer": 6, "n_head": 6, "vocab_size": 50_257, "n_positions": 128,
    }),
    "vit": (_IMAGE, {"batch_size": 8}, {
        "model_type": "vit", "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6,
        "intermediate_size": 1536, "image_size": 112, "patch_size": 16,
    }),
    "resnet": (_IMAGE, {"batch_size": 8}, {"model_type": "resnet"}),
}  # fmt: skip


def patient(wait: Any) -> Any:
    """Return a wait that lets gloo's threads drop their tensors first: the profiler sees what this thread frees."""
    if getattr(wait, "patient", False):
        return wait

    def then(*args: Any) -> Any:
        done = wait(*args)
        time.sleep(0.002)
        return done

    then.patient = True  # type: ignore[attr-defined]
    return then


def used(prepared: Any) -> dict[str, int]:
    """Return the peak bytes of this worker."""
    import torch
    import torch.distributed as dist

    from launcher.data.stream import ShardStream
    from launcher.tasks import build_task
    from launcher.train.engine import Engine
    from launcher.train.loop import forward_backward
    from tests.support.worker_group import share_cells

    task = build_task(prepared.job)
    gc.collect()
    cpu = torch.profiler.ProfilerActivity.CPU
    dist.Work.wait = patient(dist.Work.wait)
    with torch.profiler.profile(activities=[cpu], profile_memory=True) as profile:
        engine = Engine(prepared.job, task, prepared.plan.micro_batch)
        engine.train_mode()
        stream = ShardStream(share_cells(prepared, dist.get_world_size(), dist.get_rank(), 0))
        for step, _, share in stream.steps():
            if step == _STEPS:
                break
            forward_backward(engine, task, share.parts, share.global_batch, step)
            engine.step(1e-4, step)
    engine.close()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return {"peak": int(np.cumsum([event.nbytes() for event in events]).max())}


def jobs(folder: Path, names: list[str]) -> Any:
    """Yield model, stage and job of every case."""
    from tests.support.jobs import example_table, make_job
    from tests.support.tiny_models import make_tiny_bert, make_tiny_gpt, make_tiny_vit

    rng = np.random.default_rng(0)
    texts = [" ".join(f"w{w}" for w in rng.integers(0, 200, 200)) for _ in range(64)]
    pq.write_table(pa.table({"text": texts, "label": ["a", "b"] * 32}), folder / "text.parquet")
    pq.write_table(example_table(64, 0, _IMAGE), folder / "image.parquet")
    bases = {_TEXT: make_tiny_bert(folder / "bert"), _LM: make_tiny_gpt(folder / "gpt"), _IMAGE: None}
    for name in names:
        kind, train, config = MODELS[name]
        data = {"train": str(folder / ("image.parquet" if kind == _IMAGE else "text.parquet"))}
        task = {"type": kind} | ({} if kind == _IMAGE else {"max_length": 128})
        base = bases[kind] or make_tiny_vit(folder / "vit", size=112)
        for zero in range(4):
            yield name, zero, make_job(
                base, data, folder / "runs", name=f"{name}-{zero}", task=task, train={**train, "epochs": 1},
                model={"name": "" if kind != _IMAGE else str(base), "from_config": config},
                parallel={"zero": zero, "micro_batch": 2 if zero % 2 else None},
            )  # fmt: skip


def main() -> None:
    """Run all models, or those named on the command line."""
    from launcher.driver.prepare import prepare
    from tests.support.worker_group import run_group

    names = sys.argv[1:] or list(MODELS)
    errors = []
    print(f"{'model':<12}{'ZeRO':>5}{'micro':>6}{'parameters':>12}{'predicted MB':>14}{'used MB':>10}{'error':>8}")
    with tempfile.TemporaryDirectory() as folder:
        for name, zero, job in jobs(Path(folder), names):
            prepared = prepare(job, measure=True)
            plan = prepared.plan
            assert plan.memory is not None, plan.notes
            peak = run_group(2, used, prepared)["peak"]
            errors.append(plan.memory.peak / peak - 1)
            print(
                f"{name:<12}{zero:>5}{plan.micro_batch:>6}{plan.parameters:>12,}{plan.memory.peak / 1e6:>14.1f}"
                f"{peak / 1e6:>10.1f}{errors[-1]:>8.1%}",
                flush=True,
            )
    print(json.dumps({
        "worst_over": round(max(0.0, *errors), 4), "worst_under": round(max(0.0, *(-e for e in errors)), 4),
        "cases": len(errors),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
