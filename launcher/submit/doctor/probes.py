"""Probes of a cluster: joining it, actors on its nodes, and what takes several of them. Runs on the client.

Calls have time limits: a node that does not answer is an answer as well. `actors.py` has the code of the
nodes; `report.py` calls this module in order.
"""

import logging
import os
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any  # actor classes and handles, and the plain values they send; Ray types neither

import psutil

from launcher.errors import ClusterError
from launcher.processes.ray_address import check_reachable, resolve
from launcher.rundir.uri import open_uri
from launcher.submit.doctor.facts import Disk, Network, Node, StorageSeen, Transfer, some

_NO_NODE = (
    "{address}: the cluster answers, but this machine is no node of it; run the command on a node (for example "
    "`ray job submit -- launcher doctor --address auto`), or give ray://HOST:10001"
)
_WRITE_S = 30.0
# NFS looks up a cached directory again after some seconds.
_READ_S = 15.0
_CLEAN_S = 20.0

_ROUNDS = 3
# Importing torch from a cold disk.
_READY_S = 60.0
_JOIN_S = 20.0
_BUDGET_S = 2.0  # time of one measurement
# One message over a link of 1 Mbit/s takes seconds.
_PATIENCE_S = 30.0
_ALL_S = 120.0
# The buckets that gradients travel in are 25 MB to 500 MB.
_MAX_BYTES = {"gloo": 2**26, "nccl": 2**28}


@contextmanager
def joined(address: str | None, environment: Mapping[str, str]) -> Iterator[str]:
    """Connect to the Ray of the address or of RAY_ADDRESS, otherwise to a local one that ends with the block.

    `ray.init` alone waits for minutes for a dead address, and reports a refused token as one.

    Args:
        address: Address as the user gave it.
        environment: Environment variables of the probes.

    Yields:
        Address that was joined; empty for a local Ray.

    Raises:
        ClusterError: The address, the token or the versions are wrong; the message has the remedy.
    """
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    resolved = resolve(address, os.environ)
    if resolved:
        cluster = check_reachable(resolved)
        if not resolved.startswith("ray://") and not is_node(cluster):
            raise ClusterError(_NO_NODE.format(address=resolved))
    runtime_env = {"env_vars": dict(environment)} if environment else None
    try:
        ray.init(
            address=resolved or "local",
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env=runtime_env,
            include_dashboard=None if resolved else False,
        )
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise ClusterError(join_error(resolved, error)) from error
    try:
        yield resolved
    finally:
        ray.shutdown()


def is_node(cluster: bytes) -> bool:
    """Return whether a node of the cluster runs here with sockets that can be reached.

    `ray.init` aborts the whole process where it cannot reach them: a host sees the processes of its containers, but not
    their sockets.

    Args:
        cluster: Answer of the cluster, which contains its identity.
    """
    sockets: list[str] = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or ()
        options = dict(word.split("=", 1) for word in words if word.startswith("--") and "=" in word)
        identity = options.get("--cluster-id", "")
        path = options.get("--raylet_socket_name")
        # The answer holds the identity as bytes, the raylet's command line as hex. A search spares us Ray's private
        # message format.
        if path and identity and identity in cluster.hex():
            sockets.append(path)
    return bool(sockets) and all(os.path.exists(path) for path in sockets)


def join_error(address: str, error: Exception) -> str:
    """Return one sentence for an error of `ray.init`."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    cause = str(error.__cause__ or "")
    if "ersion mismatch" in str(error):
        return (
            f"{address}: {' '.join(lines)}; run the doctor with the cluster's own versions of Ray and Python, in its "
            "image"
        )
    if "No node info found" in cause or "raylet" in cause.lower():
        return _NO_NODE.format(address=address)
    reason = lines[0] if lines else type(error).__name__
    return f"{address}: Ray could not join ({reason})" if address else f"no local Ray could be started ({reason})"


@contextmanager
def by_value() -> Iterator[None]:
    """Send the code of actors instead of its name, so that a node needs no launcher."""
    # Ray pickles with a copy of its own: registering in the package cloudpickle would have no effect.
    from ray import cloudpickle

    from launcher import errors, formatting
    from launcher.rundir import uri
    from launcher.submit.doctor import actors

    modules = (actors, uri, errors, formatting)  # the last three for `open_uri`
    for module in modules:
        cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        for module in modules:
            cloudpickle.unregister_pickle_by_value(module)


class ProbeGroup:
    """Actors of one class, each pinned to its node. They reserve no CPUs, so that a head with 0 CPUs has one too.

    Args:
        actor: Class of the actors, with a method `ready`.
        gpus: Number of GPUs that each one reserves.
        threads: Number of calls that one of them runs at the same time.
    """

    def __init__(self, actor: type, gpus: float = 0.0, threads: int = 1) -> None:
        self._actor = actor
        self._gpus = gpus
        self._threads = threads
        self._nodes: dict[str, Node] = {}
        self._handles: dict[str, Any] = {}
        self.errors: dict[str, str] = {}
        """Reason why an actor's latest answer is missing."""

    @property
    def names(self) -> list[str]:
        """Return the running actors, in the order they were added."""
        return list(self._handles)

    def add(self, name: str, node: Node) -> None:
        """Start an actor on a node; `wait_ready` waits for it."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        actor: Any = ray.remote(self._actor).options(
            num_cpus=0,
            num_gpus=self._gpus,
            # soft=True would place the probe of a lost node on another one, which then answers for both.
            scheduling_strategy=NodeAffinitySchedulingStrategy(node.node_id, soft=False),
            max_concurrency=self._threads,
            max_restarts=0,
        )
        self._nodes[name] = node
        self._handles[name] = actor.remote()

    def wait_ready(self, timeout_s: float) -> list[str]:
        """Wait until the actors have started, end those that have not, and return the names of these."""
        ready = self.call({name: () for name in self.names}, "ready", timeout_s)
        missing = [name for name in self.names if name not in ready]
        for name in missing:
            self._kill(name)
        return missing

    def call(self, calls: Mapping[str, tuple[Any, ...]], method: str, timeout_s: float) -> dict[str, Any]:
        """Call a method of actors with arguments of their own; return the answers in time, by name."""
        import ray

        # All calls start before the first is awaited: those that form a group wait for each other.
        refs = {
            name: getattr(self._handles[name], method).remote(*arguments)
            for name, arguments in calls.items()
            if name in self._handles
        }
        done, _ = ray.wait(list(refs.values()), num_returns=len(refs), timeout=timeout_s) if refs else ([], [])
        answers: dict[str, Any] = {}
        for name, ref in refs.items():
            if ref not in done:
                # Nothing cancels the call. Its actor may be busy with it, and later calls then wait behind it.
                self.errors[name] = f"no answer within {timeout_s:.0f} s"
                continue
            try:
                answers[name] = ray.get(ref)
            except Exception as error:  # noqa: BLE001  # process border: any error there is to be reported
                cause = getattr(error, "cause", None) or error
                lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
                self.errors[name] = f"{type(cause).__name__}: {lines[-1] if lines else ''}"[:300]
        return answers

    def call_all(self, method: str, *arguments: Any, timeout_s: float) -> dict[str, Any]:
        """Call a method of all actors with the same arguments."""
        return self.call(dict.fromkeys(self.names, arguments), method, timeout_s)

    def restart(self, timeout_s: float) -> list[str]:
        """Start the same actors in new processes; return the names of those that are not ready."""
        nodes = {name: self._nodes[name] for name in self.names}
        self.stop()
        for name, node in nodes.items():
            self.add(name, node)
        return self.wait_ready(timeout_s)

    def stop(self) -> None:
        """End all actors."""
        for name in self.names:
            self._kill(name)

    def _kill(self, name: str) -> None:
        import ray

        ray.kill(self._handles.pop(name))


def absolute(storage: str) -> str:
    """Return the storage as every node gets it: a relative path would mean another directory there."""
    return storage.rstrip("/") if "://" in storage else os.path.abspath(os.path.expanduser(storage))


def try_storage(storage: str, group: ProbeGroup) -> dict[str, StorageSeen]:
    """Write a file with a token on each node, and read the others' files there; by name of the node."""
    files = {name: f"{number:04d}.txt" for number, name in enumerate(group.names)}
    contents = {file: secrets.token_hex(32) for file in files.values()}
    place = f"{storage}/.launcher-doctor-{secrets.token_hex(8)}"
    # Before the first write: afterwards no node could tell which directories are new.
    made = group.call_all("missing", open_uri, place, timeout_s=_WRITE_S)
    try:
        calls = {name: (open_uri, place, file, contents[file]) for name, file in files.items()}
        wrote = group.call(calls, "write", _WRITE_S)
        written = {files[n]: contents[files[n]] for n, answer in wrote.items() if not answer["wrote"]}
        read = group.call_all("read", open_uri, place, written, _READ_S, timeout_s=_READ_S + _WRITE_S)
    finally:  # an interrupt too leaves nothing in the storage
        cleanups = {name: (open_uri, place, list(contents), made.get(name, [])) for name in group.names}
        group.call(cleanups, "clean", _CLEAN_S)
    names = {file: name for name, file in files.items()}
    seen: dict[str, StorageSeen] = {}
    for name in group.names:
        answer = wrote.get(name, {"wrote": group.errors.get(name, "no answer"), "disk": None})
        sees = tuple(sorted(names[file] for file in read.get(name, [])))
        disk = Disk.model_validate(answer["disk"]) if answer["disk"] else None
        seen[name] = StorageSeen(wrote=answer["wrote"], sees=sees, disk=disk)
    return seen


def measure_network(nodes: Sequence[Node], with_gpus: Sequence[Node]) -> Network:
    """Measure all-reduces over the nodes that train, then between pairs of nodes.

    A head that does not train is measured too where fewer than three nodes train: two alone cannot tell which is slow.

    Args:
        nodes: Nodes that answer.
        with_gpus: Nodes whose GPUs are to train; NCCL is tried between all their GPUs.
    """
    training = [node for node in nodes if node.trains]
    in_ring = training if len(training) > 1 else list(nodes)
    in_pairs = list(nodes) if len(training) < 3 else training
    note = ""
    if sum(node.ray_gpus for node in with_gpus) > 1:
        with _rank_probes(with_gpus, is_gpu=True) as (group, missing):
            devices = group.call_all("ready", timeout_s=_READY_S)
            blind = [name for name, device in devices.items() if device != "cuda"]
            if not missing and not blind:
                return _measure(group, with_gpus, with_gpus, "nccl")
        reason = "no free GPU" if missing else "a GPU that torch does not see"
        where = some(_nodes_of(missing or blind))
        note = f"{reason} on {where}: measured between the hosts by gloo"
    if len(nodes) < 2:
        return Network(backend="gloo", ring=Transfer(nodes=(nodes[0].name,)), note=note)
    with _rank_probes(in_pairs, is_gpu=False) as (group, _):
        return _measure(group, in_ring, in_pairs, "gloo").model_copy(update={"note": note})


@contextmanager
def _rank_probes(nodes: Sequence[Node], is_gpu: bool) -> Iterator[tuple[ProbeGroup, list[str]]]:
    """Start a rank per node or per GPU, and yield them with the names of the ranks that did not start."""
    from launcher.submit.doctor.actors import RankProbe

    group = ProbeGroup(RankProbe, gpus=1.0 if is_gpu else 0.0)
    try:
        for node in nodes:
            for number in range(int(node.ray_gpus) if is_gpu else 1):
                group.add(f"{node.name}#{number}", node)
        yield group, group.wait_ready(_READY_S)
    finally:
        group.stop()


def _node_of(rank: str) -> str:
    return rank.rsplit("#", 1)[0]


def _nodes_of(ranks: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(map(_node_of, ranks)))


def _measure(group: ProbeGroup, in_ring: Sequence[Node], in_pairs: Sequence[Node], backend: str) -> Network:
    deadline = time.monotonic() + _ALL_S
    names = [node.name for node in in_ring]
    ranks = tuple(rank for rank in group.names if _node_of(rank) in names)
    members = _nodes_of(ranks)
    missing = [name for name in names if name not in members]
    if missing:
        reason = group.errors.get(f"{missing[0]}#0", "")
        ring = Transfer(nodes=members, error=f"no rank could be started on {some(missing)}: {reason}")
    else:
        (ring,) = _run([ranks], group, _MAX_BYTES[backend])
        if ring.error:  # a rank may still wait inside a library for ranks that never joined
            group.restart(_READY_S)
    pairs: list[Transfer] = []
    for matches in tournament([node.name for node in in_pairs if f"{node.name}#0" in group.names]):
        if time.monotonic() < deadline:
            pairs += _run([(f"{a}#0", f"{b}#0") for a, b in matches], group, _MAX_BYTES[backend])
    return Network(backend=backend, ring=ring, pairs=tuple(pairs))


def tournament(names: Sequence[str], num_rounds: int = _ROUNDS) -> list[list[tuple[str, str]]]:
    """Return rounds of disjoint pairs, measured at once, each name once per round (circle method)."""
    players: list[str | None] = [*names, *([None] if len(names) % 2 else [])]
    rounds: list[list[tuple[str, str]]] = []
    # With an odd number one name pauses in each round: one more round gives all names the same number of matches.
    for _ in range(min(num_rounds + len(names) % 2, len(players) - 1)):
        half = len(players) // 2
        matches = zip(players[:half], reversed(players[half:]), strict=True)
        rounds.append([(a, b) for a, b in matches if a is not None and b is not None])
        # Pairs of a round share no node: two measurements on one network card would halve each other.
        players = [players[0], players[-1], *players[1:-1]]
    return rounds


def _run(groups: Sequence[tuple[str, ...]], probes: ProbeGroup, max_bytes: int) -> list[Transfer]:
    """Form groups of ranks, measure them at the same time, and dissolve them."""
    heads = {ranks[0]: ranks for ranks in groups}
    meetings = probes.call(dict.fromkeys(heads, (_JOIN_S,)), "open", timeout_s=_JOIN_S)
    joins = {
        rank: (meetings[head], number, len(ranks), _JOIN_S)
        for head, ranks in heads.items()
        if head in meetings
        for number, rank in enumerate(ranks)
    }
    # Longer than torch's own limit, so that the rank's reason arrives and not only silence.
    joined_ranks = probes.call(joins, "join", timeout_s=_JOIN_S + 5)
    # Only complete groups measure: a single missing rank would block all others of its group until the time limit.
    measuring = [rank for ranks in groups if all(rank in joined_ranks for rank in ranks) for rank in ranks]
    calls = {rank: (_BUDGET_S, max_bytes) for rank in measuring}
    timings = probes.call(calls, "measure", timeout_s=_PATIENCE_S)
    results = [_transfer(ranks, timings, probes) for ranks in groups]
    # A rank without an answer may hang in a collective, and the call would wait behind that.
    probes.call({rank: () for rank in measuring if rank in timings}, "leave", _JOIN_S)
    return results


def _transfer(ranks: tuple[str, ...], timings: dict[str, Any], probes: ProbeGroup) -> Transfer:
    missing = [rank for rank in ranks if rank not in timings]
    if not missing:
        return Transfer(nodes=_nodes_of(ranks), ranks=len(ranks), **timings[ranks[0]])
    reason = next((probes.errors[rank] for rank in missing if rank in probes.errors), "no answer in time")
    return Transfer(nodes=_nodes_of(ranks), ranks=len(ranks), error=reason)
