"""One Kubernetes cluster, through the `kubernetes` package: read, apply, delete, logs. Runs on the client.

Every refusal becomes one sentence (`submit/kubernetes/refusals.py`). Read `submit/kubernetes/follow.py` next.
"""

import base64
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import urllib3
from kubernetes import client, config
from kubernetes.client.exceptions import ApiException
from kubernetes.config import ConfigException

from launcher.errors import ClusterError
from launcher.submit.kubernetes.manifest import KINDS, Manifest, name_of
from launcher.submit.kubernetes.refusals import AwayError, is_about, refusal

_GROUP, _VERSION = "ray.io", "v1"
_MANAGER = "launcher"  # whose fields these are, for server-side apply
_APPLY = "application/apply-patch+yaml"
_TIMEOUT_S = (5.0, 30.0)
_LOG_TIMEOUT_S = (5.0, 60.0)
_DASHBOARD_PORT = 8265
_RAY_HEADER = "x-ray-authorization"
_NAMESPACE_FILE = "/var/run/secrets/kubernetes.io/serviceaccount/namespace"


def connect(context: str | None, namespace: str | None) -> "Api":
    """The cluster of a kubeconfig, or the one this runs in.

    Args:
        context: of the kubeconfig; None takes its current one.
        namespace: None takes the context's.

    Raises:
        ClusterError: there is no kubeconfig, or no such context in it.
    """
    settings = client.Configuration()
    settings.retries = False  # who waits tries again by itself
    settings.safe_chars_for_path_param = "/:"  # of a service's port, and of paths behind a proxy
    try:
        config.load_kube_config(context=context, client_configuration=settings)  # type: ignore[no-untyped-call]
        contexts, current = config.list_kube_config_contexts()  # type: ignore[no-untyped-call]  # ships no types
    except (ConfigException, OSError) as error:
        where = os.environ.get("KUBECONFIG") or "~/.kube/config"
        if context is None and "KUBERNETES_SERVICE_HOST" in os.environ:
            return _inside(settings, namespace)
        reason = " ".join(str(error).split())[:200]
        raise ClusterError(
            f"no cluster to talk to: {where} cannot be used ({reason}); set KUBECONFIG, or choose a --context in it"
        ) from error
    chosen = next((one for one in contexts if one["name"] == context), current)
    found = namespace or chosen.get("context", {}).get("namespace") or "default"
    return Api(client.ApiClient(settings), found, settings.host, namespace is not None)


def _inside(settings: client.Configuration, namespace: str | None) -> "Api":
    config.load_incluster_config(client_configuration=settings)  # type: ignore[no-untyped-call]  # ships no types
    own = "default"
    if os.path.exists(_NAMESPACE_FILE):
        with open(_NAMESPACE_FILE, encoding="utf-8") as file:
            own = file.read().strip()
    return Api(client.ApiClient(settings), namespace or own, settings.host, namespace is not None)


@dataclass(frozen=True)
class Api:
    """A cluster and the namespace to work in.

    Args:
        rest: holds the address and the credentials.
        namespace: where objects are that name none themselves.
        host: address, for messages.
        namespace_given: whether it was asked for, and wins over the objects' own.
    """

    rest: client.ApiClient
    namespace: str
    host: str
    namespace_given: bool

    def namespace_of(self, manifest: Manifest) -> str:
        """Where an object goes.

        Raises:
            ClusterError: it names another namespace than was asked for.
        """
        own = manifest.get("metadata", {}).get("namespace")
        if own and self.namespace_given and own != self.namespace:
            raise ClusterError(
                f"{_what(manifest)} belongs to namespace {own}, not to {self.namespace}; leave --namespace out"
            )
        return str(own or self.namespace)

    def apply(self, manifest: Manifest, force: bool, dry_run: bool = False) -> Manifest:
        """Server-side apply: create an object, or change what of it is ours.

        Args:
            manifest: the object.
            force: whether to take over fields that somebody else has changed.
            dry_run: let the server check it and change nothing.

        Raises:
            ClusterError: the server refuses it.
        """
        options: Manifest = {"field_manager": _MANAGER, "field_validation": "Strict", "_content_type": _APPLY}
        options |= {"_request_timeout": _TIMEOUT_S} | ({"force": True} if force else {})
        options |= {"dry_run": "All"} if dry_run else {}
        namespace, name = self.namespace_of(manifest), name_of(manifest)
        with self._told(f"{_what(manifest)} in namespace {namespace}", manifest["kind"]):
            if manifest["kind"] == "ConfigMap":
                core = self._core()
                found = core.patch_namespaced_config_map(name, namespace, manifest, _preload_content=False, **options)
                return _json(found)
            rays, plural = self._rays(), KINDS[manifest["kind"]]
            changed = rays.patch_namespaced_custom_object(
                _GROUP, _VERSION, namespace, plural, name, manifest, **options
            )
            return dict(changed)

    def find_as(self, manifest: Manifest) -> Manifest | None:
        """The object that a manifest would change, as it is now; None when there is none."""
        return self._find(manifest["kind"], name_of(manifest), self.namespace_of(manifest))

    def find(self, kind: str, name: str) -> Manifest | None:
        """An object as it is now; None when there is none of that name.

        Raises:
            ClusterError: the server refuses, or knows no such kind.
        """
        return self._find(kind, name, self.namespace)

    def _find(self, kind: str, name: str, namespace: str) -> Manifest | None:
        with self._told(f"{kind} {name} in namespace {namespace}", kind):
            options: Manifest = {"_request_timeout": _TIMEOUT_S}
            try:
                if kind == "ConfigMap":
                    return _json(
                        self._core().read_namespaced_config_map(name, namespace, _preload_content=False, **options)
                    )
                plural = KINDS[kind]
                found = self._rays().get_namespaced_custom_object(_GROUP, _VERSION, namespace, plural, name, **options)
                return dict(found)
            except ApiException as error:
                if error.status == 404 and is_about(error, name):
                    return None
                raise

    def get(self, kind: str, name: str) -> Manifest:
        """An object as it is now.

        Raises:
            ClusterError: there is none of that name, or the server refuses.
        """
        found = self.find(kind, name)
        if found is None:
            raise ClusterError(
                f"there is no {kind} {name} in namespace {self.namespace}; check the name and --namespace, or apply it "
                "first"
            )
        return found

    def delete(self, kind: str, name: str) -> bool:
        """Delete an object with what it owns; False when there is none of that name.

        Raises:
            ClusterError: the server refuses.
        """
        with self._told(f"{kind} {name} in namespace {self.namespace}", kind):
            options: Manifest = {"propagation_policy": "Background", "_request_timeout": _TIMEOUT_S}
            try:
                if kind == "ConfigMap":
                    core = self._core()
                    core.delete_namespaced_config_map(name, self.namespace, _preload_content=False, **options)
                else:
                    rays = self._rays()
                    rays.delete_namespaced_custom_object(_GROUP, _VERSION, self.namespace, KINDS[kind], name, **options)
            except ApiException as error:
                if error.status == 404 and is_about(error, name):
                    return False
                raise
            return True

    def pods(self, selector: str) -> list[Manifest]:
        """The pods with some labels, oldest first."""
        with self._told(f"pods in namespace {self.namespace}", "Pod"):
            core = self._core()
            found = core.list_namespaced_pod(
                self.namespace, label_selector=selector, _preload_content=False, _request_timeout=_TIMEOUT_S
            )
            items: list[Manifest] = _json(found).get("items") or []
        return sorted(items, key=lambda pod: str(pod["metadata"].get("creationTimestamp", "")))

    def log(self, pod: str, container: str | None, follow: bool, since_s: int | None) -> Iterator[bytes]:
        """A container's log as it comes, with the time at the start of each line.

        Args:
            pod: its name.
            container: None takes the only one.
            follow: go on while it grows; a minute without a line ends it with `AwayError`.
            since_s: leave out what is older.

        Raises:
            ClusterError: there is no such pod, or the connection breaks.
        """
        with self._told(f"the log of pod {pod}", "Pod"):
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
        """An answer of Ray's dashboard, through the API server's own way to the head's service.

        Args:
            cluster: name of the RayCluster.
            path: below the dashboard's address, `api/jobs/`.

        Raises:
            ClusterError: there is no such service, or the dashboard refuses.
        """
        with self._told(f"the Ray dashboard of {cluster}", "Service"):
            service = f"{cluster}-head-svc:{_DASHBOARD_PORT}"
            core: Any = client.CoreV1Api(self._with_ray_token(cluster))
            return _json(
                core.connect_get_namespaced_service_proxy_with_path(
                    service, self.namespace, path, _preload_content=False, _request_timeout=_TIMEOUT_S
                )
            )

    def _with_ray_token(self, cluster: str) -> client.ApiClient:
        """A client that sends Ray's token too, in the header that the API server hands on."""
        try:  # KubeRay keeps the token in a Secret of the cluster's name
            secret = _json(self._core().read_namespaced_secret(cluster, self.namespace, _preload_content=False))
        except ApiException:
            return self.rest  # the cluster asks for none, or the dashboard will say that one is missing
        token = base64.b64decode((secret.get("data") or {}).get("auth_token", "")).decode()
        return client.ApiClient(self.rest.configuration, _RAY_HEADER, f"Bearer {token}")

    def _core(self) -> Any:  # its types do not know what _preload_content=False returns
        return client.CoreV1Api(self.rest)

    def _rays(self) -> Any:  # its types call every answer an object
        return client.CustomObjectsApi(self.rest)

    @contextmanager
    def _told(self, what: str, kind: str) -> Iterator[None]:
        try:
            yield
        except ApiException as error:
            raise refusal(error, what, kind, self.host) from error
        except urllib3.exceptions.HTTPError as error:
            # urllib3 begins with the objects involved; what happened stands behind the last colon.
            reason = " ".join(str(getattr(error, "reason", None) or error).split()).rpartition(": ")[2][:200]
            raise AwayError(
                f"the API server {self.host} does not answer ({reason}); check --context, and the network to it"
            ) from error


def _what(manifest: Manifest) -> str:
    return f"{manifest['kind']} {name_of(manifest)}"


def _json(response: Any) -> Manifest:  # a response of urllib3 or of the package, which differ by version
    data = response.data if response.data is not None else response.read()
    found: Manifest = json.loads(data)
    return found
