"""The order of the doctor's examination: join, probe all nodes, check, clean up. Runs on the client.

Each check reports its findings as soon as it has them. A node that does not answer is a finding, and the others are
examined all the same. Read `checks.py` for the thresholds, `probes.py` for the measurements.
"""

import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from typing import Any  # Ray's tables are plain dictionaries

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from launcher.errors import ClusterError
from launcher.spec.cluster import ClusterSpec
from launcher.submit.doctor import checks, shared_checks
from launcher.submit.doctor.facts import (
    Clock,
    DoctorRecord,
    Finding,
    Imports,
    Network,
    Node,
    NodeFacts,
    Software,
    StorageSeen,
    finding,
)
from launcher.submit.doctor.probes import ProbeGroup, absolute, by_value, joined, measure_network, try_storage

Say = Callable[[Sequence[Finding]], None]
"""A function that shows the findings of a completed check."""

# Variables that select the network; the probes get them in addition to cluster.pass_env.
_ENV = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "NCCL_IB_DISABLE", "NCCL_DEBUG")
_START_S = 30.0
_ANSWER_S = 30.0
_CLOCK_S = 10.0
_CLOCK_ROUNDS = 5
_IMPORT_S = 180.0


def examine(address: str | None, storage: str | None, cluster: ClusterSpec | None, say: Say) -> DoctorRecord:
    """Examine a cluster; problems of the cluster are findings, never exceptions.

    Args:
        address: Address of the cluster; None takes RAY_ADDRESS, otherwise a local Ray.
        storage: Storage that all nodes should share; None skips it.
        cluster: Resources of a job; None skips the check.
        say: Function that shows the findings of a completed check.
    """
    start = time.monotonic()
    diagnosis = Diagnosis(say)
    names = (*_ENV, *(cluster.pass_env if cluster is not None else ()))
    environment = {name: os.environ[name] for name in names if name in os.environ}
    resolved = address or ""
    try:
        with joined(address, environment) as resolved, by_value():
            diagnosis.run(resolved, storage, cluster)
    except ClusterError as error:
        text, _, remedy = error.message.partition("; ")
        diagnosis.add([finding("cluster", "problem", text, remedy)])
    return diagnosis.record(resolved, time.monotonic() - start)


class Diagnosis:
    """The examination of one cluster, and what it has found so far."""

    def __init__(self, say: Say) -> None:
        self._say = say
        self._findings: list[Finding] = []
        self._facts: dict[str, NodeFacts] = {}
        self._imports: dict[str, Imports] = {}
        self._clocks: dict[str, Clock] = {}
        self._storage: dict[str, StorageSeen] = {}
        self._network: Network | None = None

    def add(self, findings: Sequence[Finding]) -> None:
        """Record and show the findings of a check."""
        self._findings += findings
        self._say(findings)

    def record(self, address: str, seconds: float) -> DoctorRecord:
        """Return everything found so far."""
        return DoctorRecord(
            address=address, findings=tuple(self._findings), nodes=self._facts, imports=self._imports,
            clocks=self._clocks, storage=self._storage, network=self._network, seconds=round(seconds, 1),
        )  # fmt: skip

    def run(self, address: str, storage: str | None, cluster: ClusterSpec | None) -> None:
        """Run all checks, quick ones first."""
        import ray

        nodes = nodes_of(ray.nodes())
        if cluster is not None and address:  # a local Ray gets as many CPUs as the job asks for
            self.add(checks.job(cluster, list(nodes.values()), ray.available_resources()))
        with _probes(nodes) as group:
            answering = {name: node for name, node in nodes.items() if name in group.names}
            self._examine_hosts(group, answering, set(nodes) - set(answering), is_local=not address)
            if not self._facts:
                return
            self._examine_storage(storage, group)
            self._measure_imports(group, answering, needs_gpu=cluster is not None and cluster.gpus_per_worker > 0)
        needs_gpu = cluster is None or cluster.gpus_per_worker > 0
        # Outside of the block: the probes have ended, and nothing of the doctor disturbs the measurement.
        self._measure_network([answering[name] for name in self._facts], needs_gpu)

    def _examine_hosts(self, group: ProbeGroup, nodes: Mapping[str, Node], silent: set[str], is_local: bool) -> None:
        from launcher.submit.doctor import actors

        answers = group.call_all("facts", timeout_s=_ANSWER_S)
        self._facts = {name: NodeFacts.model_validate(answer) for name, answer in answers.items()}
        silent |= {name for name in group.names if name not in answers}
        self.add(checks.answers(list(self._facts), {name: group.errors[name] for name in sorted(silent)}))
        if not self._facts:
            return
        local = Software.model_validate(actors.software())
        software = {name: facts.software for name, facts in self._facts.items()}
        self.add(checks.versions(local, software, dependency_closure("launcher")))
        if not is_local:
            self.add(checks.access(self._facts, [nodes[name].address for name in self._facts]))
        self.add(checks.disks(self._facts))
        self.add(checks.memory(self._facts, nodes))
        self.add(checks.limits(self._facts, nodes))
        self._clocks = _clocks(group)
        self.add(checks.clocks(self._clocks))

    def _examine_storage(self, storage: str | None, group: ProbeGroup) -> None:
        if storage is None:
            text = "not tried: give a job file or --storage"
            self.add([finding("storage", "skipped", text)])
            return
        storage = absolute(storage)
        self._storage = try_storage(storage, group)
        self.add(shared_checks.storage(storage, self._storage))

    def _measure_imports(self, group: ProbeGroup, nodes: Mapping[str, Node], needs_gpu: bool) -> None:
        libraries = list(checks.TRAINING)
        # The node's own limit ends first, so that its reason arrives.
        answers = group.call_all("imports", libraries, _IMPORT_S, timeout_s=_IMPORT_S + 10)
        for name in group.names:
            missing = {"seconds": {}, "errors": {", ".join(libraries): group.errors.get(name, "")}, "torch_gpus": None}
            self._imports[name] = Imports.model_validate(answers.get(name, missing))
        self.add(checks.imports(self._imports))
        # Only here, because it takes an import of torch to count the GPUs that torch sees.
        self.add(checks.gpus(self._facts, nodes, self._imports, needs_gpu))

    def _measure_network(self, nodes: Sequence[Node], needs_gpu: bool) -> None:
        with_gpus = [node for node in nodes if node.ray_gpus >= 1] if needs_gpu else []
        if len(nodes) < 2 and sum(node.ray_gpus for node in with_gpus) < 2:
            self.add([finding("network", "skipped", "one node: there is nothing between nodes")])
            return
        self._network = measure_network(nodes, with_gpus)
        self.add(shared_checks.network(self._network))


@contextmanager
def _probes(nodes: Mapping[str, Node]) -> Iterator[ProbeGroup]:
    """Start a probe on each node; those that do not start have an error."""
    from launcher.submit.doctor.actors import Probe

    group = ProbeGroup(Probe, threads=4)
    try:
        for name, node in nodes.items():
            group.add(name, node)
        group.wait_ready(_START_S)
        yield group
    finally:
        group.stop()


def _clocks(group: ProbeGroup) -> dict[str, Clock]:
    """Return clock offsets by the shortest of some round trips: a node's time is compared with the trip's middle."""
    best: dict[str, Clock] = {}
    for number in range(_CLOCK_ROUNDS):
        # One node at a time: answers that queue here would look like a slow node. Silent nodes are not called again.
        for name in list(best) if number else group.names:
            sent = time.time()
            answer = group.call({name: ()}, "clock", _CLOCK_S)
            received = time.time()
            half = (received - sent) / 2
            if name in answer and (name not in best or half < best[name].uncertainty_s):
                best[name] = Clock(offset_s=answer[name] - sent - half, uncertainty_s=half)
    return best


def nodes_of(tables: Iterable[Mapping[str, Any]]) -> dict[str, Node]:
    """Return the live nodes of Ray's tables by a unique name: the host's, with the address where two nodes share it."""
    alive = [table for table in tables if table["Alive"]]
    hosts = Counter(table["NodeManagerHostname"] for table in alive)
    nodes: dict[str, Node] = {}
    for table in alive:
        host, address, node_id = table["NodeManagerHostname"], table["NodeManagerAddress"], table["NodeID"]
        name = host if hosts[host] == 1 else f"{host} ({address}, {node_id[:6]})"
        resources = table["Resources"]
        nodes[name] = Node(
            node_id=node_id, name=name, address=address, is_head="node:__internal_head__" in resources,
            ray_cpus=resources.get("CPU", 0.0), ray_gpus=resources.get("GPU", 0.0),
            object_store_bytes=int(resources.get("object_store_memory", 0)),
        )  # fmt: skip
    return dict(sorted(nodes.items(), key=lambda item: (not item[1].is_head, item[0])))


def dependency_closure(root: str) -> frozenset[str]:
    """Return the names of the installed packages that `root` needs, itself included; empty if it is not installed.

    Names are normalised as in PEP 503.
    """
    visited: set[tuple[str, str]] = set()
    queue = [(root, "")]
    while queue:
        name, extra = queue.pop()
        try:
            requirements = metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # a package of an extra that is not installed
            continue
        # Once per extra, since `ray[train]` needs more than `ray`.
        visited.add((name, extra))
        for requirement in map(Requirement, requirements):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                needs = [(canonicalize_name(requirement.name), each) for each in ("", *requirement.extras)]
                queue += [need for need in needs if need not in visited]
    return frozenset(name for name, _ in visited)
