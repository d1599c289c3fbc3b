"""What the tests of Kubernetes share: KubeRay's schemas, a rendered job, a fake API server."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.spec.loader import load_job
from launcher.submit.kubernetes.render import objects
from tests.support.fake_kubernetes import FakeApi, Running

_ROOT = Path(__file__).resolve().parents[3]
_TOOLS = _ROOT.parent / "shared" / "tools"

Validate = Callable[[dict[str, Any]], list[tuple[str, str]]]

JOB = """\
name: sst2
task: {type: text-classification}
model: {name: bert-base-uncased}
data: {train: s3://bucket/train/}
cluster:
  workers: 4
  gpus_per_worker: 1
  kubernetes:
    image: registry/launcher:0.1.0
output: {storage: s3://bucket/runs}
"""


@pytest.fixture(scope="session")
def validate() -> Validate:
    """Return the validator of a strict API server with KubeRay's CRDs."""
    if not (_TOOLS / "crdvalidate.py").is_file():
        pytest.skip("needs ../shared/tools/crdvalidate.py and KubeRay's schemas, which are not part of the repository")
    sys.path.insert(0, str(_TOOLS))
    try:
        import crdvalidate
    finally:
        sys.path.remove(str(_TOOLS))
    validate_object: Validate = crdvalidate.validate
    return validate_object


@pytest.fixture
def job_file(tmp_path: Path) -> Path:
    """Write a job file whose paths exist in the pods."""
    path = tmp_path / "job.yaml"
    path.write_text(JOB)
    return path


@pytest.fixture
def rayjob(job_file: Path) -> dict[str, Any]:
    """Return the RayJob of the job file."""
    return objects(load_job(job_file), "train", "job")[1]


@pytest.fixture
def server() -> Iterator[Running]:
    """Start a fake API server that accepts everything."""
    running = FakeApi().start()
    yield running
    running.stop()
