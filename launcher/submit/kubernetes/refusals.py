"""What the API server says no with, in one sentence each. Runs on the client.

`AwayError` is a no that may pass: whoever waits for a long job asks again.
"""

import json
from typing import Any

from kubernetes.client.exceptions import ApiException

from launcher.errors import ClusterError
from launcher.submit.kubernetes.manifest import Manifest


class AwayError(ClusterError):
    """The API server does not answer now."""


class ForbiddenError(ClusterError):
    """The account may not do this."""


def refusal(error: ApiException, what: str, kind: str, host: str) -> ClusterError:
    """The sentence for an answer of the API server that is none of the good ones.

    Args:
        error: the answer.
        what: was asked about.
        kind: of that object.
        host: address of the server.
    """
    status = error.status or 0
    said = _said(error)
    if status == 401:
        return ForbiddenError(f"the API server {host} does not know you ({said}); log in again, or mend the kubeconfig")
    if status == 403:
        return ForbiddenError(f"{what}: you may not ({said}); ask for a Role with that, or choose another --namespace")
    if status == 404 and kind in ("RayJob", "RayCluster") and not _status(error):
        return ClusterError(
            f"the API server {host} knows no {kind}: KubeRay is not installed there; "
            "`helm install kuberay-operator kuberay/kuberay-operator --version 1.7.0`"
        )
    if status == 404:
        return ClusterError(f"{what}: not found ({said}); check the name and --namespace")
    if status == 409:
        return ClusterError(
            f"{what}: somebody else has changed it ({said}); take their change over into the job file, or repeat with "
            "--force-conflicts"
        )
    if status in (400, 422):
        return ClusterError(f"{what}: refused by the API server ({said}); mend it in the job file or manifest")
    if status == 429 or status >= 500 or status == 0:
        return AwayError(f"the API server {host} cannot answer now ({status} {said}); try again later")
    return ClusterError(f"{what}: the API server answers {status} ({said})")


def _status(error: ApiException) -> Manifest:
    try:
        body: Any = json.loads(error.body or "")  # whatever the server sent
    except ValueError:
        return {}
    return body if isinstance(body, dict) and body.get("kind") == "Status" else {}


def _said(error: ApiException) -> str:
    return " ".join(str(_status(error).get("message") or error.reason or "no reason given").split())[:400]


def is_about(error: ApiException, name: str) -> bool:
    """Whether a 404 means this object, and not its namespace or its kind."""
    details = _status(error).get("details") or {}
    return bool(details.get("name") == name and details.get("kind") != "namespaces")
