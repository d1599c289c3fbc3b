"""Checks of what nodes share: the storage, and the network by all-reduces. Pure; runs on the client.

The network is compared with an absolute minimum, and each node and link with the median of the others.
"""

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence

from launcher.formatting import format_size
from launcher.submit.doctor.facts import (
    Finding,
    Issue,
    Level,
    Network,
    StorageSeen,
    Transfer,
    duration,
    finding,
    group_issues,
    some,
    span,
    speed,
)

# As Ray's own limit for disks (RAY_local_fs_capacity_threshold).
_FULL = 0.95
# Two checkpoints of a model of 400 M parameters with its optimizer states.
_LITTLE_STORAGE = 10 * 2**30
_FREE_STORAGE = "free space: a checkpoint takes up to 16 bytes per parameter (weights, moments, fp32 copies)"
# 100 Mbit/s moves the gradients of a model of 100 M parameters in a minute; 1 Gbit/s is the least that is sold today.
_MIN_BYTES_PER_S, _LOW_BYTES_PER_S = 12.5e6, 125e6
_SLOW_FACTOR, _DOUBTFUL_FACTOR = 4.0, 2.0
# Inside one data centre it is below 1 ms.
_HIGH_LATENCY_S = 5e-3
_GB = 1e9


def storage(place: str, nodes: Mapping[str, StorageSeen]) -> list[Finding]:
    """Check that all nodes can write, see the same files, and have free space."""
    findings: list[Finding] = []
    reasons: dict[str, list[str]] = defaultdict(list)
    for name, seen in nodes.items():
        if seen.wrote:
            reasons[seen.wrote].append(name)
    for reason, names in reasons.items():
        remedy = f"mount {place} on {some(names)} with write permission and free space, or give another storage"
        text = f"{some(names)} cannot write to {place} ({reason})"
        findings.append(finding("storage", "problem", text, remedy))
    findings += _unshared(place, nodes)
    findings += _storage_space(place, nodes)
    if not findings:
        free = [seen.disk.free_bytes for seen in nodes.values() if seen.disk is not None]
        space = f", {span(format_size(min(free)), format_size(max(free)))} free" if free else ""
        shared = "all nodes write and read the same files" if len(nodes) > 1 else "can be written and read"
        findings.append(finding("storage", "ok", f"{place}: {shared}{space}"))
    return findings


def _unshared(place: str, nodes: Mapping[str, StorageSeen]) -> list[Finding]:
    """Find nodes that see other files than the largest set of nodes that see each other's files."""
    wrote = frozenset(name for name, seen in nodes.items() if not seen.wrote)
    if len(wrote) == 0 or all(set(seen.sees) >= wrote for seen in nodes.values()):
        return []
    groups: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for name, seen in nodes.items():
        groups[seen.sees].append(name)
    remedy = (
        f"mount the same network file system at {place} on all nodes (with KubeRay: one ReadWriteMany volume in the "
        "head and every worker group), or give an object store (s3://, gs://)"
    )
    largest = max(groups.values(), key=len)
    # All see only themselves: then no node is the odd one out.
    if len(nodes) > 1 and len(largest) == 1:
        text = f"{place} is another directory on each of {some(nodes)}: not shared"
    else:
        others = [name for names in groups.values() if names is not largest for name in names]
        text = f"{some(others)} see{'s' if len(others) == 1 else ''} another {place} than {some(largest)}"
    return [finding("storage", "problem", text, remedy)]


def _storage_space(place: str, nodes: Mapping[str, StorageSeen]) -> list[Finding]:
    issues: list[Issue] = []
    for name, seen in nodes.items():
        if seen.disk is None or not seen.disk.total_bytes:
            continue
        free, total = seen.disk.free_bytes, seen.disk.total_bytes
        is_full = 1 - free / total >= _FULL
        if is_full or free < _LITTLE_STORAGE:
            text = f"{place} has {format_size(free)} of {format_size(total)} free"
            issues.append(Issue(name, "problem" if is_full else "warning", "room", text, _FREE_STORAGE))
    return group_issues("storage", issues)


def network(measured: Network) -> list[Finding]:
    """Find slow or broken nodes and links; otherwise report the figures."""
    links = {(pair.nodes[0], pair.nodes[1]): pair.bytes_per_s for pair in measured.pairs if not pair.error}
    slow = _slow(links, measured.ring.nodes)
    if slow and measured.ring.bytes_per_s:
        slow[-1] = slow[-1].model_copy(update={"found": f"{slow[-1].found}; {_ring(measured)}{_cost(measured)}"})
    # Where a slow node or link is known, the speed of the whole group only shows what that costs.
    findings = [*_broken(measured), *slow, *([] if slow else _below_minimum(measured, links)), *_latency(measured)]
    if not findings and measured.ring.ranks:
        findings.append(finding("network", "ok", _figures(measured, links)))
    if measured.note:
        remedy = "fix what `gpus` reports, or run the doctor when the GPUs are idle, to measure NCCL"
        findings.insert(0, finding("network", "warning", measured.note, remedy))
    return findings


def _figures(measured: Network, links: Mapping[tuple[str, str], float]) -> str:
    ring = measured.ring
    text = (
        f"{measured.backend} all-reduce over {ring.ranks} ranks: {speed(ring.bytes_per_s)}, "
        f"{duration(ring.latency_s)} latency"
    )
    if links:
        text += f"; between pairs {span(speed(min(links.values())), speed(max(links.values())))}"
    return text


def _broken(measured: Network) -> list[Finding]:
    """Find groups that could not be formed: by node where all of its groups failed, otherwise by pair."""
    remedy = (
        "workers must reach each other on all ports: look at firewalls and network policies, and name the interface "
        "that joins the nodes in NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME (cluster.pass_env)"
    )
    meetings: dict[str, list[Transfer]] = defaultdict(list)
    for pair in measured.pairs:
        for name in pair.nodes:
            meetings[name].append(pair)
    alone = [name for name, pairs in meetings.items() if all(pair.error for pair in pairs)]
    if meetings and len(alone) == len(meetings):
        text = f"no two of {some(alone)} could form a group ({measured.pairs[0].error})"
        return [finding("network", "problem", text, remedy)]
    texts = [f"{name} forms no group with any other node ({meetings[name][0].error})" for name in alone]
    texts += [
        f"{' and '.join(pair.nodes)} form no group ({pair.error})"
        for pair in measured.pairs
        if pair.error and not set(pair.nodes) & set(alone)
    ]
    if measured.ring.error and not texts:
        texts = [f"{some(measured.ring.nodes)} form no group together ({measured.ring.error})"]
    return [finding("network", "problem", text, remedy) for text in texts]


def _slow(links: Mapping[tuple[str, str], float], training: Sequence[str]) -> list[Finding]:
    """Find outliers: a node by its best link; a link by itself only where both its nodes are fast."""
    best: dict[str, float] = {}
    for (a, b), value in links.items():
        best[a], best[b] = max(best.get(a, 0.0), value), max(best.get(b, 0.0), value)
    findings: list[Finding] = []
    slow: list[str] = []
    for name, value in best.items():
        median = _median([other for key, other in best.items() if key != name])
        # Of two nodes both share their only link: neither can be named.
        if len(best) > 2 and value * _DOUBTFUL_FACTOR < median:
            slow.append(name)
            text = f"{name} is slow: {speed(value)} on its best link, the other nodes {speed(median)}"
            remedy = f"check network card, cable and switch port of {name}, and other load there; or train without it"
            level: Level = "problem" if value * _SLOW_FACTOR < median and name in training else "warning"
            findings.append(finding("network", level, text, remedy))
    for (a, b), value in links.items():
        median = _median([other for key, other in links.items() if key != (a, b)])
        if len(links) > 2 and a not in slow and b not in slow and value * _SLOW_FACTOR < median:
            text = f"the link between {a} and {b} is slow: {speed(value)}, the other links {speed(median)}"
            remedy = f"check the connection between {a} and {b} (another rack or zone?); choose nodes near each other"
            findings.append(finding("network", "problem", text, remedy))
    return findings


def _median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else 0.0


def _below_minimum(measured: Network, links: Mapping[tuple[str, str], float]) -> list[Finding]:
    """Compare the whole group, or the only link, with the minimum for training."""
    value = measured.ring.bytes_per_s
    if measured.ring.error or not value or value >= _LOW_BYTES_PER_S:
        return []
    slowest = min(links, key=lambda link: links[link]) if links else None
    where = f"; the slowest link, {slowest[0]} to {slowest[1]}, {speed(links[slowest])}" if slowest else ""
    text = f"{_ring(measured)}{where}{_cost(measured)}"
    remedy = (
        "use the fast interface of the nodes (NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME), a faster network, or fewer "
        "nodes with more GPUs each"
    )
    return [finding("network", "problem" if value < _MIN_BYTES_PER_S else "warning", text, remedy)]


def _ring(measured: Network) -> str:
    return f"{measured.backend} all-reduce over {some(measured.ring.nodes)}: {speed(measured.ring.bytes_per_s)}"


def _cost(measured: Network) -> str:
    return f": gradients of 1 GB take {2 * _GB / measured.ring.bytes_per_s:.1f} s per step"


def _latency(measured: Network) -> list[Finding]:
    pairs = [pair for pair in measured.pairs if not pair.error and pair.latency_s > _HIGH_LATENCY_S]
    if not pairs:
        return []
    worst = max(pairs, key=lambda pair: pair.latency_s)
    text = f"{duration(worst.latency_s)} latency between {' and '.join(worst.nodes)}; below 1 ms is usual"
    remedy = "choose nodes of one zone, near each other: every step pays this several times"
    return [finding("network", "warning", text, remedy)]
