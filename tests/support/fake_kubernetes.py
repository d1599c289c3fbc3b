"""A model of a Kubernetes API server on loopback: enough of it for kubectl and for the Python client.

Discovery, OpenAPI v3 for the parameters, create, read, list, watch, merge patch, server-side apply with owners of
fields, status, dry run, delete with finalizers, logs of pods, and the way to a service. No operator: tests set status.
"""

import copy
import json
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

Object = dict[str, Any]
# plural -> (group version, kind)
KINDS = {
    "rayjobs": ("ray.io/v1", "RayJob"),
    "rayclusters": ("ray.io/v1", "RayCluster"),
    "configmaps": ("v1", "ConfigMap"),
    "secrets": ("v1", "Secret"),
    "pods": ("v1", "Pod"),
    "namespaces": ("v1", "Namespace"),
}
_VERBS = ["create", "delete", "get", "list", "patch", "update", "watch"]


class Refusal(Exception):
    """An answer that is a Status."""

    def __init__(self, code: int, reason: str, message: str, name: str = "", plural: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.status = {
            "apiVersion": "v1", "kind": "Status", "status": "Failure", "code": code, "reason": reason,
            "message": message, "details": {"name": name, "kind": plural},
        }  # fmt: skip


@dataclass
class Change:
    """One line of a watch."""

    plural: str
    namespace: str
    type: str
    object: Object


@dataclass
class FakeApi:
    """The server's state and the switches of its faults.

    Args:
        validate: Function that returns the problems of a custom resource, as (path, message).
        token: Token that clients must send; None requires none.
    """

    validate: Callable[[Object], list[tuple[str, str]]] = lambda _: []
    token: str | None = None
    objects: dict[tuple[str, str, str], Object] = field(default_factory=dict)
    owners: dict[tuple[str, str, str], dict[tuple[str, ...], str]] = field(default_factory=dict)
    changes: list[Change] = field(default_factory=list)
    logs: dict[str, list[str]] = field(default_factory=dict)
    open_logs: set[str] = field(default_factory=set)
    cut_after: list[int] = field(default_factory=list)
    dashboard: dict[str, Object] = field(default_factory=dict)
    headers: dict[str, dict[str, str]] = field(default_factory=dict)
    missing: set[str] = field(default_factory=set)
    forbidden: set[tuple[str, str]] = field(default_factory=set)
    unavailable: int = 0
    requests: list[str] = field(default_factory=list)
    lock: threading.Condition = field(default_factory=threading.Condition)
    _version: int = 0

    def start(self) -> "Running":
        """Serve on a free port."""
        api = self

        class Handler(_Handler):
            server_api = api

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        return Running(self, server)

    # What tests do by hand.

    def put(self, plural: str, namespace: str, obj: Object) -> None:
        """Store an object as it is."""
        with self.lock:
            self._store(plural, namespace, copy.deepcopy(obj), "ADDED")

    def get(self, plural: str, namespace: str, name: str) -> Object:
        """Return a copy of an object."""
        with self.lock:
            return copy.deepcopy(self.objects[plural, namespace, name])

    def set_status(self, plural: str, namespace: str, name: str, **status: Any) -> None:
        """Set the status of an object, as the operator does."""
        with self.lock:
            obj = self.objects[plural, namespace, name]
            obj["status"] = obj.get("status", {}) | status
            self._store(plural, namespace, obj, "MODIFIED")

    def log_line(self, pod: str, line: str, at: str | None = None) -> None:
        """Add a line to a container's log, with the current time."""
        with self.lock:
            now = time.time_ns()
            stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now // 10**9)) + f".{now % 10**9:09d}Z"
            self.logs.setdefault(pod, []).append(f"{at or stamp} {line}\n")
            self.lock.notify_all()

    def end_log(self, pod: str) -> None:
        """End the log of a container."""
        with self.lock:
            self.open_logs.discard(pod)
            self.lock.notify_all()

    # What requests do.

    def read(self, plural: str, namespace: str, name: str) -> Object:
        """Return an object, or raise 404."""
        obj = self.objects.get((plural, namespace, name))
        if obj is None:
            group = KINDS[plural][0].partition("/")[0] if "/" in KINDS[plural][0] else ""
            full = f"{plural}.{group}" if group else plural
            raise Refusal(404, "NotFound", f'{full} "{name}" not found', name, plural)
        return obj

    def listed(self, plural: str, namespace: str | None, query: dict[str, str]) -> list[Object]:
        """Return the objects of a list or watch."""
        selected_objects = [
            obj
            for (kind, space, _), obj in self.objects.items()
            if kind == plural and namespace in (None, space) and selected(obj, query)
        ]
        return sorted(selected_objects, key=lambda obj: obj["metadata"]["name"])

    def write(self, plural: str, namespace: str, obj: Object, query: dict[str, str]) -> Object:
        """Create or change an object, unless the request is a dry run."""
        before = self.objects.get((plural, namespace, obj["metadata"]["name"]))
        self._check(plural, obj, query)
        metadata = obj["metadata"]
        metadata["namespace"] = namespace
        metadata.setdefault("uid", str(uuid.uuid4()))
        metadata.setdefault("creationTimestamp", time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
        if before is None or before.get("spec") != obj.get("spec"):
            metadata["generation"] = metadata.get("generation", 0) + 1
        if query.get("dryRun") != "All" and obj != before:
            self._store(plural, namespace, obj, "ADDED" if before is None else "MODIFIED")
        return obj

    def apply(self, plural: str, namespace: str, name: str, patch: Object, query: dict[str, str]) -> Object:
        """Server-side apply: what the manager leaves out goes, what others own is a conflict."""
        key, manager = (plural, namespace, name), query.get("fieldManager", "")
        if not manager:
            raise Refusal(400, "BadRequest", "fieldManager is required for apply requests", name, plural)
        obj = copy.deepcopy(self.objects.get(key, {"metadata": {"name": name}}))
        owners = dict(self.owners.get(key, {}))
        wanted = dict(leaves(patch))
        conflicts = [
            path for path, value in wanted.items()
            if owners.get(path, manager) != manager and at(obj, path) != value
        ]  # fmt: skip
        if conflicts and query.get("force") != "true":
            other = owners[conflicts[0]]
            text = ".".join(conflicts[0])
            raise Refusal(
                409, "Conflict", f'Apply failed with 1 conflict: conflict with "{other}": .{text}', name, plural
            )
        for path in [path for path, owner in owners.items() if owner == manager and path not in wanted]:
            remove(obj, path)
            del owners[path]
        merge(obj, patch)
        written = self.write(plural, namespace, obj, query)
        if query.get("dryRun") != "All":
            self.owners[key] = owners | dict.fromkeys(wanted, manager)
        return written

    def edit(self, plural: str, namespace: str, name: str, patch: Object, manager: str = "kubectl-edit") -> None:
        """Change an object as another manager."""
        with self.lock:
            self.patch((plural, namespace, name), patch, {"fieldManager": manager})

    def drop(self, plural: str, namespace: str, name: str) -> None:
        """Somebody deletes an object."""
        with self.lock:
            self.delete(plural, namespace, name)

    def patch(self, key: tuple[str, str, str], patch: Object, query: dict[str, str], *, status: bool = False) -> Object:
        """JSON merge patch, of the object or of its status alone."""
        obj = copy.deepcopy(self.read(*key))
        if status:
            patch = {"status": patch.get("status", {})}
        merge(obj, patch)
        manager = query.get("fieldManager", "somebody")
        self.owners.setdefault(key, {}).update({path: manager for path, _ in leaves(patch)})
        written = self.write(key[0], key[1], obj, query)
        if obj["metadata"].get("deletionTimestamp") and not obj["metadata"].get("finalizers"):
            self._drop(key)
        return written

    def delete(self, plural: str, namespace: str, name: str) -> Object:
        """Delete, or mark what has finalizers."""
        obj = self.read(plural, namespace, name)
        if obj["metadata"].get("finalizers"):
            obj["metadata"]["deletionTimestamp"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            self._store(plural, namespace, obj, "MODIFIED")
            return obj
        self._drop((plural, namespace, name))
        return {"apiVersion": "v1", "kind": "Status", "status": "Success", "details": {"name": name, "kind": plural}}

    def _check(self, plural: str, obj: Object, query: dict[str, str]) -> None:
        if KINDS[plural][0] == "ray.io/v1" and query.get("fieldValidation", "Strict") == "Strict":
            stripped = {**obj, "metadata": {k: v for k, v in obj["metadata"].items() if k != "managedFields"}}
            problems = self.validate(stripped)
            if problems:
                path, message = problems[0]
                name = obj["metadata"]["name"]
                raise Refusal(422, "Invalid", f'{obj["kind"]} "{name}" is invalid: {path}: {message}', name, plural)

    def _store(self, plural: str, namespace: str, obj: Object, change: str) -> None:
        self._version += 1
        obj["metadata"]["resourceVersion"] = str(self._version)
        obj["metadata"]["namespace"] = namespace
        self.objects[plural, namespace, obj["metadata"]["name"]] = obj
        self.changes.append(Change(plural, namespace, change, copy.deepcopy(obj)))
        self.lock.notify_all()

    def _drop(self, key: tuple[str, str, str]) -> None:
        obj = self.objects.pop(key)
        self.owners.pop(key, None)
        self.changes.append(Change(key[0], key[1], "DELETED", obj))
        self.lock.notify_all()


@dataclass
class Running:
    """A server that serves."""

    api: FakeApi
    server: ThreadingHTTPServer

    @property
    def url(self) -> str:
        """Its address."""
        host, port = self.server.server_address[:2]
        return f"http://{host!s}:{port}"

    def kubeconfig(self, namespace: str = "team") -> str:
        """Return a kubeconfig for clients."""
        user: Object = {"token": self.api.token} if self.api.token else {}
        return yaml.safe_dump(
            {
                "apiVersion": "v1", "kind": "Config", "current-context": "fake",
                "clusters": [{"name": "fake", "cluster": {"server": self.url}}],
                "users": [{"name": "me", "user": user}],
                "contexts": [{"name": "fake", "context": {"cluster": "fake", "user": "me", "namespace": namespace}}],
            }
        )  # fmt: skip

    def stop(self) -> None:
        """Close the port."""
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_api: FakeApi

    def log_message(self, *_: object) -> None:
        """Log nothing."""

    def _handle(self) -> None:
        api, parts = self.server_api, urlsplit(self.path)
        query = {key: values[-1] for key, values in parse_qs(parts.query).items()}
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else b""
        path = unquote(parts.path).strip("/").split("/")
        with api.lock:
            api.requests.append(f"{self.command} {parts.path}")
        try:
            if api.unavailable:
                api.unavailable -= 1
                raise Refusal(503, "ServiceUnavailable", "the server is currently unable to handle the request")
            if api.token and self.headers.get("Authorization") != f"Bearer {api.token}":
                raise Refusal(401, "Unauthorized", "Unauthorized")
            self._route(api, path, query, body)
        except Refusal as refusal:
            self._json(refusal.status, refusal.code)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _handle

    def _route(self, api: FakeApi, path: list[str], query: dict[str, str], body: bytes) -> None:
        obj = discovery(api, path)
        if obj is not None:
            self._json(obj)
            return
        place = resource(path)
        if place is None or place.plural not in KINDS or place.plural in api.missing:
            if place is not None and place.plural == "services":
                self._service(api, place)
                return
            self._text(404, "404 page not found\n")
            return
        if place.group_version != KINDS[place.plural][0]:
            self._text(404, "404 page not found\n")
            return
        verb = {"GET": "get", "POST": "create", "PATCH": "patch", "PUT": "update", "DELETE": "delete"}[self.command]
        if (place.plural, verb) in api.forbidden:
            raise Refusal(
                403, "Forbidden", f'{place.plural} is forbidden: User "me" cannot {verb} it', "", place.plural
            )
        if place.subresource == "log":
            self._log(api, place.name, query)
        elif query.get("watch") in ("true", "1"):
            self._watch(api, place, query)
        else:
            with api.lock:
                answer = copy.deepcopy(self._change(api, place, query, body))
            self._json(answer, 201 if self.command == "POST" else 200)

    def _change(self, api: FakeApi, place: "Place", query: dict[str, str], body: bytes) -> Object:
        plural, namespace, name = place.plural, place.namespace or "", place.name
        if self.command == "GET" and not name:
            group_version, kind = KINDS[plural]
            items = api.listed(plural, place.namespace, query)
            return {
                "apiVersion": group_version, "kind": f"{kind}List", "items": items,
                "metadata": {"resourceVersion": str(api._version)},
            }  # fmt: skip
        if self.command == "GET":
            return api.read(plural, namespace, name)
        if self.command == "DELETE":
            return api.delete(plural, namespace, name)
        sent = yaml.safe_load(body)
        if self.command == "POST":
            name = sent["metadata"]["name"]
            if (plural, namespace, name) in api.objects:
                raise Refusal(409, "AlreadyExists", f'{plural} "{name}" already exists', name, plural)
            return api.write(plural, namespace, sent, query)
        if self.command == "PUT":
            return api.write(plural, namespace, sent, query)
        if "apply-patch" in self.headers.get("Content-Type", ""):
            return api.apply(plural, namespace, name, sent, query)
        return api.patch((plural, namespace, name), sent, query, status=place.subresource == "status")

    def _watch(self, api: FakeApi, place: "Place", query: dict[str, str]) -> None:
        since = int(query.get("resourceVersion") or 0)
        until = time.monotonic() + float(query.get("timeoutSeconds") or 30)
        self._begin("application/json")
        sent = 0
        while time.monotonic() < until:
            with api.lock:
                fresh = [
                    change for change in api.changes[sent:]
                    if change.plural == place.plural and place.namespace in (None, change.namespace)
                    and int(change.object["metadata"]["resourceVersion"]) > since and selected(change.object, query)
                ]  # fmt: skip
                sent = len(api.changes)
                if not fresh:
                    api.lock.wait(0.2)
            for change in fresh:
                self._chunk(json.dumps({"type": change.type, "object": change.object}).encode() + b"\n")
        self._chunk(b"")

    def _log(self, api: FakeApi, pod: str, query: dict[str, str]) -> None:
        if pod not in api.logs:
            raise Refusal(404, "NotFound", f'pods "{pod}" not found', pod, "pods")
        cut = api.cut_after.pop(0) if api.cut_after else None
        self._begin("text/plain")
        sent = 0
        while True:
            with api.lock:
                lines = api.logs[pod][sent:]
                going = pod in api.open_logs and query.get("follow") == "true"
                if not lines and going:
                    api.lock.wait(0.1)
            for line in lines:
                if cut is not None and sent >= cut:
                    # A connection that breaks in the middle of a line.
                    self._chunk(line[: len(line) // 2].encode())
                    self.connection.close()
                    self.close_connection = True
                    return
                self._chunk((line if query.get("timestamps") == "true" else line.partition(" ")[2]).encode())
                sent += 1
            if not lines and not going:
                self._chunk(b"")
                return

    def _service(self, api: FakeApi, place: "Place") -> None:
        target = f"{place.name}/{place.subresource.removeprefix('proxy/')}"
        api.headers[target] = {key.lower(): value for key, value in self.headers.items()}
        if target not in api.dashboard:
            raise Refusal(404, "NotFound", f'services "{place.name.partition(":")[0]}" not found', "", "services")
        self._json(api.dashboard[target])

    def _begin(self, content_type: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", content_type)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()

    def _json(self, obj: Object, code: int = 200) -> None:
        self._send(code, "application/json", json.dumps(obj).encode())

    def _text(self, code: int, text: str) -> None:
        self._send(code, "text/plain", text.encode())

    def _send(self, code: int, content_type: str, data: bytes) -> None:
        self.send_response(code)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@dataclass(frozen=True)
class Place:
    """Where a URL points."""

    group_version: str
    namespace: str | None
    plural: str
    name: str
    subresource: str


def resource(path: list[str]) -> Place | None:
    """Return the object or list of a URL."""
    if path[0] == "api" and len(path) > 2:
        group_version, rest = path[1], path[2:]
    elif path[0] == "apis" and len(path) > 3:
        group_version, rest = f"{path[1]}/{path[2]}", path[3:]
    else:
        return None
    namespace = None
    if rest[0] == "namespaces" and len(rest) > 2:
        namespace, rest = rest[1], rest[2:]
    plural, name, *more = [*rest, ""]
    return Place(group_version, namespace, plural, name, "/".join(more).rstrip("/"))


def discovery(api: FakeApi, path: list[str]) -> Object | None:
    """Return the resources that the server offers."""
    text = "/".join(path)
    if text == "version":
        return {"major": "1", "minor": "32", "gitVersion": "v1.32.0"}
    if text == "api":
        return {"kind": "APIVersions", "versions": ["v1"]}
    if text == "apis":
        version = {"groupVersion": "ray.io/v1", "version": "v1"}
        group = {"name": "ray.io", "versions": [version], "preferredVersion": version}
        return {"kind": "APIGroupList", "apiVersion": "v1", "groups": [] if "rayjobs" in api.missing else [group]}
    if text in ("api/v1", "apis/ray.io/v1"):
        return _resources(api, text.partition("/")[2])
    if text == "openapi/v3":
        return {"paths": {name: {"serverRelativeURL": f"/openapi/v3/{name}"} for name in ("api/v1", "apis/ray.io/v1")}}
    if text.startswith("openapi/v3/"):
        return _openapi(text.removeprefix("openapi/v3/"))
    return None


def _resources(api: FakeApi, group_version: str) -> Object:
    resources = [
        {
            "name": plural,
            "singularName": kind.lower(),
            "namespaced": plural != "namespaces",
            "kind": kind,
            "verbs": _VERBS,
        }
        for plural, (version, kind) in KINDS.items()
        if version == group_version and plural not in api.missing
    ]
    return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": group_version, "resources": resources}


def _openapi(name: str) -> Object:
    """Return no schemas, but the parameters that show kubectl that the server validates fields itself."""
    group_version = name.partition("/")[2]
    paths = {}
    for plural, (version, kind) in KINDS.items():
        if version != group_version:
            continue
        group, _, short = version.rpartition("/")
        parameters = [
            {"name": key, "in": "query", "schema": {"type": "string"}} for key in ("fieldValidation", "dryRun")
        ]
        paths[f"/{name}/namespaces/{{namespace}}/{plural}/{{name}}"] = {
            "patch": {
                "parameters": parameters, "responses": {},
                "x-kubernetes-group-version-kind": {"group": group, "version": short, "kind": kind},
            }
        }  # fmt: skip
    return {
        "openapi": "3.0.0",
        "info": {"title": "fake", "version": "v1"},
        "paths": paths,
        "components": {"schemas": {}},
    }


def selected(obj: Object, query: dict[str, str]) -> bool:
    """Return whether an object matches labelSelector and fieldSelector."""
    labels = obj["metadata"].get("labels", {})
    for part in filter(None, query.get("labelSelector", "").split(",")):
        key, _, value = part.partition("=")
        if labels.get(key) != value.lstrip("="):
            return False
    for part in filter(None, query.get("fieldSelector", "").split(",")):
        key, _, value = part.partition("=")
        if key == "metadata.name" and obj["metadata"]["name"] != value.lstrip("="):
            return False
    return True


def leaves(obj: Object, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield the paths of all values but the object's identity; a list is one value."""
    for key, value in obj.items():
        if (not path and key in ("apiVersion", "kind")) or (path == ("metadata",) and key in ("name", "namespace")):
            continue
        if isinstance(value, dict) and value:
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key), value


def at(obj: Object, path: tuple[str, ...]) -> Any:
    """Return a value by its path."""
    value: Any = obj
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def remove(obj: Object, path: tuple[str, ...]) -> None:
    """Take a value away."""
    parent = at(obj, path[:-1])
    if isinstance(parent, dict):
        parent.pop(path[-1], None)


def merge(obj: Object, patch: Object) -> None:
    """RFC 7386."""
    for key, value in patch.items():
        if value is None:
            obj.pop(key, None)
        elif isinstance(value, dict) and isinstance(obj.get(key), dict):
            merge(obj[key], value)
        else:
            obj[key] = copy.deepcopy(value)
