"""Judges all-reduces: an absolute floor, and each node and link against the median of the others. Pure."""

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence

from launcher.submit.doctor.facts import Finding, Level, Network, Transfer
from launcher.submit.doctor.words import duration, some, span, speed

# 100 Mbit/s moves the gradients of a model of 100 M parameters in a minute; 1 Gbit/s is the least that is sold today.
_FLOOR, _LOW = 12.5e6, 125e6
_OUTLIER, _DOUBTFUL = 4.0, 2.0
_SLOW_ANSWER_S = 5e-3  # inside one data centre it is below 1 ms
_GB = 1e9


def network(found: Network) -> list[Finding]:
    """Name the nodes and links that are slow or broken, else give the figures."""
    links = {(pair.nodes[0], pair.nodes[1]): pair.bytes_per_s for pair in found.pairs if not pair.error}
    slow = _slow(links, found.ring.nodes)
    if slow and found.ring.bytes_per_s:
        slow[-1] = slow[-1].model_copy(update={"found": f"{slow[-1].found}; {_ring(found)}{_cost(found)}"})
    # Where the slow one is known, the whole group's speed only shows what that costs.
    findings = [*_broken(found), *slow, *([] if slow else _floor(found, links)), *_latency(found)]
    if not findings and found.ring.ranks:
        findings.append(Finding(check="network", level="ok", found=_figures(found, links)))
    if found.note:
        remedy = "mend what `gpus` says, or run the doctor when nobody uses the GPUs, to measure NCCL"
        findings.insert(0, Finding(check="network", level="warning", found=found.note, remedy=remedy))
    return findings


def _figures(found: Network, links: Mapping[tuple[str, str], float]) -> str:
    ring = found.ring
    text = (
        f"{found.backend} all-reduce over {ring.ranks} ranks: {speed(ring.bytes_per_s)}, "
        f"{duration(ring.latency_s)} latency"
    )
    if links:
        text += f"; between pairs {span(speed(min(links.values())), speed(max(links.values())))}"
    return text


def _broken(found: Network) -> list[Finding]:
    """Groups that were not formed: by the node where all of a node's failed, by the pair else."""
    remedy = (
        "workers must reach each other on all ports: look at firewalls and network policies, and name the interface "
        "that joins the nodes in NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME (cluster.pass_env)"
    )
    meetings: dict[str, list[Transfer]] = defaultdict(list)
    for pair in found.pairs:
        for name in pair.nodes:
            meetings[name].append(pair)
    alone = [name for name, pairs in meetings.items() if all(pair.error for pair in pairs)]
    if meetings and len(alone) == len(meetings):
        text = f"no two of {some(alone)} could form a group ({found.pairs[0].error})"
        return [Finding(check="network", level="problem", found=text, remedy=remedy)]
    texts = [f"{name} forms no group with any other node ({meetings[name][0].error})" for name in alone]
    texts += [
        f"{' and '.join(pair.nodes)} form no group ({pair.error})"
        for pair in found.pairs
        if pair.error and not set(pair.nodes) & set(alone)
    ]
    if found.ring.error and not texts:
        texts = [f"{some(found.ring.nodes)} form no group together ({found.ring.error})"]
    return [Finding(check="network", level="problem", found=text, remedy=remedy) for text in texts]


def _slow(links: Mapping[tuple[str, str], float], training: Sequence[str]) -> list[Finding]:
    """Outliers. A node is as fast as its best link; a link is an outlier of its own where both its nodes are not."""
    best: dict[str, float] = {}
    for (a, b), value in links.items():
        best[a], best[b] = max(best.get(a, 0.0), value), max(best.get(b, 0.0), value)
    findings: list[Finding] = []
    slow: list[str] = []
    for name, value in best.items():
        median = _median([other for key, other in best.items() if key != name])
        if len(best) > 2 and value * _DOUBTFUL < median:
            slow.append(name)
            text = f"{name} is slow: {speed(value)} on its best link, the other nodes {speed(median)}"
            remedy = (
                f"look at the network card, cable and switch port of {name}, and at other load there; else leave it out"
            )
            level: Level = "problem" if value * _OUTLIER < median and name in training else "warning"
            findings.append(Finding(check="network", level=level, found=text, remedy=remedy))
    for (a, b), value in links.items():
        median = _median([other for key, other in links.items() if key != (a, b)])
        if len(links) > 2 and a not in slow and b not in slow and value * _OUTLIER < median:
            text = f"the link between {a} and {b} is slow: {speed(value)}, the other links {speed(median)}"
            remedy = (
                f"look at the way between {a} and {b} (another rack or zone?); choose nodes that are near each other"
            )
            findings.append(Finding(check="network", level="problem", found=text, remedy=remedy))
    return findings


def _median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else 0.0


def _floor(found: Network, links: Mapping[tuple[str, str], float]) -> list[Finding]:
    """The whole group, or the only link, against what training needs at least."""
    value = found.ring.bytes_per_s
    if found.ring.error or not value or value >= _LOW:
        return []
    slowest = min(links, key=lambda link: links[link]) if links else None
    where = f"; the slowest link, {slowest[0]} to {slowest[1]}, {speed(links[slowest])}" if slowest else ""
    text = f"{_ring(found)}{where}{_cost(found)}"
    remedy = (
        "use the fast interface of the nodes (NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME), a faster network, or fewer "
        "nodes with more GPUs each"
    )
    return [Finding(check="network", level="problem" if value < _FLOOR else "warning", found=text, remedy=remedy)]


def _ring(found: Network) -> str:
    return f"{found.backend} all-reduce over {some(found.ring.nodes)}: {speed(found.ring.bytes_per_s)}"


def _cost(found: Network) -> str:
    return f": gradients of 1 GB take {2 * _GB / found.ring.bytes_per_s:.1f} s per step"


def _latency(found: Network) -> list[Finding]:
    pairs = [pair for pair in found.pairs if not pair.error and pair.latency_s > _SLOW_ANSWER_S]
    if not pairs:
        return []
    worst = max(pairs, key=lambda pair: pair.latency_s)
    text = f"{duration(worst.latency_s)} latency between {' and '.join(worst.nodes)}; below 1 ms is usual"
    remedy = "choose nodes of one zone, near each other: every step pays this several times"
    return [Finding(check="network", level="warning", found=text, remedy=remedy)]
