"""The engine: what moves while it works, and the comparison of weights across workers."""

from pathlib import Path
from typing import Any

import pytest

from tests.support.jobs import prepared_job, write_splits
from tests.support.worker_group import run_group, train_here


def _calls(job: Any) -> list[int]:
    """Forward passes counted before, after generation of 5 tokens, and at the end of training."""
    seen: list[int] = []

    def look(engine: Any) -> None:
        from launcher.models.generate import generate
        from launcher.models.pretrained import load_tokenizer

        seen.append(engine.num_forwards)
        generate(engine.model, load_tokenizer(job.job.model), [[7, 8]], 5)
        seen.append(engine.num_forwards)
        inner = engine.close

        def close() -> None:
            seen.append(engine.num_forwards)
            inner()

        engine.close = close

    train_here(job, on_engine=look)
    return seen


@pytest.mark.parametrize("model", [{}, {"lora": {"rank": 4}}], ids=["whole", "adapters"])
def test_generation_counts_as_progress(tiny_models: dict[str, Path], tmp_path: Path, model: dict[str, Any]) -> None:
    data = write_splits(tmp_path / "data", train=22, task="causal-lm")
    sections = {"task": {"type": "causal-lm", "max_length": 32}, "model": model, "train": {"max_steps": 2}}
    before, generated, trained = run_group(
        1, _calls, prepared_job(tiny_models["causal-lm"], data, tmp_path, **sections, cluster={"workers": 1})
    )
    assert generated - before == 5
    assert trained > generated


def _digests(job: Any) -> list[str]:
    """Digests of the same weights, in pieces and in one."""
    from launcher.train import engine as module

    seen: list[str] = []

    def look(engine: Any) -> None:
        for size in (100, 1 << 30):
            module._DIGESTED = size
            seen.append(engine._digest().hex())
        next(engine.model.parameters()).data.flatten()[-1] += 1.0
        seen.append(engine._digest().hex())

    train_here(job, on_engine=look)
    return seen


def test_weights_are_compared_in_pieces(tiny_bert: Path, tmp_path: Path) -> None:
    data = write_splits(tmp_path / "data", train=22)
    job = prepared_job(tiny_bert, data, tmp_path, train={"max_steps": 1}, cluster={"workers": 1})
    in_pieces, whole, other = run_group(1, _digests, job)
    assert in_pieces == whole != other
