"""Memory estimates: activations measured on fake tensors, and the stages and sizes that `auto` chooses from them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from launcher.data.rank_batches import repeat_sample
from launcher.driver.memory.activations import measure_activations, meta_model
from launcher.driver.memory.auto import resolve_auto_parallel
from launcher.driver.memory.estimate import (
    Activations,
    MemoryConfig,
    ParameterCounts,
    largest_micro_batch,
    lowest_stage,
    worker_memory,
)
from launcher.driver.prepare import prepare
from launcher.formatting import format_bytes
from launcher.tasks import build_task
from launcher.tasks.base import Task
from launcher.tasks.samples import Batch
from tests.support.jobs import make_job, write_splits

_TASKS = ("text-classification", "token-classification", "question-answering", "causal-lm", "image-classification")
_MIB = 2**20


def _profile_peak(task: Task, batch: Batch) -> int:
    """Return the peak bytes of a real forward and backward in addition to the model, with gradients."""
    model = task.build_model()
    model.train()
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True) as profile:
        batch = replace(batch, inputs={k: v if isinstance(v, bool) else v.clone() for k, v in batch.inputs.items()})
        losses = task.sample_losses(task.forward(model, batch), batch)
        (losses * batch.mask).sum().backward()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    events.sort(key=lambda event: event.start_ns())
    return int(np.cumsum([event.nbytes() for event in events]).max())


@pytest.mark.parametrize("kind", _TASKS)
def test_fake_tensors_measure_what_the_profiler_measures(
    kind: str, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    data = write_splits(tmp_path / "data", train=40, task=kind)
    length = {} if kind == "image-classification" else {"max_length": 32}
    job = prepare(make_job(tiny_models[kind], data, tmp_path, task={"type": kind, **length})).job
    task = build_task(job)
    split = prepare(job).splits["train"]
    encoded = task.encode(split.read(np.arange(8), task.input_columns + task.target_columns), True)
    batch = repeat_sample(task, encoded.samples, int(encoded.lengths.argmax()), 16, 1)
    measured = measure_activations(meta_model(job, task), task, batch, batch)
    # A real batch without padding skips the attention mask; fake tensors have no values, so the mask stays.
    assert 0.95 < measured.joint / _profile_peak(task, batch) < 1.15
    assert 0 < measured.evaluation < measured.forward <= measured.joint


def test_small_micro_batches_and_checkpointing_reduce_activations(tiny_bert: Path, tmp_path: Path) -> None:
    data = write_splits(tmp_path / "data", train=40)

    def peak(**sections: Any) -> int:
        memory = prepare(make_job(tiny_bert, data, tmp_path, **sections), measure=True).plan.memory
        assert memory is not None
        return memory.activations

    batch = {"batch_size": 40, "virtual_ranks": 2}
    whole = peak(train=batch)
    assert peak(train=batch, parallel={"micro_batch": 5}) < whole / 3
    assert peak(train={"batch_size": 40, "virtual_ranks": 8}) < whole / 3
    assert peak(train=batch, parallel={"activation_checkpointing": True}) < whole / 1.3


@pytest.mark.parametrize("parallel", [{"micro_batch": 2}, {"micro_batch": "auto"}])
def test_an_evaluation_is_cut_into_the_micro_batches_of_the_job(
    parallel: dict[str, Any], tiny_bert: Path, tmp_path: Path
) -> None:
    data = write_splits(tmp_path / "data", train=40)

    def peak(**sections: Any) -> int:
        job = make_job(tiny_bert, data, tmp_path, train={"batch_size": 16, "virtual_ranks": 8}, **sections)
        memory = prepare(job, measure=True).plan.memory
        assert memory is not None
        return memory.peak

    usual = peak(parallel=parallel)
    assert peak(parallel=parallel, evaluation={"batch_size": 8000}) == usual
    assert peak(evaluation={"batch_size": 8000}) > usual


def test_auto_takes_the_lowest_stage_and_the_largest_micro_batch_that_fit(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_splits(tmp_path / "data", train=64)
    auto = {"zero": "auto", "micro_batch": "auto"}

    def chosen(limit: float, workers: int = 4, precision: str = "fp32") -> tuple[object, object, str]:
        monkeypatch.setattr(
            "launcher.driver.memory.auto.worker_memory_limit", lambda job: None if limit == 0 else int(limit * _MIB)
        )
        job = make_job(
            tiny_bert,
            data,
            tmp_path,
            train={"batch_size": 64, "precision": precision},
            parallel=auto,
            cluster={"workers": workers},
        )
        prepared = prepare(job)
        return prepared.job.parallel.zero, prepared.plan.micro_batch, " ".join(prepared.plan.notes)

    assert chosen(1000)[:2] == (0, 16)
    zero, micro_batch, notes = chosen(0.6)
    assert zero in (1, 2, 3) and micro_batch in (1, 2, 4, 8)
    assert "the largest piece of a part that fits" in notes
    unknown = chosen(0)
    assert unknown[:2] == (0, 16) and "fits into 8.00 GiB; the workers' memory is not known here" in unknown[2]
    monkeypatch.setattr("launcher.driver.memory.auto._MODEST_BYTES", 1000)
    assert chosen(0)[:2] == (2, 16)
    assert chosen(1000, workers=1)[0] == 0
    # The lowest that keeps fp32 masters.
    assert chosen(1000, workers=1, precision="bf16")[0] == chosen(1000, precision="bf16")[0] == 1
    assert "lower parallel.micro_batch" in chosen(0.01)[2]


def test_each_zero_stage_shards_its_states() -> None:
    counts = ParameterCounts(trained=1000, frozen=500, persistent=0, buffer_bytes=8)
    activations = Activations(forward=0, backward=0, joint=4000, evaluation=0)
    sums = (1, 1, 0, 0)
    configs = [MemoryConfig(4, zero, 4, False, gradient_sums=sums[zero]) for zero in range(4)]
    by_stage = [worker_memory(counts, activations, config) for config in configs]
    assert [m.weights for m in by_stage] == [6008, 6008, 6008, 1508]  # buffers are whole everywhere
    assert [m.optimizer for m in by_stage] == [8000, 3000, 3000, 3000]  # with ZeRO's fp32 copy of the weights
    assert {m.checkpoint for m in by_stage[1:]} == {4000 + 12000}


@pytest.mark.parametrize(("zero", "shards"), [(0, 1), (2, 1), (3, 4)])
def test_a_reference_is_one_more_model_that_no_checkpoint_holds(zero: int, shards: int) -> None:
    counts = ParameterCounts(trained=1000, frozen=500, persistent=0, buffer_bytes=0)
    activations, config = Activations(forward=10, backward=10, joint=10, evaluation=10), MemoryConfig(4, zero, 2, False)
    alone = worker_memory(counts, activations, config)
    both = worker_memory(counts.model_copy(update={"reference": 1500}), activations, config)
    assert (both.weights - alone.weights, both.peak - alone.peak) == (3000 // shards, 3000 // shards)
    assert (both.checkpoint, both.copy_bytes) == (alone.checkpoint, alone.copy_bytes)


@pytest.mark.parametrize("loss", ["dpo", "kto", "orpo"])
def test_a_preference_task_is_measured_with_its_reference(
    loss: str, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    data = write_splits(tmp_path / "data", train=20, task="preference")
    task = {"type": "preference", "loss": loss, "max_length": 48}
    job = make_job(tiny_models["preference"], data, tmp_path, task=task, parallel={"zero": "auto"})
    memory = prepare(job, measure=True).plan.memory
    assert memory is not None
    parameters = sum(p.numel() for p in build_task(job).build_model().parameters())
    # One model without a reference, two with one; buffers are a few bytes.
    models = 1 if loss == "orpo" else 2
    assert memory.weights / (4 * parameters) == pytest.approx(models, rel=0.05)
    assert memory.activations > 0


def test_lowest_stage_and_largest_micro_batch() -> None:
    assert lowest_stage(range(4), lambda stage: 10 - stage, 8) == 2
    assert lowest_stage(range(4), lambda stage: 10, 8) is None and lowest_stage(range(4), lambda stage: 0, None) is None
    assert largest_micro_batch(12, lambda size: size, 4) == 3 and largest_micro_batch(12, lambda size: size, None) == 12
    assert largest_micro_batch(5, lambda size: 99, 4) == 1


def test_a_job_without_auto_is_not_measured(tiny_bert: Path, tmp_path: Path) -> None:
    data = write_splits(tmp_path / "data", train=64)
    job = make_job(tiny_bert, data, tmp_path)
    prepared = prepare(job)
    assert prepared.plan.memory is None
    assert resolve_auto_parallel(job, prepared.run, prepared.splits["train"]).job is job


def test_small_sizes_are_formatted_in_mib() -> None:
    assert [format_bytes(size) for size in (0, 3 << 20, 1 << 30)] == ["0.00 GiB", "3.00 MiB", "1.00 GiB"]
