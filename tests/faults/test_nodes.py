"""Nodes that die, freeze or are cut off, and a head that dies, in network namespaces: the curve stays the same.

The driver runs on node 1, like on a cluster whose GCS is fault tolerant; `/mnt` is the storage that pods would share.
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
    """Start four nodes whose GCS is fault tolerant."""
    with four_nodes(_TOLERANT) as nodes:
        yield nodes


@pytest.fixture(scope="module")
def plain(cluster: Netns) -> list[tuple[int, int, float]]:
    """Return the curve of a run without faults."""
    output, code = _wait_for_driver(_start_driver(cluster, "plain"))
    assert code == 0, output
    curve = _curve(cluster, "plain")
    assert [step for step, *_ in curve] == list(range(1, _STEPS + 1))
    return curve


def _start_driver(cluster: Netns, name: str) -> "subprocess.Popen[str]":
    """Start the driver of a run on node 1."""
    (cluster.shared / f"{name}.yaml").write_text(_JOB.replace("NAME", name))
    return cluster.start(cluster.inside(1, sys.executable, "-m", "launcher", "train", f"/mnt/{name}.yaml"))


def _wait_for_driver(driver: "subprocess.Popen[str]", timeout_s: float = 600) -> tuple[str, int]:
    try:
        output, _ = driver.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        driver.kill()
        output, _ = driver.communicate()
        pytest.fail(f"the run did not end within {timeout_s:g} s:\n{output}")
    return output, driver.returncode


def _curve(cluster: Netns, name: str) -> list[tuple[int, int, float]]:
    """Return (step, samples, loss) of each line, in the order of the file."""
    path = cluster.shared / "runs" / name / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [(line["step"], line["samples"], line["loss"]) for line in lines if line["kind"] == "step"]


def _wait_for_step(cluster: Netns, driver: "subprocess.Popen[str]", name: str, step: int) -> None:
    deadline = time.monotonic() + 400
    while max((number for number, *_ in _curve(cluster, name)), default=0) < step:
        assert driver.poll() is None, driver.communicate()[0]
        assert time.monotonic() < deadline, f"{name}: no step {step} in time"
        time.sleep(0.1)


def _nodes_with_workers(cluster: Netns) -> list[int]:
    """Return the nodes that run a train worker now."""
    count = "ps -eo args | grep -c '[R]ayTrainWorker'"
    return [node for node in (1, 2, 3) if int(cluster.run(cluster.inside(node, "bash", "-c", count)).stdout or 0)]


def _assert_same_run(cluster: Netns, name: str, plain: list[tuple[int, int, float]]) -> None:
    """Compare curve and model bit by bit; check that no half-written file and no worker is left."""
    assert _curve(cluster, name) == plain
    runs = cluster.shared / "runs"
    for file in ("model/model.safetensors", "scores-test.json"):
        assert (runs / name / file).read_bytes() == (runs / "plain" / file).read_bytes(), file
    assert not [path for path in (runs / name).rglob("*") if path.name.endswith(".tmp") or path.name == "parts"]
    assert all(list(folder.glob("*/manifest.json")) for folder in (runs / name / "checkpoints").iterdir())
    deadline = time.monotonic() + 60
    while _nodes_with_workers(cluster) and time.monotonic() < deadline:
        time.sleep(1)
    assert not _nodes_with_workers(cluster), "orphans"


def _worker_node(cluster: Netns) -> int:
    """Return a node with a train worker and without the driver."""
    return next(node for node in _nodes_with_workers(cluster) if node != 1)


@pytest.mark.parametrize(
    ("name", "fault", "recovery"),
    [("died", "kill", "start"), ("froze", "freeze", "thaw"), ("cut-off", "partition", "heal")],
)
def test_a_lost_node_that_comes_back_leaves_the_curve_unchanged(
    cluster: Netns, plain: list[tuple[int, int, float]], name: str, fault: str, recovery: str
) -> None:
    """Restart the node, with its files of the run, while the run continues on other nodes."""
    driver = _start_driver(cluster, name)
    _wait_for_step(cluster, driver, name, 70)
    node = _worker_node(cluster)
    cluster.tool(fault, str(node))
    last_step = _curve(cluster, name)[-1][0]
    _wait_for_step(cluster, driver, name, last_step + 30)
    cluster.tool(recovery, str(node))
    output, code = _wait_for_driver(driver)
    assert code == 0, output
    assert "resuming from step" in output
    _replace(cluster, node)
    _assert_same_run(cluster, name, plain)


def _replace(cluster: Netns, node: int) -> None:
    """Delete the pod of a lost node and start another."""
    cluster.tool("kill", str(node))
    cluster.tool("start", str(node))
    cluster.tool("wait")


def test_a_run_survives_its_head_with_a_fault_tolerant_gcs(cluster: Netns, plain: list[tuple[int, int, float]]) -> None:
    driver = _start_driver(cluster, "head-tolerant")
    _wait_for_step(cluster, driver, "head-tolerant", 70)
    cluster.tool("kill", "0")
    time.sleep(4)
    cluster.tool("start", "0")
    output, code = _wait_for_driver(driver)
    assert code == 0, output
    _assert_same_run(cluster, "head-tolerant", plain)


def test_the_same_command_resumes_on_a_new_cluster_when_the_head_is_lost(
    plain: list[tuple[int, int, float]], cluster: Netns
) -> None:
    """Kill the head of a cluster without a fault tolerant GCS: only the storage is left."""
    with four_nodes({}) as other:
        driver = _start_driver(other, "head-lost")
        _wait_for_step(other, driver, "head-lost", 70)
        other.tool("kill", "0")
        output, code = _wait_for_driver(driver, 300)
        assert code not in (0, 2), output
        saved = [int(path.parent.parent.name[5:]) for path in (other.shared / "runs/head-lost").rglob("manifest.json")]
        assert max(saved) >= 40
        for node in (1, 2, 3):
            other.tool("kill", str(node))
        for node in range(4):
            other.tool("start", str(node))
        other.tool("wait")
        output, code = _wait_for_driver(_start_driver(other, "head-lost"))
        assert code == 0, output
        assert f"resuming from step {max(saved)}" in output
        assert _curve(other, "head-lost") == plain
