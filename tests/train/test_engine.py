"""The engine: counting forward passes, and comparing weights across workers."""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.support.jobs import prepared_job, write_splits
from tests.support.worker_group import run_group, train_here


def _count_forwards(job: Any) -> list[int]:
    """Return the forward passes before and after the generation of 5 tokens, and at the end of training."""
    counts: list[int] = []

    def generate_and_count(engine: Any) -> None:
        from launcher.models.generate import generate
        from launcher.models.pretrained import load_tokenizer

        counts.append(engine.num_forwards)
        generate(engine.model, load_tokenizer(job.job.model), [[7, 8]], 5)
        counts.append(engine.num_forwards)
        inner = engine.close

        def close() -> None:
            counts.append(engine.num_forwards)
            inner()

        engine.close = close

    train_here(job, on_engine=generate_and_count)
    return counts


@pytest.mark.parametrize("model", [{}, {"lora": {"rank": 4}}], ids=["whole", "adapters"])
def test_generation_counts_as_forward_passes(
    tiny_models: dict[str, Path], tmp_path: Path, model: dict[str, Any]
) -> None:
    data = write_splits(tmp_path / "data", train=22, task="causal-lm")
    sections = {"task": {"type": "causal-lm", "max_length": 32}, "model": model, "train": {"max_steps": 2}}
    before, generated, trained = run_group(
        1, _count_forwards, prepared_job(tiny_models["causal-lm"], data, tmp_path, **sections, cluster={"workers": 1})
    )
    assert generated - before == 5
    assert trained > generated


def _digests(job: Any) -> list[str]:
    """Return digests of the same weights in pieces and as a whole, and of changed weights."""
    from launcher.train import sync_check

    digests: list[str] = []

    def digest(engine: Any) -> None:
        for size in (100, 1 << 30):
            sync_check._DIGEST_ELEMENTS = size
            digests.append(sync_check.digest_weights(engine).hex())
        next(engine.model.parameters()).data.flatten()[-1] += 1.0
        digests.append(sync_check.digest_weights(engine).hex())

    train_here(job, on_engine=digest)
    return digests


def test_digest_does_not_depend_on_the_piece_size(tiny_bert: Path, tmp_path: Path) -> None:
    data = write_splits(tmp_path / "data", train=22)
    job = prepared_job(tiny_bert, data, tmp_path, train={"max_steps": 1}, cluster={"workers": 1})
    in_pieces, whole, other = run_group(1, _digests, job)
    assert in_pieces == whole != other


def _refusal(job: Any) -> str:
    """Return what the engine says on a node whose processor has no fp16."""
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    from launcher.errors import ClusterError

    with (
        mock.patch.object(CPU_Accelerator, "is_fp16_supported", lambda _: False),
        pytest.raises(ClusterError) as caught,
    ):
        train_here(job)
    return caught.value.message


def test_a_node_without_fp16_is_refused(tiny_bert: Path, tmp_path: Path) -> None:
    data = write_splits(tmp_path / "data", train=22)
    train = {"max_steps": 1, "precision": "fp16"}
    job = prepared_job(tiny_bert, data, tmp_path, train=train, parallel={"zero": 1}, cluster={"workers": 1})
    assert run_group(1, _refusal, job) == (
        "train.precision is fp16, which takes a GPU or a processor with AVX512-FP16, and a worker's node has neither; "
        "set train.precision: bf16 or fp32"
    )
