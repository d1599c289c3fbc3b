"""What the answers of Ray's Jobs API mean, without a cluster."""

import pytest

from launcher.errors import ClusterError, RunError
from launcher.submit.ray_jobs import RayJobs, _Client


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> RayJobs:
    monkeypatch.setattr(_Client, "__init__", lambda *_, **__: None)
    return RayJobs("http://head:8265")


@pytest.mark.parametrize(
    ("status", "expected", "sentence"),
    [
        (404, RunError, r"there is no job exp-404-train-1 \(any more\)"),
        # The cluster has trouble, and still knows the job: whoever follows it tries again.
        (500, ClusterError, r"the cluster refuses \(Request failed with status code 500: no exp-404-train-1"),
        (413, ClusterError, r"refuses a package of more than 100 MiB"),
    ],
)
def test_a_status_is_not_looked_for_in_the_name_of_the_job(
    jobs: RayJobs, monkeypatch: pytest.MonkeyPatch, status: int, expected: type[Exception], sentence: str
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError(f"Request failed with status code {status}: no exp-404-train-1.")

    monkeypatch.setattr(_Client, "get_job_info", fail)
    with pytest.raises(expected, match=sentence):
        jobs.get("exp-404-train-1")
