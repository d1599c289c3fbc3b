"""The real kubectl takes what is rendered: client-side and server-side apply, dry run, delete."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from launcher.spec.loader import load_job
from launcher.submit.kubernetes.manifest import dump_manifests
from launcher.submit.kubernetes.render import objects
from tests.submit.kubernetes.conftest import Validate
from tests.submit.kubernetes.test_render import OPTIONS
from tests.support.fake_kubernetes import Running

pytestmark = pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl on PATH")
_FILES = sorted((Path(__file__).resolve().parents[3] / "cluster" / "kuberay").glob("*.yaml"))


class Kubectl:
    """kubectl with a kubeconfig that points to the server, and a home of its own for its cache."""

    def __init__(self, running: Running, folder: Path) -> None:
        (folder / "kubeconfig").write_text(running.kubeconfig())
        self.env = {"PATH": os.environ["PATH"], "HOME": str(folder), "KUBECONFIG": str(folder / "kubeconfig")}

    def __call__(self, *arguments: str) -> str:
        done = subprocess.run(["kubectl", *arguments], capture_output=True, text=True, env=self.env, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture
def kubectl(server: Running, tmp_path: Path, validate: Validate) -> Kubectl:
    server.api.validate = validate
    return Kubectl(server, tmp_path)


def test_every_option_can_be_applied(kubectl: Kubectl, server: Running, job_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "manifests"
    folder.mkdir()
    for option, overrides in OPTIONS.items():
        named = [*overrides, f"name=run-{option}", "cluster.kubernetes.namespace=team", "cluster.kubernetes.name=null"]
        job = load_job(job_file, named)
        (folder / f"{option}.yaml").write_text(dump_manifests(objects(job, "train", "job"), "Made by a test."))
    out = kubectl("apply", "-f", str(folder))
    assert out.count(" created") == 2 * len(OPTIONS)
    assert len(server.api.objects) == 2 * len(OPTIONS)


def test_a_cluster_and_a_dry_run(kubectl: Kubectl, server: Running, job_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(dump_manifests(objects(load_job(job_file, OPTIONS["autoscaling"]), "train", "cluster")))
    kubectl("apply", "--dry-run=server", "-f", str(path))
    assert server.api.objects == {}
    assert kubectl("apply", "-f", str(path)).count(" created") == 2
    assert kubectl("apply", "-f", str(path)).count(" unchanged") == 2


def test_the_files_of_the_repository(kubectl: Kubectl, server: Running) -> None:
    for path in _FILES:
        kubectl("apply", "--server-side", "-f", str(path))
        assert server.api.get("rayjobs", "team", path.stem)["spec"]["entrypoint"]
    assert all(path.stem in kubectl("get", "rayjobs") for path in _FILES)
    kubectl("delete", "-f", str(_FILES[0]))
    assert ("rayjobs", "team", _FILES[0].stem) not in server.api.objects
