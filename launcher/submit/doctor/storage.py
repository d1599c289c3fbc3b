"""Tries the storage on every node, and judges it. Runs on the client; `probes.py` has the part of the nodes.

Every node writes a file with a token of its own into a new directory, then reads all the others' files.
"""

import os
import secrets
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from launcher.rundir.uri import open_uri
from launcher.submit.doctor.complaints import Issue, group_issues
from launcher.submit.doctor.facts import Disk, Finding, StorageSeen
from launcher.submit.doctor.team import ProbeGroup
from launcher.submit.doctor.words import size, some, span

_WRITE_S = 30.0
_READ_S = 15.0  # a directory that NFS has cached is looked at again after some seconds
_CLEAN_S = 20.0
_FULL = 0.95
_LITTLE = 10 * 2**30  # two checkpoints of a model of 400 M parameters with its optimizer states


def absolute(storage: str) -> str:
    """The storage as every node is asked for it: a relative path would mean another directory there."""
    return storage.rstrip("/") if "://" in storage else os.path.abspath(os.path.expanduser(storage))


def try_storage(storage: str, team: ProbeGroup) -> dict[str, StorageSeen]:
    """Write on each node, read on each other; by name of the node."""
    files = {name: f"{number:04d}.txt" for number, name in enumerate(team.names)}
    contents = {file: secrets.token_hex(32) for file in files.values()}
    place = f"{storage}/.launcher-doctor-{secrets.token_hex(8)}"
    seen: dict[str, StorageSeen] = {}
    with _cleaned(team, place, list(contents)):
        calls = {name: (open_uri, place, file, contents[file]) for name, file in files.items()}
        wrote = team.ask(calls, "write", _WRITE_S)
        there = {files[n]: contents[files[n]] for n, answer in wrote.items() if not answer["wrote"]}
        read = team.ask(dict.fromkeys(team.names, (open_uri, place, there, _READ_S)), "read", _READ_S + _WRITE_S)
        names = {file: name for name, file in files.items()}
        for name in team.names:
            answer = wrote.get(name, {"wrote": team.errors.get(name, "no answer"), "disk": None})
            sees = tuple(sorted(names[file] for file in read.get(name, [])))
            disk = Disk.model_validate(answer["disk"]) if answer["disk"] else None
            seen[name] = StorageSeen(wrote=answer["wrote"], sees=sees, disk=disk)
    return seen


@contextmanager
def _cleaned(team: ProbeGroup, place: str, files: list[str]) -> Iterator[None]:
    """Whatever happens inside, the files and the directories that were not there before are taken away after it."""
    made = team.ask_all("missing", open_uri, place, timeout_s=_WRITE_S)
    try:
        yield
    finally:
        team.ask({name: (open_uri, place, files, made.get(name, [])) for name in team.names}, "clean", _CLEAN_S)


def judge(storage: str, nodes: Mapping[str, StorageSeen]) -> list[Finding]:
    """Which nodes cannot write, which see something else, and how much room there is. Pure."""
    findings: list[Finding] = []
    reasons: dict[str, list[str]] = defaultdict(list)
    for name, seen in nodes.items():
        if seen.wrote:
            reasons[seen.wrote].append(name)
    for why, names in reasons.items():
        remedy = f"mount {storage} on {some(names)} with the rights to write and with room, or give another storage"
        text = f"{some(names)} cannot write to {storage} ({why})"
        findings.append(Finding(check="storage", level="problem", found=text, remedy=remedy))
    findings += _unshared(storage, nodes)
    findings += _room(storage, nodes)
    if not findings:
        free = [seen.disk.free_bytes for seen in nodes.values() if seen.disk is not None]
        room = f", {span(size(min(free)), size(max(free)))} free" if free else ""
        shared = "all nodes write and read the same files" if len(nodes) > 1 else "can be written and read"
        findings.append(Finding(check="storage", level="ok", found=f"{storage}: {shared}{room}"))
    return findings


def _unshared(storage: str, nodes: Mapping[str, StorageSeen]) -> list[Finding]:
    """The largest set of nodes that see each other is the storage; the others see something else."""
    wrote = frozenset(name for name, seen in nodes.items() if not seen.wrote)
    if len(wrote) == 0 or all(set(seen.sees) >= wrote for seen in nodes.values()):
        return []
    groups: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for name, seen in nodes.items():
        groups[seen.sees].append(name)
    remedy = (
        f"mount the same network file system at {storage} on all nodes (with KubeRay: one ReadWriteMany volume in the "
        "head and every worker group), or give an object store (s3://, gs://)"
    )
    largest = max(groups.values(), key=len)
    if len(nodes) > 1 and len(largest) == 1:
        text = f"{storage} is another directory on each of {some(nodes)}: not shared"
    else:
        others = [name for names in groups.values() if names is not largest for name in names]
        text = f"{some(others)} see{'s' if len(others) == 1 else ''} another {storage} than {some(largest)}"
    return [Finding(check="storage", level="problem", found=text, remedy=remedy)]


def _room(storage: str, nodes: Mapping[str, StorageSeen]) -> list[Finding]:
    complaints: list[Issue] = []
    for name, seen in nodes.items():
        if seen.disk is None or not seen.disk.total_bytes:
            continue
        free, total = seen.disk.free_bytes, seen.disk.total_bytes
        full = 1 - free / total >= _FULL
        if full or free < _LITTLE:
            text = f"{storage} has {size(free)} of {size(total)} free"
            complaints.append(Issue(name, "problem" if full else "warning", "room", text, _MAKE_ROOM))
    return group_issues("storage", complaints)


_MAKE_ROOM = "make room: a checkpoint takes up to 16 bytes per parameter (weights, moments, fp32 copies)"
