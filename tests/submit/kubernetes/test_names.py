"""Names of objects: any run's name becomes one KubeRay takes, and two runs never share one."""

import re

from hypothesis import given
from hypothesis import strategies as st

from launcher.spec.job import JobSpec
from launcher.submit.kubernetes.manifest import config_name, job_name

RUNS = st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,62}\Z")


def _job(run: str, **kubernetes: str) -> JobSpec:
    return JobSpec.model_validate(
        {
            "name": run,
            "task": {"type": "t"},
            "model": {"name": "m"},
            "data": {"train": "d"},
            "cluster": {"kubernetes": {"image": "i", **kubernetes}},
        }
    )


@given(name=RUNS)
def test_kuberay_takes_every_name(name: str) -> None:
    name_of_job = job_name(_job(name))
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name_of_job) and len(name_of_job) <= 47
    assert len(config_name(name_of_job)) <= 63


@given(name=RUNS, other=RUNS)
def test_two_runs_have_two_names(name: str, other: str) -> None:
    assert name == other or job_name(_job(name)) != job_name(_job(other))


def test_a_name_stays_or_can_be_recognised() -> None:
    assert job_name(_job("bert-base")) == "bert-base"
    assert re.fullmatch(r"run-7b-sft-[0-9a-f]{6}", job_name(_job("7b-sft")))
    assert re.fullmatch(r"bert-large-v2-[0-9a-f]{6}", job_name(_job("Bert_large.v2")))
    assert re.fullmatch(r"a{40}-[0-9a-f]{6}", job_name(_job("a" * 63)))
    assert job_name(_job("7b-sft", name="seven")) == "seven"
