"""Requests to one Kubernetes cluster through the `kubernetes` package: read, apply, delete, logs. Runs on the client.

Every refusal becomes one sentence. Read `follow.py` next.
"""

import base64
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import urllib3
from kubernetes import client, config
from kubernetes.client.exceptions import ApiException
from kubernetes.config import ConfigException

from launcher.errors import ClusterError
from launcher.submit.kubernetes.manifest import KINDS, Manifest, name_of

_GROUP, _VERSION = "ray.io", "v1"
# Field manager of server-side apply. The server remembers it with each field, so another name would conflict with
# objects that an earlier version applied.
_MANAGER = "launcher"
_APPLY = "application/apply-patch+yaml"
# Pairs of limits: to connect, and between two reads. The second is no limit on the whole answer, so a log may grow for
# days, and ends after a minute of silence.
_TIMEOUT_S = (5.0, 30.0)
_LOG_TIMEOUT_S = (5.0, 60.0)
_DASHBOARD_PORT = 8265
_RAY_HEADER = "x-ray-authorization"
_NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


class AwayError(ClusterError):
    """The API server does not answer at the moment; a caller that waits for a long job retries."""


class NotFoundError(ClusterError):
    """There is no object of that name."""


def connect(context: str | None, namespace: str | None) -> "Api":
    """Return the cluster of a kubeconfig, or the one this process runs in.

    Args:
        context: Context of the kubeconfig; None takes the current one.
        namespace: Namespace to work in; None takes the context's.

    Raises:
        ClusterError: There is no kubeconfig, or no such context in it.
    """
    settings = client.Configuration()
    # urllib3 would try a dead server three times more, each with the whole time limit. `follow.py` retries by itself.
    settings.retries = False
    # These stay as they are in a path: the port of a service follows a colon, and the dashboard's paths have slashes.
    settings.safe_chars_for_path_param = "/:"
    try:
        config.load_kube_config(context=context, client_configuration=settings)  # type: ignore[no-untyped-call]
        contexts, current = config.list_kube_config_contexts()  # type: ignore[no-untyped-call]
        chosen = next((entry for entry in contexts if entry["name"] == context), current)
        default = chosen.get("context", {}).get("namespace")
    except (ConfigException, OSError) as error:
        # Kubernetes sets this variable in every pod. A kubeconfig goes first, and a named context exists only in one.
        if context is not None or "KUBERNETES_SERVICE_HOST" not in os.environ:
            where = os.environ.get("KUBECONFIG") or "~/.kube/config"
            reason = " ".join(str(error).split())[:200]
            raise ClusterError(
                f"no Kubernetes cluster: {where} cannot be used ({reason}); set KUBECONFIG, or choose a --context in it"
            ) from error
        config.load_incluster_config(client_configuration=settings)  # type: ignore[no-untyped-call]
        default = _NAMESPACE_FILE.read_text().strip() if _NAMESPACE_FILE.exists() else None
    return Api(client.ApiClient(settings), namespace or default or "default", settings.host, namespace is not None)


@dataclass(frozen=True)
class Api:
    """A cluster and the namespace to work in.

    Args:
        rest: Client with the address and the credentials.
        namespace: Namespace of objects that name none themselves.
        host: Address, for messages.
        namespace_given: True if the user chose the namespace, so that objects must not name another.
    """

    rest: client.ApiClient
    namespace: str
    host: str
    namespace_given: bool

    def namespace_of(self, manifest: Manifest) -> str:
        """Return the namespace of an object.

        Raises:
            ClusterError: The object names another namespace than the user.
        """
        named = manifest.get("metadata", {}).get("namespace")
        if named and self.namespace_given and named != self.namespace:
            raise ClusterError(
                f"{manifest['kind']} {name_of(manifest)} belongs to namespace {named}, not to {self.namespace}; remove "
                "--namespace"
            )
        return str(named or self.namespace)

    def apply(self, manifest: Manifest, force: bool, dry_run: bool = False) -> Manifest:
        """Create an object or change the launcher's fields of it, by server-side apply.

        Args:
            manifest: Object to apply.
            force: True to overwrite fields that another manager has changed.
            dry_run: True if the server only checks it.

        Raises:
            ClusterError: The server refuses it.
        """
        # Strict: by default the server drops an unknown field and reports it in a header that the client does not read.
        options: Manifest = {"field_manager": _MANAGER, "field_validation": "Strict", "_content_type": _APPLY}
        options |= ({"force": True} if force else {}) | ({"dry_run": "All"} if dry_run else {})
        kind, name, namespace = manifest["kind"], name_of(manifest), self.namespace_of(manifest)
        return self._call("patch", kind, name, namespace, manifest, **options)

    def find(self, kind: str, name: str, namespace: str | None = None) -> Manifest | None:
        """Return the current object of a name; None when there is none.

        Raises:
            ClusterError: The server refuses, or knows no such kind.
        """
        try:
            return self._call("get", kind, name, namespace or self.namespace)
        except NotFoundError:
            return None

    def get(self, kind: str, name: str) -> Manifest:
        """Return the current object of a name.

        Raises:
            ClusterError: There is none of that name, or the server refuses.
        """
        manifest = self.find(kind, name)
        if manifest is None:
            raise ClusterError(
                f"there is no {kind} {name} in namespace {self.namespace}; check the name and --namespace, or apply it "
                "first"
            )
        return manifest

    def delete(self, kind: str, name: str) -> bool:
        """Delete an object with what it owns; return False when there is none of that name.

        Raises:
            ClusterError: The server refuses.
        """
        try:
            # Background: the server answers before the pods are gone, and its garbage collector removes them.
            self._call("delete", kind, name, self.namespace, propagation_policy="Background")
        except NotFoundError:
            return False
        return True

    def pods(self, selector: str) -> list[Manifest]:
        """Return the pods with some labels, oldest first."""
        with self._translate_errors(f"pods in namespace {self.namespace}", "Pod"):
            response = self._core().list_namespaced_pod(
                self.namespace, label_selector=selector, _preload_content=False, _request_timeout=_TIMEOUT_S
            )
            items: list[Manifest] = _json(response).get("items") or []
        return sorted(items, key=lambda pod: str(pod["metadata"].get("creationTimestamp", "")))

    def log(self, pod: str, container: str | None, follow: bool, since_s: int | None) -> Iterator[bytes]:
        """Yield a container's log as it arrives, with the time at the start of each line.

        Args:
            pod: Name of the pod.
            container: Name of the container; None takes the only one.
            follow: True to wait for more while it grows; a minute without a line ends it with `AwayError`.
            since_s: Age in seconds of the oldest line; None reads all.

        Raises:
            ClusterError: There is no such pod, or the connection breaks.
        """
        # This is a generator: the block stays open while the caller reads, so a connection that breaks halfway is
        # translated too.
        with self._translate_errors(f"the log of pod {pod}", "Pod"):
            options: Manifest = {} if container is None else {"container": container}
            options |= {} if since_s is None else {"since_seconds": since_s}
            response = self._core().read_namespaced_pod_log(
                pod, self.namespace, follow=follow, timestamps=True, _preload_content=False,
                _request_timeout=_LOG_TIMEOUT_S, **options,
            )  # fmt: skip
            try:
                yield from response.stream(decode_content=False)
            finally:
                response.release_conn()

    def dashboard(self, cluster: str, path: str) -> Manifest:
        """Return an answer of Ray's dashboard, through the API server's proxy to the head's service.

        Args:
            cluster: Name of the RayCluster.
            path: Path below the dashboard's address, `api/jobs/`.

        Raises:
            ClusterError: There is no such service, or the dashboard refuses.
        """
        with self._translate_errors(f"the Ray dashboard of {cluster}", "Service"):
            service = f"{cluster}-head-svc:{_DASHBOARD_PORT}"
            core: Any = client.CoreV1Api(self._with_ray_token(cluster))
            return _json(
                core.connect_get_namespaced_service_proxy_with_path(
                    service, self.namespace, path, _preload_content=False, _request_timeout=_TIMEOUT_S
                )
            )

    def _with_ray_token(self, cluster: str) -> client.ApiClient:
        """Return a client that also sends Ray's token, in the header that the API server forwards."""
        try:  # KubeRay stores the token in a Secret of the cluster's name
            secret = _json(self._core().read_namespaced_secret(cluster, self.namespace, _preload_content=False))
        except ApiException:
            # The cluster requires no token, or the account may not read Secrets: then the dashboard reports the missing
            # token.
            return self.rest
        token = base64.b64decode((secret.get("data") or {}).get("auth_token", "")).decode()
        return client.ApiClient(self.rest.configuration, _RAY_HEADER, f"Bearer {token}")

    def _core(self) -> Any:  # its types do not know what _preload_content=False returns
        return client.CoreV1Api(self.rest)

    def _call(self, verb: str, kind: str, name: str, namespace: str, *body: Manifest, **options: Any) -> Manifest:
        """Get, patch or delete an object; `options` are keyword arguments of the generated methods."""
        options |= {"_preload_content": False, "_request_timeout": _TIMEOUT_S}
        what = f"{kind} {name} in namespace {namespace}"
        with self._translate_errors(what, kind):
            try:
                if kind == "ConfigMap":
                    method = getattr(self._core(), f"{'read' if verb == 'get' else verb}_namespaced_config_map")
                    return _json(method(name, namespace, *body, **options))
                method = getattr(client.CustomObjectsApi(self.rest), f"{verb}_namespaced_custom_object")
                return _json(method(_GROUP, _VERSION, namespace, KINDS[kind], name, *body, **options))
            except ApiException as error:
                # A 404 may also mean the namespace or the kind; callers may take only that of the object for "not
                # there". Server-side apply creates objects, so a patch never gets that one.
                if error.status == 404 and verb != "patch" and _is_about(error, name):
                    raise NotFoundError(f"{what}: not found") from error
                raise

    @contextmanager
    def _translate_errors(self, what: str, kind: str) -> Iterator[None]:
        try:
            yield
        except ApiException as error:
            raise refusal(error, what, kind, self.host) from error
        except urllib3.exceptions.HTTPError as error:
            # urllib3 begins with the objects involved; the reason follows the last colon.
            reason = " ".join(str(getattr(error, "reason", None) or error).split()).rpartition(": ")[2][:200]
            raise AwayError(
                f"the API server {self.host} does not answer ({reason}); check --context, and the network to it"
            ) from error


def _json(response: Any) -> Manifest:  # a response of urllib3 or of the package, which differ by version
    data = response.data if response.data is not None else response.read()
    manifest: Manifest = json.loads(data)
    return manifest


def refusal(error: ApiException, what: str, kind: str, host: str) -> ClusterError:
    """Return the error for a refusal of the API server.

    Args:
        error: Answer of the server.
        what: Object of the request, for the message.
        kind: Kind of that object.
        host: Address of the server.
    """
    status = error.status or 0
    reason = _reason(error)
    if status == 401:
        return ClusterError(
            f"the API server {host} does not know this account ({reason}); log in again, or fix the kubeconfig"
        )
    if status == 403:
        return ClusterError(
            f"{what}: forbidden ({reason}); ask for a Role that allows it, or choose another --namespace"
        )
    # The server answers for an unknown kind with plain text, and for a missing object with a Status in JSON.
    if status == 404 and kind in ("RayJob", "RayCluster") and not _status(error):
        return ClusterError(
            f"the API server {host} knows no {kind}: KubeRay is not installed there; "
            "`helm install kuberay-operator kuberay/kuberay-operator --version 1.7.0`"
        )
    if status == 404:
        return ClusterError(f"{what}: not found ({reason}); check the name and --namespace")
    if status == 409:
        return ClusterError(
            f"{what}: another manager has changed it ({reason}); copy that change into the job file, or repeat with "
            "--force-conflicts"
        )
    if status in (400, 422):
        return ClusterError(f"{what}: refused by the API server ({reason}); fix it in the job file or manifest")
    # Status 0: the client got no answer. All of these may pass by themselves, so only they become an AwayError.
    if status == 429 or status >= 500 or status == 0:
        return AwayError(f"the API server {host} cannot answer now ({status} {reason}); try again later")
    return ClusterError(f"{what}: the API server answers {status} ({reason})")


def _status(error: ApiException) -> Manifest:
    try:
        body: Any = json.loads(error.body or "")  # whatever the server sent
    except ValueError:
        return {}
    return body if isinstance(body, dict) and body.get("kind") == "Status" else {}


def _reason(error: ApiException) -> str:
    return " ".join(str(_status(error).get("message") or error.reason or "no reason given").split())[:400]


def _is_about(error: ApiException, name: str) -> bool:
    """Return whether a 404 means the object of that name, and not its namespace or its kind."""
    details = _status(error).get("details") or {}
    return bool(details.get("name") == name and details.get("kind") != "namespaces")
