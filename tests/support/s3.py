"""A real S3-compatible server on this machine: moto's, threaded, in a process of its own."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow.fs as pafs

_ROOT = Path(__file__).resolve().parents[2]
MISSING = "needs moto_server (`make moto` makes .venv-moto, with an S3 server for tests)"
KEYS = {"AWS_ACCESS_KEY_ID": "tester", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}


def server_command() -> str | None:
    """Return the path of moto_server; None where it is not installed."""
    own = _ROOT / ".venv-moto" / "bin" / "moto_server"
    return str(own) if own.exists() else shutil.which("moto_server")


def free_port() -> int:
    """Return a port of this machine that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextmanager
def s3_server(bucket: str | None) -> Iterator[str]:
    """Start a server and yield its `127.0.0.1:PORT`; with one empty bucket, or with none and knowing no account."""
    command = server_command()
    assert command is not None, MISSING
    port = free_port()
    # So many requests are answered whatever their keys are.
    environment = {**os.environ, "INITIAL_NO_AUTH_ACTION_COUNT": "inf" if bucket else "0"}
    server = subprocess.Popen(
        [command, "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment,
    )  # fmt: skip
    try:
        _wait(port, server)
        if bucket:
            server_fs(f"127.0.0.1:{port}").create_dir(bucket)
        yield f"127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(timeout=30)


def server_fs(address: str) -> pafs.S3FileSystem:
    """Return the server's file system, for what a test puts there."""
    return pafs.S3FileSystem(
        access_key=KEYS["AWS_ACCESS_KEY_ID"], secret_key=KEYS["AWS_SECRET_ACCESS_KEY"], endpoint_override=address,
        scheme="http", region="us-east-1", allow_bucket_creation=True,
    )  # fmt: skip


def upload(address: str, source: Path, target: str) -> None:
    """Copy a local file or directory to `bucket/path`."""
    pafs.copy_files(
        str(source), target, source_filesystem=pafs.LocalFileSystem(), destination_filesystem=server_fs(address)
    )


def clean_environment(address: str) -> dict[str, str]:
    """Return the environment of a process that talks to the server."""
    others = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    return {**others, **KEYS, "AWS_ENDPOINT_URL": f"http://{address}"}


def _wait(port: int, server: "subprocess.Popen[bytes]") -> None:
    for _ in range(300):
        assert server.poll() is None, "moto_server ended at once"
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise TimeoutError(f"moto_server does not listen on port {port}")
