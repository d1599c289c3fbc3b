"""Judges whether the cluster has what a job reserves. Pure; runs on the client."""

from collections.abc import Mapping, Sequence

from launcher.spec.cluster import ClusterSpec
from launcher.submit.doctor.facts import Finding, Node


def job(cluster: ClusterSpec, nodes: Sequence[Node], free: Mapping[str, float]) -> list[Finding]:
    """Count how many of the job's workers fit on the nodes, and whether other jobs are in the way.

    Args:
        cluster: what the job reserves.
        nodes: those that are alive.
        free: resources that nobody holds now, over all nodes.
    """
    each = f"{cluster.cpus_per_worker:g} CPU" + (
        f" and {cluster.gpus_per_worker:g} GPU" if cluster.gpus_per_worker else ""
    )
    asks = f"{cluster.workers} worker{'s' * (cluster.workers != 1)} of {each}"
    fit = sum(_fit(cluster, node) for node in nodes)
    if fit < cluster.workers:
        remedy = (
            "add nodes (an autoscaler may do that by itself), or ask for less: cluster.workers, "
            "cluster.cpus_per_worker, cluster.gpus_per_worker"
        )
        found = f"the job asks for {asks}; {fit} fit on the nodes there are, and it would wait for the rest"
        return [Finding(check="job", level="problem", found=found, remedy=remedy)]
    needs = {"CPU": cluster.workers * cluster.cpus_per_worker, "GPU": cluster.workers * cluster.gpus_per_worker}
    short = [f"{free.get(kind, 0.0):g} {kind}" for kind, amount in needs.items() if amount > free.get(kind, 0.0)]
    if short:
        found = f"the job asks for {asks}; other jobs leave {' and '.join(short)} free now"
        return [Finding(check="job", level="warning", found=found, remedy="it waits until they end (`ray status`)")]
    return [Finding(check="job", level="ok", found=f"{asks} fit: there is room for {fit}")]


def _fit(cluster: ClusterSpec, node: Node) -> int:
    """Whole workers on one node; reservations are exact to 0.0001 in Ray."""
    fits = [int(node.ray_cpus / cluster.cpus_per_worker + 1e-4)]
    if cluster.gpus_per_worker:
        fits.append(int(node.ray_gpus / cluster.gpus_per_worker + 1e-4))
    return min(fits)
