"""The promise for every task: packed, with adapters, with BatchNorm, on other workers, stages and after a stop."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launcher.driver.prepare import PreparedJob
from tests.support.jobs import prepared_job, write_splits
from tests.support.tiny_models import make_tiny_bloom, make_tiny_opt, make_tiny_resnet
from tests.support.worker_group import run_group, train_curve, train_here, train_losses, with_job

_SYNC: dict[str, Any] = {"model": {"batch_norm": "trained"}}
_LORA: dict[str, Any] = {"model": {"lora": {"rank": 4}}, "train": {"learning_rate": 3e-2, "max_steps": 20}}
# At a larger learning rate language models are chaotic: differences of the last bit double with every step.
_GENTLE_LORA: dict[str, Any] = {**_LORA, "train": {"learning_rate": 5e-3}}
_STEPS = 10
_PACKED = {"max_length": 48, "packing": True}
_AUGMENT = {"flip_fraction": 0.5, "crop_scale_min": 0.6, "rotate_degrees": 5}

# Name -> task, its parameters, other sections.
_CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "text-lora": ("text-classification", {"max_length": 32}, _LORA),
    "token-packed": ("token-classification", _PACKED, {}),
    "token-lora": ("token-classification", {"max_length": 32}, _LORA),
    # Rows of one to four windows.
    "question": ("question-answering", {"max_length": 32, "doc_stride": 8}, {"train": {"learning_rate": 1e-2}}),
    "causal-packed": ("causal-lm", _PACKED, {}),
    # At a larger learning rate this one is chaotic: differences of the last bit double with every step.
    "causal-packed-lora": ("causal-lm", _PACKED, {**_LORA, "train": {"learning_rate": 5e-3}}),
    # Their weights and embeddings are read by other layers than their own, which ZeRO-3 has to be told.
    "causal-packed-dora-tokens": (
        "causal-lm",
        _PACKED,
        {
            "model": {"lora": {"rank": 4, "dora": True, "rank_stabilized": True}, "add_tokens": ["w5", "w7 w8"]},
            "train": {"learning_rate": 5e-3, "max_steps": 16},
        },
    ),
    "causal-packed-opt": ("causal-lm", _PACKED, {"train": {"learning_rate": 1e-3}}),
    "causal-packed-opt-lora": ("causal-lm", _PACKED, {**_LORA, "train": {"learning_rate": 5e-3}}),
    "seq2seq": ("seq2seq", {"max_target_length": 16}, {}),
    "seq2seq-lora": ("seq2seq", {"max_target_length": 16}, {**_LORA, "train": {"learning_rate": 5e-3}}),
    "masked": ("masked-lm", {"max_length": 32}, {}),
    "masked-packed-lora": ("masked-lm", _PACKED, {**_LORA, "train": {"learning_rate": 5e-3}}),
    "embedding": ("sentence-embedding", {"max_length": 32, "symmetric": True}, {}),
    # Some gradients of an order of scores cancel to the noise of fp32. Adam divides it by itself, and with its usual
    # epsilon of 1e-8 the curves part after a step (SGD shows the same 1e-6 as this one).
    "embedding-cosent": (
        "sentence-embedding",
        {"max_length": 32, "loss": "cosent", "text_a": "query", "text_b": "positive"},
        {"train": {"learning_rate": 1e-3, "optimizer": {"type": "adamw", "eps": 1e-4}}},
    ),
    "reranking": ("reranking", {"max_length": 32}, {}),
    "preference-dpo": ("preference", {"loss": "dpo", "max_length": 48}, {}),
    "preference-dpo-lora": ("preference", {"loss": "dpo", "max_length": 48, "beta": 0.5}, _GENTLE_LORA),
    "preference-orpo": ("preference", {"loss": "orpo", "max_length": 48}, {}),
    "preference-kto": ("preference", {"loss": "kto", "max_length": 48, "beta": 0.5}, {}),
    "preference-kto-lora": ("preference", {"loss": "kto", "max_length": 48, "beta": 0.5}, _GENTLE_LORA),
    "reward": ("reward", {"max_length": 48}, {}),
    "image-vit": ("image-classification", {"augment": _AUGMENT}, {}),
    "image-resnet-frozen": ("image-classification", {}, {}),
    "image-resnet-trained": ("image-classification", {}, _SYNC),
}


@pytest.fixture
def job(request: pytest.FixtureRequest, tiny_models: dict[str, Path], tmp_path: Path) -> PreparedJob:
    task, params, sections = _CASES[request.param]
    model = tiny_models[task]
    if "resnet" in request.param:
        model = make_tiny_resnet(tmp_path / "resnet")
    if "opt" in request.param:
        model = make_tiny_opt(tmp_path / "opt", model)
    # Adapters learn more slowly.
    rows = 131 if sections is _LORA else 71
    data = write_splits(tmp_path / "data", train=rows, row_group=37, task=task)
    train = {"max_steps": _STEPS, "epochs": 2, "learning_rate": 3e-3, **sections.get("train", {})}
    return prepared_job(model, data, tmp_path, **{**sections, "task": {"type": task, **params}, "train": train})


# One stage each in `make test`: 3 gathers the weights of every kind of layer, 2 adds gradients as for any model.
_STAGE_2 = {
    "token-packed", "question", "causal-packed", "masked", "embedding-cosent", "reranking", "preference-orpo",
    "preference-kto", "reward", "image-resnet-frozen",
}  # fmt: skip


def _cases(*names: str, long: tuple[str, ...] = ()) -> pytest.MarkDecorator:
    """Run a test with the named cases, and in `make test-all` with those in `long` too."""
    more = [pytest.param(name, marks=pytest.mark.long) for name in long]
    return pytest.mark.parametrize("job", [*(names or _CASES), *more], indirect=True)


# Adapters are the same layers in every task: in `make test` on a classifier, on packed samples and beside a reference.
_MORE_ADAPTERS = {"token-lora", "seq2seq-lora", "masked-packed-lora", "preference-kto-lora"}


def _is_long(name: str, zero: int) -> bool:
    return name in _MORE_ADAPTERS or zero != (2 if name in _STAGE_2 else 3)


_CURVES = [
    pytest.param(name, zero, marks=pytest.mark.long if _is_long(name, zero) else [])
    for name in _CASES if "opt" not in name for zero in (2, 3)
]  # fmt: skip


@pytest.mark.parametrize(("job", "zero"), _CURVES, indirect=["job"])
def test_curve_is_a_function_of_the_job_file(job: PreparedJob, zero: int) -> None:
    # 71 or 131 rows in steps of 11: nothing is divisible by 3 workers; the last batch of an epoch has 5 or 10.
    reference = np.array(run_group(1, train_curve, with_job(job, name="alone", cluster={"workers": 1})))
    assert len(reference) == job.plan.total_steps
    assert reference[-4:].mean() < reference[:4].mean() * 0.995  # it learns, so equality means something
    # A micro-batch of another size, unless BatchNorm depends on it.
    micro = None if job.job.model.trains_batch_norm else {2: 2, 3: 3}[zero]
    cut = with_job(job, name="cut", parallel={"zero": zero, "micro_batch": micro}, cluster={"workers": 3})
    assert np.abs(np.array(run_group(3, train_curve, cut)) - reference).max() < 1e-5


def _packed_and_padded(job: PreparedJob) -> list[list[float]]:
    padded = {**job.job.task.model_dump(), "packing": False}
    return [train_curve(job), train_curve(with_job(job, name="padded", task=padded))]


@_cases("token-packed", "masked-packed-lora", "causal-packed", "causal-packed-opt", "causal-packed-opt-lora")
def test_packing_does_not_change_the_curve(job: PreparedJob) -> None:
    packed, padded = run_group(2, _packed_and_padded, job)
    assert np.abs(np.array(packed) - np.array(padded)).max() < 1e-5


def test_packing_is_off_for_models_that_cannot_separate_samples(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    model = make_tiny_bloom(tmp_path / "bloom", tiny_models["causal-lm"])
    data = write_splits(tmp_path / "data", train=20, task="causal-lm")
    prepared = prepared_job(model, data, tmp_path, task={"type": "causal-lm", "packing": True})
    assert prepared.job.task.parameters()["packing"] is False
    assert any(note.startswith("task.packing: off, as packed samples") for note in prepared.plan.notes)


@_cases(
    "question", "causal-packed-dora-tokens", "preference-dpo", "image-resnet-trained",
    long=("causal-packed", "causal-packed-lora"),
)  # fmt: skip
def test_resume_with_another_number_of_workers_matches_uninterrupted_run(job: PreparedJob) -> None:
    checkpoint = {"every_steps": 4, "every_minutes": None}
    stopped = with_job(job, checkpoint=checkpoint, parallel={"zero": 3})
    reference = dict(run_group(2, train_losses, with_job(stopped, name="whole")))
    run_group(2, train_losses, stopped, 6)
    for step, loss in run_group(3, train_losses, with_job(stopped, cluster={"workers": 3})):
        assert abs(loss - reference[step]) < 1e-5, f"step {step}"


def _statistics(job: PreparedJob) -> list[float]:
    """Return sums of BatchNorm's running statistics right after the checkpoint is loaded."""
    sums: list[float] = []

    def add_sums(engine: Any) -> None:
        sums.extend(float(buffer.double().sum()) for _, buffer in engine.model.named_buffers())

    train_here(job, 8, add_sums)
    return sums


@_cases("image-resnet-trained")
def test_batch_norm_statistics_resume_with_another_number_of_workers(job: PreparedJob) -> None:
    stopped = with_job(job, checkpoint={"every_steps": 4, "every_minutes": None}, parallel={"zero": "auto"})
    run_group(2, train_losses, stopped, 9)
    first = run_group(2, _statistics, stopped)
    assert any(abs(value) > 1e-3 for value in first)
    for workers in (1, 3):
        assert run_group(workers, _statistics, with_job(stopped, cluster={"workers": workers})) == first
