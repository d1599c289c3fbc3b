"""The doctor on a real cluster of three nodes: what is planted is found and named, and nothing is found elsewhere."""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from launcher.submit.doctor.facts import DoctorRecord, Finding
from tests.support import network_namespaces

pytestmark = [
    pytest.mark.slow,
    pytest.mark.long,
    pytest.mark.skipif(network_namespaces.why_not() is not None, reason=str(network_namespaces.why_not())),
]

# Every node has a /tmp of its own, so that one node alone can have something in these.
_PLANTED, _SPILL = "/tmp/planted", "/tmp/spill"
_SETTINGS = {
    "AUTH": "token",
    "AUTH_TOKEN": network_namespaces.TOKEN,
    "ENV": f"PYTHONPATH={_PLANTED}",
    "WORKER_ARGS": f"--object-spilling-directory={_SPILL}",
}


@dataclass(frozen=True)
class Cluster:
    """A head without CPUs and two workers."""

    net: network_namespaces.Netns

    def name(self, number: int) -> str:
        return f"rk{self.net.number}-{'head' if number == 0 else f'worker-{number}'}"

    def run(self, number: int, *command: str) -> None:
        done = self.net.run(self.net.inside(number, *command))
        assert done.returncode == 0, done.stderr

    def doctor(self, *arguments: str, code: int) -> DoctorRecord:
        """Run the doctor on the head and check its exit code."""
        command = [sys.executable, "-m", "launcher", "doctor", "--json", "--address", "auto", *arguments]
        done = self.net.run(self.net.inside(0, *command), timeout=120)
        assert done.returncode == code, done.stderr + done.stdout
        return DoctorRecord.model_validate(json.loads(done.stdout))


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    net = network_namespaces.Netns(network_namespaces.free_number(), _SETTINGS)
    try:
        net.tool("up", "2")
        net.tool("wait")
        yield Cluster(net)
    finally:
        net.tool("down")


@contextmanager
def _sick(cluster: Cluster) -> Iterator[None]:
    """Worker 1 has a full disk; worker 2 another torchmetrics, a launcher that cannot be imported, and a slow link."""
    info = f"{_PLANTED}/torchmetrics-0.0.1.dist-info"
    metadata = r"Metadata-Version: 2.1\nName: torchmetrics\nVersion: 0.0.1\n"
    fill = f"mkdir -p {_SPILL} && mount -t tmpfs -o size=8m tmpfs {_SPILL} && (cat /dev/zero > {_SPILL}/full || true)"
    other = (
        f"mkdir -p {info} {_PLANTED}/launcher && printf '{metadata}' > {info}/METADATA && "
        f"echo 'raise ImportError(\"another launcher\")' > {_PLANTED}/launcher/__init__.py"
    )
    cluster.run(1, "bash", "-c", fill)
    cluster.run(2, "bash", "-c", other)
    cluster.net.tool("rate", "2", "20000")
    try:
        yield
    finally:
        cluster.net.tool("rate", "2", "0")
        cluster.run(1, "umount", _SPILL)
        cluster.run(2, "rm", "-rf", _PLANTED)


@pytest.fixture(scope="module")
def unhealthy(cluster: Cluster) -> DoctorRecord:
    """Run the doctor once with all faults present."""
    with _sick(cluster):
        return cluster.doctor("--storage", "/tmp/runs", code=2)


def _problems(record: DoctorRecord) -> list[Finding]:
    return [finding for finding in record.findings if finding.level == "problem"]


def _of(record: DoctorRecord, check: str) -> list[Finding]:
    return [finding for finding in _problems(record) if finding.check == check]


def test_a_healthy_cluster_has_no_problem(cluster: Cluster) -> None:
    record = cluster.doctor("--storage", "/mnt/runs/deep", code=0)
    assert _problems(record) == []
    names = {cluster.name(number) for number in range(3)}
    assert set(record.nodes) == set(record.imports) == set(record.clocks) == set(record.storage) == names
    assert all(set(seen.sees) == names for seen in record.storage.values())
    # Namespaces share the kernel's clock, so that what is measured is the error of the method.
    assert all(abs(clock.offset_s) < 0.5 for clock in record.clocks.values())
    assert record.network is not None and set(record.network.ring.nodes) == names - {cluster.name(0)}
    assert len(record.network.pairs) == 3  # the head is a witness, for two alone cannot tell who is slow
    assert all(facts.token_needed and facts.store_used_bytes is not None for facts in record.nodes.values())
    assert list(cluster.net.shared.iterdir()) == []


def test_storage_that_is_not_shared(unhealthy: DoctorRecord, cluster: Cluster) -> None:
    (finding,) = _of(unhealthy, "storage")
    nodes = ", ".join(cluster.name(number) for number in range(3))
    assert finding.found == f"/tmp/runs is another directory on each of {nodes}: not shared"
    for number in range(3):
        left = cluster.net.run(cluster.net.inside(number, "ls", "-a", "/tmp")).stdout.split()
        assert "runs" not in left


def test_another_version_and_another_launcher_on_one_node(unhealthy: DoctorRecord, cluster: Cluster) -> None:
    (finding,) = _of(unhealthy, "versions")
    assert finding.found.startswith(f"{cluster.name(2)}: torchmetrics 0.0.1 (here ")
    assert "other code of launcher" in finding.found
    assert unhealthy.nodes[cluster.name(2)].software.packages["torchmetrics"] == "0.0.1"


def test_a_full_disk(unhealthy: DoctorRecord, cluster: Cluster) -> None:
    (finding,) = _of(unhealthy, "disk")
    assert finding.found.startswith(
        f"{cluster.name(1)}: Ray's spill directory, {_SPILL}, is 100% full, 0 B of 8.0 MiB free"
    )


def test_a_slow_link(unhealthy: DoctorRecord, cluster: Cluster) -> None:
    (finding,) = _of(unhealthy, "network")
    assert finding.found.startswith(f"{cluster.name(2)} is slow: 2.")  # 20 Mbit/s are 2.5 MB/s
    assert cluster.name(2) in finding.remedy


def test_nothing_else_is_a_problem(unhealthy: DoctorRecord) -> None:
    assert sorted(finding.check for finding in _problems(unhealthy)) == ["disk", "network", "storage", "versions"]


def test_an_interrupted_visit_leaves_nothing(cluster: Cluster) -> None:
    visit = [sys.executable, "-m", "launcher", "doctor", "--address", "auto", "--storage", "/mnt/runs"]
    stop = ["timeout", "--preserve-status", "-s", "INT", "5"]
    done = cluster.net.run(cluster.net.inside(0, *stop, *visit), timeout=60)
    assert done.returncode == 130 and "processes and files are removed" in done.stderr
    assert list(cluster.net.shared.iterdir()) == []
    code = (
        "import ray; ray.init('auto', log_to_driver=False); from ray._private.state import actors; "
        "print([actor['State'] for actor in actors().values() if actor['State'] != 'DEAD'])"
    )
    left = cluster.net.run(cluster.net.inside(0, sys.executable, "-c", code), timeout=60)
    assert left.stdout.strip() == "[]", left.stderr


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        (("-u", "RAY_AUTH_TOKEN", "RAY_AUTH_MODE=disabled"), "none was sent, as RAY_AUTH_MODE is disabled"),
        (("-u", "RAY_AUTH_TOKEN"), "there is none (/tmp/home/.ray/auth_token does not exist)"),
        (("RAY_AUTH_TOKEN=wrong-token-0123456789012345678901",), "rejects the token in RAY_AUTH_TOKEN"),
    ],
)
@pytest.mark.parametrize("address", ["auto", "ray://{head}"])
def test_a_token_that_is_missing_or_wrong(
    cluster: Cluster, environment: tuple[str, ...], says: str, address: str
) -> None:
    start = time.monotonic()
    where = address.format(head=cluster.net.head_ip)
    command = ["env", *environment, sys.executable, "-m", "launcher", "doctor", "--json", "--address", where]
    done = cluster.net.run(cluster.net.inside(1, *command), timeout=60)
    assert time.monotonic() - start < 10
    (finding,) = DoctorRecord.model_validate(json.loads(done.stdout)).findings
    assert done.returncode == 2 and finding.level == "problem"
    assert says in finding.found and "~/.ray/auth_token" in finding.remedy


def test_a_machine_that_is_no_node(cluster: Cluster) -> None:
    environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": network_namespaces.TOKEN}
    command = [sys.executable, "-m", "launcher", "doctor", "--address", f"{cluster.net.head_ip}:6379"]
    done = cluster.net.run(cluster.net.outside(*command), timeout=60, **environment)
    assert done.returncode == 2 and "this machine is no node of it" in done.stdout and "ray://HOST" in done.stdout
