"""Permissions: a run's own job.yaml grants none, the command line does."""

from pathlib import Path
from typing import Any

import pytest

from launcher.errors import SpecError
from launcher.spec.job import JobSpec
from launcher.spec.permissions import grant_permissions, permission_overrides, with_permissions_of
from tests.support.jobs import make_job

_EVIL: dict[str, tuple[dict[str, Any], str]] = {
    "model.trust_remote_code": ({"model": {"trust_remote_code": True}}, "model.trust_remote_code=true"),
    "model.allow_pickle": ({"model": {"allow_pickle": True}}, "model.allow_pickle=true"),
    "cluster.address": ({"cluster": {"address": "ray://evil:10001"}}, "cluster.address=ray://evil:10001"),
    "cluster.pass_env": ({"cluster": {"pass_env": ["AWS_SECRET_ACCESS_KEY"]}}, "cluster.pass_env=["),
}


def _job(**sections: Any) -> JobSpec:
    return make_job(Path("/model"), {"train": "gone.parquet"}, Path("/runs"), **sections)


@pytest.mark.parametrize("key", _EVIL)
def test_a_run_cannot_grant_permissions(key: str) -> None:
    sections, typed = _EVIL[key]
    with pytest.raises(SpecError) as refused:
        grant_permissions(_job(**sections), "there/job.yaml", ())
    (problem,) = refused.value.problems
    assert problem.startswith(f"there/job.yaml: asks for {key}: ") and f"add {typed}" in problem.replace("'", "")


@pytest.mark.parametrize("typed", ["{key}=x", "{section}={{}}"])
@pytest.mark.parametrize("key", _EVIL)
def test_the_command_line_grants_permissions(key: str, typed: str) -> None:
    job = _job(**_EVIL[key][0])
    assert grant_permissions(job, "there", [typed.format(key=key, section=key.split(".")[0])]) == job


def test_all_missing_permissions_are_reported_at_once() -> None:
    sections: dict[str, Any] = {"model": {"trust_remote_code": True, "allow_pickle": True}}
    with pytest.raises(SpecError) as refused:
        grant_permissions(_job(**sections), "there", ["model.name=x"])
    assert len(refused.value.problems) == 2


def test_a_tracker_needs_permission_only_in_training() -> None:
    job = _job(logging={"mlflow": "http://evil:5000"})
    assert grant_permissions(job, "there", ()) == job
    with pytest.raises(SpecError, match=r"asks for logging\.mlflow: http://evil:5000"):
        grant_permissions(job, "there", (), is_training=True)


def test_local_addresses_are_allowed_and_keys_of_submitted_jobs_are_dropped() -> None:
    job = _job(cluster={"address": "auto", "prepare": "rm -rf ~", "code": ["x.py"]})
    cluster = grant_permissions(job, "there", ()).cluster
    assert (cluster.address, cluster.prepare, cluster.code) == ("auto", None, ())


def test_a_fork_uses_permissions_and_storage_of_its_own_job() -> None:
    evil = _job(model={"trust_remote_code": True}, cluster={"address": "ray://evil:1", "pass_env": ["A"], "workers": 5})
    own = _job(model={"allow_pickle": True}, cluster={"address": "ray://mine:1"}, output={"storage": "/mine"})
    job = with_permissions_of(evil, own)
    assert (job.model.trust_remote_code, job.model.allow_pickle) == (False, True)
    assert (job.cluster.address, job.cluster.pass_env, job.cluster.workers) == ("ray://mine:1", (), 5)
    assert job.output.storage == "/mine"


def test_permissions_of_the_users_job_become_overrides() -> None:
    job = _job(model={"trust_remote_code": True}, cluster={"pass_env": ["A", "B"]})
    typed = permission_overrides(job)
    assert typed == ("model.trust_remote_code=true", 'cluster.pass_env=["A","B"]')
    assert grant_permissions(job, "there", typed) == job
