"""Spec hash: which keys of a job the loss curve depends on."""

import re

import pytest

from launcher.spec.curve import job_values, spec_difference, spec_hash
from launcher.spec.job import JobSpec

JOB: dict[str, dict[str, object]] = {
    "task": {"type": "classify", "labels": ["bad", "good"], "head": {"width": 8}},
    "model": {"name": "minilm"},
    "data": {"train": "train.parquet"},
}


def job(**changes: object) -> JobSpec:
    """Return the job with some sections or values changed: `job(train={"epochs": 1})`."""
    merged: dict[str, object] = {"name": "sst2", **JOB}
    for key, value in changes.items():
        merged[key] = {**JOB.get(key, {}), **value} if isinstance(value, dict) else value
    return JobSpec.model_validate(merged)


def test_the_hash_is_sha256_and_the_same_for_equal_jobs() -> None:
    assert re.fullmatch(r"[0-9a-f]{64}", spec_hash(job()))
    assert spec_hash(job()) == spec_hash(job(data={"train": ["train.parquet"]}, train={"epochs": 3}))


def test_key_order_and_number_keys_do_not_change_the_hash() -> None:
    first = job(task={"type": "classify", "map": {"a": 1, "b": 2}})
    second = job(task={"map": {"b": 2, "a": 1}, "type": "classify"})
    assert spec_hash(first) == spec_hash(second)
    assert spec_hash(job(task={"map": {1: "a", 2: "b"}})) == spec_hash(job(task={"map": {"1": "a", "2": "b"}}))


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "other"},
        {"output": {"storage": "elsewhere"}},
        {"parallel": {"zero": 3, "micro_batch": 2, "offload_optimizer": True}},
        {"cluster": {"workers": 8, "gpus_per_worker": 1}},
        {"checkpoint": {"every_steps": 5}},
        {"evaluation": {"metric": "f1", "batch_size": 8}},
        {"train": {"log_every_steps": 1, "sync_check_steps": 1}},
        {"data": {"leakage": "off"}},
    ],
)
def test_keys_that_do_not_change_the_curve_do_not_change_the_hash(changes: dict[str, object]) -> None:
    assert spec_hash(job(**changes)) == spec_hash(job())
    assert spec_difference(job(), job(**changes)) == []


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"seed": 1}, ["seed: 0 -> 1"]),
        ({"train": {"batch_size": 64}}, ["train.batch_size: 32 -> 64"]),
        ({"train": {"optimizer": {"beta1": 0.5}}}, ["train.optimizer.beta1: 0.9 -> 0.5"]),
        ({"train": {"max_steps": 5}}, ["train.max_steps: null -> 5"]),
        ({"model": {"revision": "null"}}, ['model.revision: null -> "null"']),
        ({"data": {"train": ["a", "b"]}}, ['data.train: ["train.parquet"] -> ["a", "b"]']),
        ({"task": {"head": {"width": 9}}}, ["task.head.width: 8 -> 9"]),
        ({"task": {"head": {}}}, ["task.head.width: 8 -> absent", "task.head: absent -> {}"]),
        ({"task": {"length": 5}}, ["task.length: absent -> 5"]),
    ],
)
def test_keys_that_change_the_curve_change_the_hash_and_are_named(
    changes: dict[str, object], difference: list[str]
) -> None:
    assert spec_hash(job(**changes)) != spec_hash(job())
    assert spec_difference(job(), job(**changes)) == difference


def test_job_values_are_all_keys_except_name_and_output() -> None:
    values = job_values(job(parallel={"zero": 3}, output={"storage": "elsewhere"}))
    assert values["parallel.zero"] == "3" and values["cluster.workers"] == "1" and values["train.batch_size"] == "32"
    assert not [key for key in values if key.startswith(("name", "output"))]
