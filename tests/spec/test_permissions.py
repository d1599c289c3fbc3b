"""What a run's own job.yaml may not permit."""

from pathlib import Path
from typing import Any

import pytest

from launcher.errors import SpecError
from launcher.spec.job import JobSpec
from launcher.spec.permissions import as_overrides, granted, with_permissions_of
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
def test_a_run_cannot_permit_what_only_the_user_may(key: str) -> None:
    sections, typed = _EVIL[key]
    with pytest.raises(SpecError) as refused:
        granted(_job(**sections), "there/job.yaml", ())
    (said,) = refused.value.problems
    assert said.startswith(f"there/job.yaml: asks for {key}: ") and f"{typed}" in said and "to the command" in said


@pytest.mark.parametrize("typed", ["{key}=x", "{section}={{}}"])
@pytest.mark.parametrize("key", _EVIL)
def test_the_command_line_permits_it(key: str, typed: str) -> None:
    job = _job(**_EVIL[key][0])
    assert granted(job, "there", [typed.format(key=key, section=key.split(".")[0])]) == job


def test_all_are_told_at_once() -> None:
    sections: dict[str, Any] = {"model": {"trust_remote_code": True, "allow_pickle": True}}
    with pytest.raises(SpecError) as refused:
        granted(_job(**sections), "there", ["model.name=x"])
    assert len(refused.value.problems) == 2


def test_a_tracker_is_a_permission_where_the_run_is_trained_again() -> None:
    job = _job(logging={"mlflow": "http://evil:5000"})
    assert granted(job, "there", ()) == job
    with pytest.raises(SpecError, match=r"asks for logging\.mlflow: http://evil:5000"):
        granted(job, "there", (), is_training=True)


def test_an_address_of_this_machine_and_what_is_for_submitted_jobs_are_no_reason_to_refuse() -> None:
    job = _job(cluster={"address": "auto", "prepare": "rm -rf ~", "code": ["x.py"]})
    cluster = granted(job, "there", ()).cluster
    assert (cluster.address, cluster.prepare, cluster.code) == ("auto", None, ())


def test_a_fork_has_the_permissions_and_the_storage_of_its_own_job() -> None:
    evil = _job(model={"trust_remote_code": True}, cluster={"address": "ray://evil:1", "pass_env": ["A"], "workers": 5})
    own = _job(model={"allow_pickle": True}, cluster={"address": "ray://mine:1"}, output={"storage": "/mine"})
    found = with_permissions_of(evil, own)
    assert (found.model.trust_remote_code, found.model.allow_pickle) == (False, True)
    assert (found.cluster.address, found.cluster.pass_env, found.cluster.workers) == ("ray://mine:1", (), 5)
    assert found.output.storage == "/mine"


def test_the_permissions_of_an_own_job_are_overrides_for_its_run() -> None:
    job = _job(model={"trust_remote_code": True}, cluster={"pass_env": ["A", "B"]})
    typed = as_overrides(job)
    assert typed == ("model.trust_remote_code=true", 'cluster.pass_env=["A","B"]')
    assert granted(job, "there", typed) == job
