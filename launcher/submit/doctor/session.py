"""Joins a cluster, or says within seconds why that is not possible. Runs on the client.

`ray.init` alone waits for minutes for an address that is dead, and takes a refused token for one.
"""

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from launcher.errors import ClusterError
from launcher.processes.ray_address import check_reachable, resolve

_NO_NODE = (
    "{address}: the cluster answers, but this machine is no node of it; run the command on a node (for example "
    "`ray job submit -- launcher doctor --address auto`), or give ray://HOST:10001"
)


@contextmanager
def joined(address: str | None, environment: Mapping[str, str]) -> Iterator[str]:
    """A Ray to look at: the one of the address or of RAY_ADDRESS, else a local one that ends with the block.

    Args:
        address: as the user gave it.
        environment: variables that the probes see.

    Yields:
        The address that was joined; empty for a local Ray.

    Raises:
        ClusterError: what is wrong with the address, the token or the versions, with the remedy.
    """
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    wanted = resolve(address, os.environ)
    if wanted:
        cluster = check_reachable(wanted)
        if not wanted.startswith("ray://") and not is_node(cluster, Path("/proc")):
            raise ClusterError(_NO_NODE.format(address=wanted))
    runtime_env = {"env_vars": dict(environment)} if environment else None
    try:
        ray.init(
            address=wanted or "local",
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env=runtime_env,
            include_dashboard=None if wanted else False,
        )
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise ClusterError(why_refused(wanted, error)) from error
    try:
        yield wanted
    finally:
        ray.shutdown()


def is_node(cluster: bytes, processes: Path) -> bool:
    """Whether a node of the cluster runs here and can be spoken to; ray.init aborts the whole process where it cannot.

    A host sees the processes of its containers, but not their sockets.

    Args:
        cluster: what the cluster answered; has its identity in it.
        processes: /proc; where there is none, ray.init finds out by itself.
    """
    if not (processes / "self").is_dir():
        return True
    sockets: list[str] = []
    for folder in processes.glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:  # it ended meanwhile
            continue
        options = dict(word.split("=", 1) for word in words if word.startswith("--") and "=" in word)
        identity, path = options.get("--cluster-id", ""), options.get("--raylet_socket_name")
        if path and identity and identity in cluster.hex():
            sockets.append(path)
    return bool(sockets) and all(os.path.exists(path) for path in sockets)


def why_refused(address: str, error: Exception) -> str:
    """One sentence for what `ray.init` said."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    cause = str(error.__cause__ or "")
    if "ersion mismatch" in str(error):
        return (
            f"{address}: {' '.join(lines)}; run the doctor with the cluster's own versions of Ray and Python, in its "
            "image"
        )
    if "No node info found" in cause or "raylet" in cause.lower():
        return _NO_NODE.format(address=address)
    if not address:
        return f"no local Ray could be started ({lines[0] if lines else type(error).__name__})"
    return f"{address}: Ray could not join ({lines[0] if lines else type(error).__name__})"
