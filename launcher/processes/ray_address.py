"""The address of a Ray cluster: what it stands for, and whether anything answers there. Runs on the client and head.

`ray.init` alone waits for many minutes for an address that is dead, and takes a refused token for one.
"""

import os
import socket
import threading
from collections.abc import Mapping
from pathlib import Path

from launcher.errors import ClusterError

_CONNECT_S = 5.0
_PORTS = {"ray": 10001, "gcs": 6379}
# The first call of each service; both take an empty message.
_CALLS = {"ray": "/ray.rpc.RayletDriver/ClusterInfo", "gcs": "/ray.rpc.NodeInfoGcsService/GetClusterId"}
_FORMS = "give auto, HOST:6379 (on a node of the cluster), or ray://HOST:10001 (from elsewhere)"
_DOCS = "https://docs.ray.io/en/latest/ray-security/token-auth.html"


def check_address(address: str | None) -> None:
    """Refuse a cluster that does not answer; nothing where a job joins none.

    Args:
        address: `cluster.address` of the job; None looks at RAY_ADDRESS.

    Raises:
        ClusterError: Names the key or variable, and what to do.
    """
    from_job = address is not None and (address != "auto" or not os.environ.get("RAY_ADDRESS"))
    if not address and not os.environ.get("RAY_ADDRESS"):
        return
    try:
        wanted = resolve(address, os.environ)
        if wanted:
            check_reachable(wanted)
    except ClusterError as error:
        key, leave_out = ("cluster.address", "leave it out") if from_job else ("RAY_ADDRESS", "unset it")
        raise ClusterError(f"{key}: {error.message}; {leave_out} for a Ray of this machine alone") from error


def resolve(address: str | None, environment: Mapping[str, str]) -> str:
    """The address to join: HOST:PORT or ray://HOST:PORT; empty for a local Ray.

    Raises:
        ClusterError: it is of no form that can be joined, or `auto` finds nothing.
    """
    found = address if address not in (None, "auto") else environment.get("RAY_ADDRESS") or address
    if found is None or found == "local":
        return ""
    if found == "auto":
        from ray._private.services import canonicalize_bootstrap_address  # what ray.init("auto") does first

        try:
            found = canonicalize_bootstrap_address("auto") or ""
        except ConnectionError as error:
            raise ClusterError(
                "no Ray runs on this machine, so that address auto finds none; start one (`ray start --head`), "
                "or give the address of another: HOST:6379 on a node of it, ray://HOST:10001 from elsewhere"
            ) from error
    scheme, _, rest = found.rpartition("://")
    if scheme in ("http", "https"):
        raise ClusterError(
            f"{found} is the address of a dashboard, where jobs are submitted; this command joins the cluster: {_FORMS}"
        )
    if scheme not in ("", "ray") or not rest:
        raise ClusterError(f"{found} is not an address of a Ray cluster; {_FORMS}")
    host, port = split(found)
    return f"ray://{host}:{port}" if scheme else f"{host}:{port}"


def split(address: str) -> tuple[str, int]:
    """Host and port; a port that is not given is Ray's own.

    Raises:
        ClusterError: the port is not a number.
    """
    scheme, _, rest = address.rpartition("://")
    host, colon, port = rest.rpartition(":")
    if not colon:
        return rest, _PORTS["ray" if scheme else "gcs"]
    if not port.isdigit() or not 0 < int(port) < 65536 or not host:
        raise ClusterError(f"{address}: {port or 'nothing'} is no number of a port; {_FORMS}")
    return host, int(port)


def check_reachable(address: str) -> bytes:
    """Look up the host, connect, and let Ray answer one call, each within seconds.

    Returns:
        The answer; the cluster's identity is in it where the address is the GCS.

    Raises:
        ClusterError: which of them failed, and what to do.
    """
    host, port = split(address)
    found: list[OSError | None] = []

    def look_up() -> None:
        try:
            socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            found.append(None)
        except OSError as error:
            found.append(error)

    thread = threading.Thread(target=look_up, daemon=True)  # a dead name server is waited for without a limit
    thread.start()
    thread.join(_CONNECT_S)
    if not found or found[0] is not None:
        why = str(found[0]) if found else f"no answer from the name server within {_CONNECT_S:.0f} s"
        raise ClusterError(
            f"{address}: the host {host} is not known here ({why}); check the spelling, or give its IP address"
        )
    try:
        socket.create_connection((host, port), timeout=_CONNECT_S).close()
    except TimeoutError as error:
        raise ClusterError(
            f"{address}: no answer from {host} within {_CONNECT_S:.0f} s; is the machine up, and does a firewall or "
            f"network policy let port {port} through?"
        ) from error
    except OSError as error:
        raise ClusterError(
            f"{address}: nothing listens there ({os.strerror(error.errno or 0)}); is Ray running on {host}, and is "
            f"{port} its port? {_FORMS}"
        ) from error
    return _check_service(address)


def _check_service(address: str) -> bytes:
    """One call to the service that should be there; the token is looked at before anything else."""
    import grpc  # type: ignore[import-untyped]  # ships no types
    from ray._private.grpc_utils import init_grpc_channel  # knows Ray's settings for TLS and tokens
    from ray.exceptions import AuthenticationError

    host, port = split(address)
    kind = "ray" if address.startswith("ray://") else "gcs"
    try:
        channel = init_grpc_channel(f"{host}:{port}")
        try:
            return bytes(channel.unary_unary(_CALLS[kind])(b"", timeout=_CONNECT_S))
        finally:
            channel.close()
    except AuthenticationError as error:
        raise ClusterError(token_problem(address, os.environ, Path.home())) from error
    except grpc.RpcError as error:
        code = error.code()
        if code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
            raise ClusterError(token_problem(address, os.environ, Path.home())) from error
        if kind == "ray" and code == grpc.StatusCode.NOT_FOUND:  # it knows no client of that name: it is there
            return b""
        if code == grpc.StatusCode.DEADLINE_EXCEEDED:
            raise ClusterError(
                f"{address}: the connection is taken, but nothing answers within {_CONNECT_S:.0f} s; look whether the "
                f"head hangs or is overloaded (its logs, its memory), and whether {port} is Ray's port there"
            ) from error
        service = "the Ray Client server" if kind == "ray" else "Ray's own port (the GCS)"
        raise ClusterError(
            f"{address}: what listens there is not {service} ({code.name.lower().replace('_', ' ')}); {_FORMS}"
        ) from error


def token_problem(address: str, environment: Mapping[str, str], home: Path) -> str:
    """Why the token was missing or wrong, by where Ray looks for it and in this order."""
    file = home / ".ray" / "auth_token"
    given = environment.get("RAY_AUTH_TOKEN_PATH")
    if environment.get("RAY_AUTH_TOKEN"):
        source, has = "RAY_AUTH_TOKEN", True
    elif given:
        source, has = f"the file of RAY_AUTH_TOKEN_PATH, {given}", Path(given).is_file()
    else:
        source, has = str(file), file.is_file()
    take = (
        "put the cluster's token (on the head: `ray get-auth-token`; with KubeRay: key auth_token of the Secret that "
        "is named like the cluster) into RAY_AUTH_TOKEN, into a file named by RAY_AUTH_TOKEN_PATH, or into "
        "~/.ray/auth_token"
    )
    if environment.get("RAY_AUTH_MODE", "").lower() != "token":
        mode = environment.get("RAY_AUTH_MODE") or "not set"
        return (
            f"{address}: the cluster asks for a token and none was sent, as RAY_AUTH_MODE is {mode}; set "
            f"RAY_AUTH_MODE=token{f' (there is a token in {source})' if has else f', and {take}'}; see {_DOCS}"
        )
    if has:
        return f"{address}: the cluster refuses the token in {source}; {take}; see {_DOCS}"
    return f"{address}: the cluster asks for a token and there is none ({source} does not exist); {take}; see {_DOCS}"
