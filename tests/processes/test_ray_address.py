"""Addresses of clusters: how they are resolved, and why a cluster cannot be joined."""

import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from launcher.errors import ClusterError
from launcher.processes import ray_address


class TestAddresses:
    @pytest.mark.parametrize(
        ("address", "environment", "resolved"),
        [
            (None, {}, ""),
            ("local", {"RAY_ADDRESS": "h:1"}, ""),
            (None, {"RAY_ADDRESS": "h:1"}, "h:1"),
            ("auto", {"RAY_ADDRESS": "ray://h"}, "ray://h:10001"),
            ("h", {"RAY_ADDRESS": "other:1"}, "h:6379"),
            ("ray://h:7", {}, "ray://h:7"),
        ],
    )
    def test_address_is_resolved(self, address: str | None, environment: dict[str, str], resolved: str) -> None:
        assert ray_address.resolve(address, environment) == resolved

    @pytest.mark.parametrize(
        ("address", "reason"),
        [
            ("http://h:8265", "is the address of a dashboard"),
            ("foo://h", "is not an address of a Ray cluster"),
            ("h:x", "x is not a port number"),
            ("h:99999", "99999 is not a port number"),
            ("ray://", "is not an address of a Ray cluster"),
        ],
    )
    def test_malformed_address_is_refused(self, address: str, reason: str) -> None:
        with pytest.raises(ClusterError, match=reason) as raised:
            ray_address.resolve(address, {})
        assert "ray://HOST:10001" in str(raised.value)


class _Refuses(grpc.GenericRpcHandler):
    """Server that answers every call with one status."""

    def __init__(self, status: grpc.StatusCode) -> None:
        self._status = status

    def service(self, call: object) -> grpc.RpcMethodHandler:
        return grpc.unary_unary_rpc_method_handler(lambda request, context: context.abort(self._status, "no"))


class TestReachable:
    @pytest.fixture
    def listener(self) -> Iterator[str]:
        """Run a server that accepts connections and sends nothing."""
        with socket.create_server(("127.0.0.1", 0)) as server:
            yield f"127.0.0.1:{server.getsockname()[1]}"

    def test_closed_port_is_refused(self, listener: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            gone = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(
            ClusterError, match=rf"{gone}: nothing listens there \(Connection refused\); is Ray running"
        ):
            ray_address.check_reachable(gone)

    def test_unknown_host_is_refused(self) -> None:
        with pytest.raises(ClusterError, match=r"the host no-such-host\.invalid cannot be resolved"):
            ray_address.check_reachable("no-such-host.invalid:6379")

    def test_silent_name_server_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ray_address, "_CONNECT_S", 0.2)
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(1))
        with pytest.raises(ClusterError, match="no answer from the name server"):
            ray_address.check_reachable("h:6379")

    def test_silent_server_is_refused(self, listener: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ray_address, "_CONNECT_S", 0.5)
        with pytest.raises(
            ClusterError, match="the connection is accepted, but nothing answers within 0 s; check whether"
        ):
            ray_address.check_reachable(listener)

    @pytest.mark.parametrize(
        ("scheme", "status", "reason"),
        [
            ("", grpc.StatusCode.UNAUTHENTICATED, "requires a token"),
            ("ray://", grpc.StatusCode.UNAUTHENTICATED, "requires a token"),
            ("", grpc.StatusCode.UNIMPLEMENTED, "is not Ray's own port"),
            ("ray://", grpc.StatusCode.UNIMPLEMENTED, "is not the Ray Client server"),
            ("ray://", grpc.StatusCode.NOT_FOUND, None),
        ],
    )
    def test_status_of_the_service_decides(self, scheme: str, status: grpc.StatusCode, reason: str | None) -> None:
        server = grpc.server(ThreadPoolExecutor(1), handlers=[_Refuses(status)])
        address = f"{scheme}127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        server.start()
        try:
            if reason is None:
                ray_address.check_reachable(address)
            else:
                with pytest.raises(ClusterError, match=reason):
                    ray_address.check_reachable(address)
        finally:
            server.stop(None)


class TestTokens:
    """Order in which Ray looks: RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token; only if RAY_AUTH_MODE=token."""

    def test_mode_that_is_not_set_is_named(self, tmp_path: Path) -> None:
        text = ray_address.token_problem("h:1", {}, tmp_path)
        assert text.startswith("h:1: the cluster requires a token and none was sent, as RAY_AUTH_MODE is not set; set ")
        assert "set RAY_AUTH_MODE=token, and put the cluster's token" in text and "RAY_AUTH_TOKEN_PATH" in text

    def test_existing_token_that_was_not_sent_is_named(self, tmp_path: Path) -> None:
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray" / "auth_token").write_text("x")
        text = ray_address.token_problem("h:1", {"RAY_AUTH_MODE": "disabled"}, tmp_path)
        source = f"{tmp_path}/.ray/auth_token"
        assert f"as RAY_AUTH_MODE is disabled; set RAY_AUTH_MODE=token (there is a token in {source})" in text

    @pytest.mark.parametrize(
        ("environment", "reason"),
        [
            ({"RAY_AUTH_TOKEN": "x", "RAY_AUTH_TOKEN_PATH": "/p"}, "rejects the token in RAY_AUTH_TOKEN;"),
            ({"RAY_AUTH_TOKEN_PATH": __file__}, f"rejects the token in the file of RAY_AUTH_TOKEN_PATH, {__file__};"),
            ({"RAY_AUTH_TOKEN_PATH": "/p"}, "there is none (the file of RAY_AUTH_TOKEN_PATH, /p does not exist)"),
            ({}, "/.ray/auth_token does not exist)"),
        ],
    )
    def test_source_of_a_wrong_token_is_named(self, environment: dict[str, str], reason: str, tmp_path: Path) -> None:
        assert reason in ray_address.token_problem("h:1", {"RAY_AUTH_MODE": "token", **environment}, tmp_path)


class TestBeforeRayConnects:
    """Ray itself waits ten minutes for a dead cluster, without a message."""

    @pytest.fixture(autouse=True)
    def no_address(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("RAY_ADDRESS", raising=False)

    @pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1"])
    def test_dead_cluster_is_refused_by_key_or_variable(self, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(ClusterError, match=rf"^cluster\.address: {address}: nothing listens .*; leave it out"):
            ray_address.check_address(address)
        monkeypatch.setenv("RAY_ADDRESS", address)
        for from_job in (None, "auto"):
            with pytest.raises(ClusterError, match=rf"^RAY_ADDRESS: {address}: nothing listens there .*; unset it to"):
                ray_address.check_address(from_job)

    def test_silent_host_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def silent(*_: object, timeout: float) -> None:
            assert timeout <= 10
            raise TimeoutError

        monkeypatch.setattr(socket, "create_connection", silent)
        with pytest.raises(ClusterError, match=r"^cluster\.address: 192\.0\.2\.77:6379: no answer from 192\.0\.2\.77 "):
            ray_address.check_address("192.0.2.77")

    @pytest.mark.parametrize("address", [None, "local"])
    def test_job_with_a_local_ray_is_not_checked(self, address: str | None) -> None:
        ray_address.check_address(address)
