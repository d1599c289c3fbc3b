"""Address of a Ray cluster: resolve it, and check that Ray answers there. Runs on the client and the head.

`ray.init` waits ten minutes for a dead address, and treats a rejected token like one (ray 2.60).
"""

import os
import socket
import threading
from collections.abc import Mapping
from pathlib import Path

from launcher.errors import ClusterError

_CONNECT_S = 5.0
# Ports of the Ray Client server and of the GCS, where the user names none.
_PORTS = {"ray": 10001, "gcs": 6379}
# One cheap call of each service; both accept an empty message.
# Private names of ray 2.60: if a version renames one, its servers answer UNIMPLEMENTED and are taken for other services
# (`_check_service`).
_CALLS = {"ray": "/ray.rpc.RayletDriver/ClusterInfo", "gcs": "/ray.rpc.NodeInfoGcsService/GetClusterId"}
_FORMS = "give auto, HOST:6379 (on a node of the cluster), or ray://HOST:10001 (from elsewhere)"
_DOCS = "https://docs.ray.io/en/latest/ray-security/token-auth.html"


def check_address(address: str | None) -> None:
    """Check that the cluster of a job answers; do nothing if the job uses a local Ray.

    Args:
        address: Value of `cluster.address`; None uses RAY_ADDRESS.

    Raises:
        ClusterError: It does not answer. Names the key or variable, and the remedy.
    """
    from_job = address is not None and (address != "auto" or not os.environ.get("RAY_ADDRESS"))
    if not address and not os.environ.get("RAY_ADDRESS"):
        return
    try:
        resolved = resolve(address, os.environ)
        if resolved:
            check_reachable(resolved)
    except ClusterError as error:
        key, remedy = ("cluster.address", "leave it out") if from_job else ("RAY_ADDRESS", "unset it")
        raise ClusterError(f"{key}: {error.message}; {remedy} to use a local Ray") from error


def resolve(address: str | None, environment: Mapping[str, str]) -> str:
    """Return the address to connect to: HOST:PORT or ray://HOST:PORT; "" for a local Ray.

    Args:
        address: Value of `cluster.address`. None and `auto` use RAY_ADDRESS if it is set.
        environment: Environment variables.

    Raises:
        ClusterError: The address is malformed, or `auto` finds no Ray.
    """
    resolved = address if address not in (None, "auto") else environment.get("RAY_ADDRESS") or address
    if resolved is None or resolved == "local":
        return ""
    if resolved == "auto":
        from ray._private.services import canonicalize_bootstrap_address  # as in ray.init("auto")

        try:
            resolved = canonicalize_bootstrap_address("auto") or ""
        except ConnectionError as error:
            raise ClusterError(
                "address auto finds no Ray on this machine; start one (`ray start --head`), or give the address of a "
                "cluster: HOST:6379 on one of its nodes, ray://HOST:10001 from elsewhere"
            ) from error
    scheme, _, rest = resolved.rpartition("://")
    if scheme in ("http", "https"):
        raise ClusterError(
            f"{resolved} is the address of a dashboard, for submitting jobs; this command joins the cluster: {_FORMS}"
        )
    if scheme not in ("", "ray") or not rest:
        raise ClusterError(f"{resolved} is not an address of a Ray cluster; {_FORMS}")
    host, port = split(resolved)
    return f"ray://{host}:{port}" if scheme else f"{host}:{port}"


def split(address: str) -> tuple[str, int]:
    """Split an address into host and port; without a port it is Ray's default.

    Raises:
        ClusterError: The port is not a valid number.
    """
    scheme, _, rest = address.rpartition("://")
    host, colon, port = rest.rpartition(":")
    if not colon:
        return rest, _PORTS["ray" if scheme else "gcs"]
    if not port.isdigit() or not 0 < int(port) < 65536 or not host:
        raise ClusterError(f"{address}: {port or 'an empty text'} is not a port number; {_FORMS}")
    return host, int(port)


def check_reachable(address: str) -> bytes:
    """Resolve the host, connect, and make one call, each with a timeout of 5 s.

    Returns:
        Answer of the service; contains the cluster id if the address is the GCS.

    Raises:
        ClusterError: One of the three failed. Names it, and the remedy.
    """
    host, port = split(address)
    # In three steps, as each failure has another remedy. gRPC reports all of them as UNAVAILABLE.
    outcome: list[OSError | None] = []

    def look_up() -> None:
        try:
            socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            outcome.append(None)
        except OSError as error:
            outcome.append(error)

    # getaddrinfo has no timeout. A daemon, as a thread that hangs would keep the process from exiting.
    thread = threading.Thread(target=look_up, daemon=True)
    thread.start()
    thread.join(_CONNECT_S)
    if not outcome or outcome[0] is not None:
        why = str(outcome[0]) if outcome else f"no answer from the name server within {_CONNECT_S:.0f} s"
        raise ClusterError(
            f"{address}: the host {host} cannot be resolved ({why}); check the spelling, or give its IP address"
        )
    try:
        # The timeout holds for each address of the host in turn. This resolves the name again, which has just worked.
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
    """Make one call to the service that should be at an address, and return its answer. Ray checks the token first."""
    import grpc  # type: ignore[import-untyped]  # ships no types
    from ray._private.grpc_utils import init_grpc_channel  # applies Ray's settings for TLS and tokens
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
        # Ray checks the token before it looks at the call, so a rejected one never appears as another error.
        code = error.code()
        if code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
            raise ClusterError(token_problem(address, os.environ, Path.home())) from error
        # The call names no client, so the server finds none: it is up.
        if kind == "ray" and code == grpc.StatusCode.NOT_FOUND:
            return b""
        if code == grpc.StatusCode.DEADLINE_EXCEEDED:
            raise ClusterError(
                f"{address}: the connection is accepted, but nothing answers within {_CONNECT_S:.0f} s; check whether "
                f"the head hangs or is overloaded (logs, memory), and whether {port} is Ray's port there"
            ) from error
        service = "the Ray Client server" if kind == "ray" else "Ray's own port (the GCS)"
        raise ClusterError(
            f"{address}: the server there is not {service} ({code.name.lower().replace('_', ' ')}); {_FORMS}"
        ) from error


def token_problem(address: str, environment: Mapping[str, str], home: Path) -> str:
    """Explain why a token is missing or wrong, following the order in which Ray looks for it.

    Args:
        address: Address of the cluster.
        environment: Environment variables.
        home: Home directory of the user.
    """
    token_path = environment.get("RAY_AUTH_TOKEN_PATH")
    file = Path(token_path) if token_path else home / ".ray" / "auth_token"
    if environment.get("RAY_AUTH_TOKEN"):
        source = "RAY_AUTH_TOKEN"
    elif token_path:
        source = f"the file of RAY_AUTH_TOKEN_PATH, {token_path}"
    else:
        source = str(file)
    # RAY_AUTH_TOKEN wins over a file, so a stale variable hides a valid token in the file: name the source.
    has_token = source == "RAY_AUTH_TOKEN" or file.is_file()
    remedy = (
        "put the cluster's token (on the head: `ray get-auth-token`; with KubeRay: key auth_token of the Secret that "
        "is named like the cluster) into RAY_AUTH_TOKEN, into a file named by RAY_AUTH_TOKEN_PATH, or into "
        "~/.ray/auth_token"
    )
    if environment.get("RAY_AUTH_MODE", "").lower() != "token":
        mode = environment.get("RAY_AUTH_MODE") or "not set"
        return (
            f"{address}: the cluster requires a token and none was sent, as RAY_AUTH_MODE is {mode}; set "
            f"RAY_AUTH_MODE=token{f' (there is a token in {source})' if has_token else f', and {remedy}'}; see {_DOCS}"
        )
    if has_token:
        return f"{address}: the cluster rejects the token in {source}; {remedy}; see {_DOCS}"
    return f"{address}: the cluster requires a token and there is none ({source} does not exist); {remedy}; see {_DOCS}"
