"""The order of the doctor's visit: join, ask all nodes, judge, leave nothing behind. Runs on the client.

Each check says its findings as soon as it has them; a node that does not answer is a finding, and the visit goes on.
"""

import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any  # Ray's tables are plain dictionaries

from launcher.errors import ClusterError
from launcher.spec.cluster import ClusterSpec
from launcher.submit.doctor import judge_gpus, judge_host, judge_job, judge_network, judge_software, network, storage
from launcher.submit.doctor.closure import dependency_closure
from launcher.submit.doctor.complaints import Issue, group_issues
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
)
from launcher.submit.doctor.session import joined
from launcher.submit.doctor.team import ProbeGroup, by_value

Say = Callable[[Sequence[Finding]], None]
"""Told the findings of a check when it is done."""

# What the probes see of the environment beside cluster.pass_env: what decides which network they use.
_ENV = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "NCCL_IB_DISABLE", "NCCL_DEBUG")
_START_S = 30.0
_ANSWER_S = 30.0
_CLOCK_S = 10.0
_CLOCK_ROUNDS = 5
_IMPORT_S = 180.0


def examine(address: str | None, place: str | None, cluster: ClusterSpec | None, say: Say) -> DoctorRecord:
    """Look at a cluster from all sides; never raises for what is wrong with it.

    Args:
        address: of the cluster; None looks at RAY_ADDRESS, then at a local Ray.
        place: storage that all nodes should share; None leaves that out.
        cluster: what a job asks for; None leaves that out.
        say: told of each check that is done.
    """
    start = time.monotonic()
    visit = Diagnosis(say)
    names = (*_ENV, *(cluster.pass_env if cluster is not None else ()))
    environment = {name: os.environ[name] for name in names if name in os.environ}
    where = address or ""
    try:
        with joined(address, environment) as where, by_value():
            visit.go(where, place, cluster)
    except ClusterError as error:
        text, _, remedy = error.message.partition("; ")
        visit.add([Finding(check="cluster", level="problem", found=text, remedy=remedy)])
    return visit.record(where, time.monotonic() - start)


class Diagnosis:
    """What is known so far."""

    def __init__(self, say: Say) -> None:
        self._say = say
        self._findings: list[Finding] = []
        self._facts: dict[str, NodeFacts] = {}
        self._imports: dict[str, Imports] = {}
        self._clocks: dict[str, Clock] = {}
        self._storage: dict[str, StorageSeen] = {}
        self._network: Network | None = None

    def add(self, findings: Sequence[Finding]) -> None:
        """Note the findings of a check, and say them."""
        self._findings += findings
        self._say(findings)

    def record(self, address: str, seconds: float) -> DoctorRecord:
        """All of it."""
        return DoctorRecord(
            address=address, findings=tuple(self._findings), nodes=self._facts, imports=self._imports,
            clocks=self._clocks, storage=self._storage, network=self._network, seconds=round(seconds, 1),
        )  # fmt: skip

    def go(self, address: str, place: str | None, cluster: ClusterSpec | None) -> None:
        """All checks, in an order that tells early what is quick to tell."""
        import ray

        tables = nodes_of(ray.nodes())
        if cluster is not None and address:  # a local Ray has as many CPUs as the job asks for
            self.add(judge_job.job(cluster, list(tables.values()), ray.available_resources()))
        with _team(tables) as (team, silent):
            answering = {name: table for name, table in tables.items() if name in team.names}
            self._host(team, answering, silent, local=not address)
            if not self._facts:
                return
            self._storage_shared(place, team)
            self._import_times(team, answering, gpu=cluster is not None and cluster.gpus_per_worker > 0)
        gpu = cluster is None or cluster.gpus_per_worker > 0
        self._all_reduce([answering[name] for name in self._facts], gpu)

    def _host(self, team: ProbeGroup, tables: Mapping[str, Node], silent: Mapping[str, str], local: bool) -> None:
        from launcher.submit.doctor import probes

        answers = team.ask_all("facts", timeout_s=_ANSWER_S)
        self._facts = {name: NodeFacts.model_validate(answer) for name, answer in answers.items()}
        lost = {**silent, **{name: team.errors[name] for name in team.names if name not in answers}}
        self.add(_answering(list(self._facts), lost))
        if not self._facts:
            return
        here = Software.model_validate(probes.software())
        software = {name: facts.software for name, facts in self._facts.items()}
        self.add(judge_software.versions(here, software, dependency_closure("launcher")))
        if not local:
            self.add(judge_host.access(self._facts, [tables[name].address for name in self._facts]))
        self.add(judge_host.disks(self._facts))
        self.add(judge_host.memory(self._facts, tables))
        self.add(judge_host.limits(self._facts, tables))
        self._clocks = _clocks(team)
        self.add(judge_host.clocks(self._clocks))

    def _storage_shared(self, place: str | None, team: ProbeGroup) -> None:
        if place is None:
            text = "not tried: give a job file or --storage"
            self.add([Finding(check="storage", level="skipped", found=text)])
            return
        place = storage.absolute(place)
        self._storage = storage.try_storage(place, team)
        self.add(storage.judge(place, self._storage))

    def _import_times(self, team: ProbeGroup, tables: Mapping[str, Node], gpu: bool) -> None:
        libraries = list(judge_software.TRAINING)
        answers = team.ask_all("imports", libraries, _IMPORT_S, timeout_s=_IMPORT_S + 10)
        for name in team.names:
            lost = {"seconds": {}, "errors": {", ".join(libraries): team.errors.get(name, "")}, "torch_gpus": None}
            self._imports[name] = Imports.model_validate(answers.get(name, lost))
        self.add(judge_software.imports(self._imports))
        self.add(judge_gpus.gpus(self._facts, tables, self._imports, gpu))

    def _all_reduce(self, nodes: Sequence[Node], gpu: bool) -> None:
        with_gpus = [node for node in nodes if node.ray_gpus >= 1] if gpu else []
        if len(nodes) < 2 and sum(node.ray_gpus for node in with_gpus) < 2:
            self.add([Finding(check="network", level="skipped", found="one node: there is nothing between nodes")])
            return
        self._network = network.measure(nodes, with_gpus)
        self.add(judge_network.network(self._network))


@contextmanager
def _team(tables: Mapping[str, Node]) -> Iterator[tuple[ProbeGroup, dict[str, str]]]:
    """A probe on each node, and why there is none on some."""
    from launcher.submit.doctor.probes import Probe

    team = ProbeGroup(Probe, threads=4)
    try:
        for name, node in tables.items():
            team.add(name, node)
        silent = team.muster(_START_S)
        yield team, {name: team.errors[name] for name in silent}
    finally:
        team.dismiss()


def _answering(facts: Sequence[str], silent: Mapping[str, str]) -> list[Finding]:
    remedy = (
        "look at {who} (`ray status`; Ray's logs there): it hangs, is overloaded, or has another Ray or another minor "
        "version of Python, which cannot run what is sent to it"
    )
    complaints = [Issue(name, "problem", "silent", f"runs no probe ({why})", remedy) for name, why in silent.items()]
    alive = f"{len(facts)} node{'s' * (len(facts) != 1)} alive, and answering"
    return group_issues("nodes", complaints) or [Finding(check="nodes", level="ok", found=alive)]


def _clocks(team: ProbeGroup) -> dict[str, Clock]:
    """Offsets by the shortest of some round trips: the node's time is compared with the middle of the trip."""
    best: dict[str, Clock] = {}
    for number in range(_CLOCK_ROUNDS):
        # One by one: answers that queue here would look like a slow node. Who was silent is not waited for again.
        for name in list(best) if number else team.names:
            sent = time.time()
            answer = team.ask({name: ()}, "clock", _CLOCK_S)
            received = time.time()
            half = (received - sent) / 2
            if name in answer and (name not in best or half < best[name].uncertainty_s):
                best[name] = Clock(offset_s=answer[name] - sent - half, uncertainty_s=half)
    return best


def nodes_of(tables: Iterable[Mapping[str, Any]]) -> dict[str, Node]:
    """The nodes that are alive, by a name that tells them apart: the host's, with more where two share it."""
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
