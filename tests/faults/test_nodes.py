"""Nodes that die, freeze, are cut off, and a head that dies, on real nodes: the curve stays the undisturbed run's.

The driver runs on node 1, as it does on a cluster whose GCS is fault tolerant; `/mnt` is what pods would share.
"""

import json
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from tests.support.network_namespaces import Netns, four_nodes, why_not

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.long,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(why_not() is not None, reason=why_not() or ""),
]

_JOB = """\
name: NAME
task: {type: text-classification, max_length: 32}
model: {name: /mnt/model, dropout: 0.0}
data: {train: /mnt/data/train.parquet, validation: /mnt/data/validation.parquet, test: /mnt/data/test.parquet}
train: {epochs: 6, batch_size: 8, learning_rate: 1e-3, log_every_steps: 5}
evaluation: {every_steps: 100}
checkpoint: {every_steps: 20, every_minutes: null}
fault_tolerance: {hang_s: 90, backoff_s: 1}
cluster: {workers: 2, cpus_per_worker: 1.5}
output: {storage: /mnt/runs}
"""
_STEPS = 300
# As KubeRay's `gcsFaultToleranceOptions` with `backend: rocksdb` sets it; Redis would do as well.
_TOLERANT = {
    "RAY_gcs_storage": "rocksdb",
    "RAY_gcs_storage_path": "/mnt/gcs",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "600",
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Netns]:
    """Its GCS is fault tolerant."""
    with four_nodes(_TOLERANT) as made:
        yield made


@pytest.fixture(scope="module")
def plain(cluster: Netns) -> list[tuple[int, int, float]]:
    """The curve of the undisturbed run."""
    shown, code = _finished(_begun(cluster, "plain"))
    assert code == 0, shown
    curve = _curve(cluster, "plain")
    assert [step for step, *_ in curve] == list(range(1, _STEPS + 1))
    return curve


def _begun(cluster: Netns, name: str) -> "subprocess.Popen[str]":
    """The driver of a run, on node 1."""
    (cluster.shared / f"{name}.yaml").write_text(_JOB.replace("NAME", name))
    return cluster.start(cluster.inside(1, sys.executable, "-m", "launcher", "train", f"/mnt/{name}.yaml"))


def _finished(driver: "subprocess.Popen[str]", timeout_s: float = 600) -> tuple[str, int]:
    try:
        shown, _ = driver.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        driver.kill()
        shown, _ = driver.communicate()
        pytest.fail(f"the run did not end within {timeout_s:g} s:\n{shown}")
    return shown, driver.returncode


def _curve(cluster: Netns, name: str) -> list[tuple[int, int, float]]:
    """(step, samples, loss) of each line, in the order of the file."""
    path = cluster.shared / "runs" / name / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [(line["step"], line["samples"], line["loss"]) for line in lines if line["kind"] == "step"]


def _wait_for_step(cluster: Netns, driver: "subprocess.Popen[str]", name: str, step: int) -> None:
    until = time.monotonic() + 400
    while max((number for number, *_ in _curve(cluster, name)), default=0) < step:
        assert driver.poll() is None, driver.communicate()[0]
        assert time.monotonic() < until, f"{name}: no step {step} in time"
        time.sleep(0.1)


def _at_work(cluster: Netns) -> list[int]:
    """Nodes that hold a train worker now."""
    count = "ps -eo args | grep -c '[R]ayTrainWorker'"
    return [node for node in (1, 2, 3) if int(cluster.run(cluster.inside(node, "bash", "-c", count)).stdout or 0)]


def _whole(cluster: Netns, name: str, plain: list[tuple[int, int, float]]) -> None:
    """The same curve and model, bit by bit; nothing half-written, and no worker that goes on."""
    assert _curve(cluster, name) == plain
    runs = cluster.shared / "runs"
    for file in ("model/model.safetensors", "scores-test.json"):
        assert (runs / name / file).read_bytes() == (runs / "plain" / file).read_bytes(), file
    assert not [path for path in (runs / name).rglob("*") if path.name.endswith(".tmp") or path.name == "parts"]
    assert all(list(folder.glob("*/manifest.json")) for folder in (runs / name / "checkpoints").iterdir())
    until = time.monotonic() + 60
    while (still := _at_work(cluster)) and time.monotonic() < until:
        time.sleep(1)
    assert not still, f"orphans on nodes {still}"


def _other(cluster: Netns) -> int:
    """A node with a train worker and without the driver."""
    return next(node for node in _at_work(cluster) if node != 1)


@pytest.mark.parametrize(
    ("name", "happens", "later"),
    [("died", "kill", "start"), ("froze", "freeze", "thaw"), ("cut-off", "partition", "heal")],
)
def test_a_node(cluster: Netns, plain: list[tuple[int, int, float]], name: str, happens: str, later: str) -> None:
    """It comes back while the run goes on elsewhere, with whatever of the run it still had."""
    driver = _begun(cluster, name)
    _wait_for_step(cluster, driver, name, 70)
    node = _other(cluster)
    cluster.tool(happens, str(node))
    before = _curve(cluster, name)[-1][0]
    _wait_for_step(cluster, driver, name, before + 30)
    cluster.tool(later, str(node))
    shown, code = _finished(driver)
    assert code == 0, shown
    assert "resuming from step" in shown
    _replace(cluster, node)
    _whole(cluster, name, plain)


def _replace(cluster: Netns, node: int) -> None:
    """A pod of a node that was given up is deleted, and another one made."""
    cluster.tool("kill", str(node))
    cluster.tool("start", str(node))
    cluster.tool("wait")


def test_a_head_that_dies_with_a_fault_tolerant_gcs(cluster: Netns, plain: list[tuple[int, int, float]]) -> None:
    driver = _begun(cluster, "head-tolerant")
    _wait_for_step(cluster, driver, "head-tolerant", 70)
    cluster.tool("kill", "0")
    time.sleep(4)
    cluster.tool("start", "0")
    shown, code = _finished(driver)
    assert code == 0, shown
    _whole(cluster, "head-tolerant", plain)


def test_a_head_that_dies_for_good(plain: list[tuple[int, int, float]], cluster: Netns) -> None:
    """Without a fault tolerant GCS all is lost but the storage: the same command on a new cluster goes on."""
    with four_nodes({}) as other:
        driver = _begun(other, "head-lost")
        _wait_for_step(other, driver, "head-lost", 70)
        other.tool("kill", "0")
        shown, code = _finished(driver, 300)
        assert code not in (0, 2), shown
        saved = [int(path.parent.parent.name[5:]) for path in (other.shared / "runs/head-lost").rglob("manifest.json")]
        assert max(saved) >= 40
        for node in (1, 2, 3):
            other.tool("kill", str(node))
        for node in range(4):
            other.tool("start", str(node))
        other.tool("wait")
        shown, code = _finished(_begun(other, "head-lost"))
        assert code == 0, shown
        assert f"resuming from step {max(saved)}" in shown
        assert _curve(other, "head-lost") == plain
