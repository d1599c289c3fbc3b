"""Measures all-reduces over all nodes and between pairs of them. Runs on the client; `ranks.py` runs on the nodes.

All pairs of a round are disjoint and measured at once, as a tournament: every node meets at most `_ROUNDS` others.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from launcher.submit.doctor.facts import Network, Node, Transfer
from launcher.submit.doctor.team import ProbeGroup
from launcher.submit.doctor.words import some

_ROUNDS = 3
_READY_S = 60.0  # torch is imported from a cold disk
_JOIN_S = 20.0
_BUDGET_S = 2.0  # of one measurement
_PATIENCE_S = 30.0  # a message over a link of 1 Mbit/s takes seconds
_ALL_S = 120.0
_MAX_BYTES = {"gloo": 2**26, "nccl": 2**28}  # the buckets that gradients travel in are 25 MB to 500 MB


@dataclass(frozen=True)
class Group:
    """Ranks that reduce together, by the names their team knows them by."""

    ranks: tuple[str, ...]
    nodes: tuple[str, ...]


def measure(nodes: Sequence[Node], with_gpus: Sequence[Node]) -> Network:
    """All-reduces over the nodes that train, then between pairs; a head that trains nothing is a witness among few.

    Args:
        nodes: those that answer.
        with_gpus: those of them whose GPUs are to train; NCCL is tried between all their GPUs.
    """
    training = [node for node in nodes if node.trains]
    in_ring = training if len(training) > 1 else list(nodes)
    in_pairs = list(nodes) if len(training) < 3 else training
    note = ""
    if sum(node.ray_gpus for node in with_gpus) > 1:
        with _team(with_gpus, gpu=True) as (team, absent):
            blind = [name for name, device in team.ask_all("ready", timeout_s=_READY_S).items() if device != "cuda"]
            if not absent and not blind:
                return _measure(team, with_gpus, with_gpus, "nccl")
        why = "no free GPU" if absent else "a GPU that torch does not see"
        where = some(dict.fromkeys(_node_of(name) for name in absent or blind))
        note = f"{why} on {where}: measured between the hosts by gloo"
    if len(nodes) < 2:
        return Network(backend="gloo", ring=Transfer(nodes=(nodes[0].name,)), note=note)
    with _team(in_pairs, gpu=False) as (team, _):
        return _measure(team, in_ring, in_pairs, "gloo").model_copy(update={"note": note})


@contextmanager
def _team(nodes: Sequence[Node], gpu: bool) -> Iterator[tuple[ProbeGroup, list[str]]]:
    """A rank per node or per GPU, and the names of the ranks that could not be had."""
    from launcher.submit.doctor.ranks import Rank

    team = ProbeGroup(Rank, gpus=1.0 if gpu else 0.0)
    try:
        for node in nodes:
            for number in range(int(node.ray_gpus) if gpu else 1):
                team.add(f"{node.name}#{number}", node)
        yield team, team.muster(_READY_S)
    finally:
        team.dismiss()


def _node_of(rank: str) -> str:
    return rank.rsplit("#", 1)[0]


def _measure(team: ProbeGroup, in_ring: Sequence[Node], in_pairs: Sequence[Node], backend: str) -> Network:
    end = time.monotonic() + _ALL_S
    wanted = [node.name for node in in_ring]
    ranks = tuple(rank for rank in team.names if _node_of(rank) in wanted)
    members = tuple(dict.fromkeys(_node_of(rank) for rank in ranks))
    missing = [name for name in wanted if name not in members]
    if missing:
        why = team.errors.get(f"{missing[0]}#0", "")
        ring = Transfer(nodes=members, error=f"no rank could be started on {some(missing)}: {why}")
    else:
        (ring,) = _run([Group(ranks, members)], team, _MAX_BYTES[backend])
        if ring.error:  # a rank may still wait inside a library for those that never came
            team.restart(_READY_S)
    pairs: list[Transfer] = []
    for matches in tournament([node.name for node in in_pairs if f"{node.name}#0" in team.names]):
        if time.monotonic() < end:
            groups = [Group((f"{a}#0", f"{b}#0"), (a, b)) for a, b in matches]
            pairs += _run(groups, team, _MAX_BYTES[backend])
    return Network(backend=backend, ring=ring, pairs=tuple(pairs))


def tournament(names: Sequence[str], rounds: int = _ROUNDS) -> list[list[tuple[str, str]]]:
    """Rounds of disjoint pairs, so that each name meets another one in each round (circle method)."""
    players: list[str | None] = [*names, *([None] if len(names) % 2 else [])]
    found: list[list[tuple[str, str]]] = []
    # With an odd number one sits out each round: one round more gives everybody as many matches.
    for _ in range(min(rounds + len(names) % 2, len(players) - 1)):
        half = len(players) // 2
        matches = zip(players[:half], reversed(players[half:]), strict=True)
        found.append([(a, b) for a, b in matches if a is not None and b is not None])
        players = [players[0], players[-1], *players[1:-1]]
    return found


def _run(groups: Sequence[Group], team: ProbeGroup, max_bytes: int) -> list[Transfer]:
    """Form the groups, measure them at the same time, dissolve them."""
    heads = {group.ranks[0]: group for group in groups}
    meetings = team.ask(dict.fromkeys(heads, (_JOIN_S,)), "open", timeout_s=_JOIN_S)
    joins = {
        rank: (meetings[head], number, len(group.ranks), _JOIN_S)
        for head, group in heads.items()
        if head in meetings
        for number, rank in enumerate(group.ranks)
    }
    joined = team.ask(joins, "join", timeout_s=_JOIN_S + 5)
    whole = [group for group in groups if all(rank in joined for rank in group.ranks)]
    timings = team.ask(
        {rank: (_BUDGET_S, max_bytes) for group in whole for rank in group.ranks}, "measure", timeout_s=_PATIENCE_S
    )
    results = [_transfer(group, timings, team) for group in groups]
    team.ask({rank: () for group in whole for rank in group.ranks if rank in timings}, "leave", timeout_s=_JOIN_S)
    return results


def _transfer(group: Group, timings: dict[str, object], team: ProbeGroup) -> Transfer:
    figures = timings.get(group.ranks[0])
    lost = [rank for rank in group.ranks if rank not in timings]
    if isinstance(figures, dict) and not lost:
        return Transfer(nodes=group.nodes, ranks=len(group.ranks), **figures)
    why = next((team.errors[rank] for rank in lost if rank in team.errors), "no answer in time")
    return Transfer(nodes=group.nodes, ranks=len(group.ranks), error=why)
