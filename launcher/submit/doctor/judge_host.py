"""Judges the nodes' machines: disks, memory, limits, clocks, access. Pure; runs on the client."""

from collections.abc import Iterator, Mapping, Sequence

from launcher.submit.doctor.complaints import Issue, group_issues
from launcher.submit.doctor.facts import Clock, Disk, Finding, Node, NodeFacts
from launcher.submit.doctor.words import duration, size, some, span

# Ray stops putting objects on a disk that is 95% full (RAY_local_fs_capacity_threshold), and kills workers when 95% of
# the memory is in use (RAY_memory_usage_threshold).
_FULL, _NEARLY_FULL = 0.95, 0.90
_LITTLE_DISK = 2**30  # a block of Ray Data is 128 MiB, and several are on their way at any time
_STORE_FULL = 0.8
_NCCL_SHM = 2**30  # what NCCL takes of /dev/shm for 8 GPUs of one node, rounded up
_FEW_FILES = 8192  # Ray's own advice; every worker and every file of a data set takes some
_SKEW_S, _BAD_SKEW_S = 1.0, 60.0


def disks(nodes: Mapping[str, NodeFacts]) -> list[Finding]:
    """Ray's temporary directory and the one it spills objects to, on every node."""
    complaints: list[Issue] = []
    free: list[int] = []
    for name, facts in nodes.items():
        uses = {"temporary": facts.temp, "spill": facts.spill}
        for use, disk in uses.items():
            # A session is inside the temporary directory: one file system is told once.
            if disk is None or not disk.total_bytes or (use == "spill" and _same(disk, facts.temp)):
                continue
            free.append(disk.free_bytes)
            complaints += _disk(name, use, disk)
    if not free:
        return [Finding(check="disk", level="skipped", found="the nodes do not tell")]
    found = f"{span(size(min(free)), size(max(free)))} free for Ray's temporary files and spilled objects"
    return group_issues("disk", complaints) or [Finding(check="disk", level="ok", found=found)]


def _same(one: Disk, other: Disk | None) -> bool:
    return other is not None and (one.total_bytes, one.free_bytes) == (other.total_bytes, other.free_bytes)


def _disk(name: str, use: str, disk: Disk) -> Iterator[Issue]:
    used = 1 - disk.free_bytes / disk.total_bytes
    room = f"{size(disk.free_bytes)} of {size(disk.total_bytes)} free"
    where = f"Ray's {use} directory, {disk.path}, is {used:.0%} full, {room}"
    option = "--temp-dir" if use == "temporary" else "--object-spilling-directory"
    remedy = f"make room in {disk.path} on {{who}}, or give Ray another disk there (`ray start {option}`)"
    if used >= _FULL:
        yield Issue(name, "problem", use, f"{where}: Ray writes no objects there any more", remedy)
    elif used >= _NEARLY_FULL or disk.free_bytes < _LITTLE_DISK:
        yield Issue(name, "warning", use, where, remedy)


def memory(nodes: Mapping[str, NodeFacts], tables: Mapping[str, Node]) -> list[Finding]:
    """Memory of the host or container, how full the object store is, and /dev/shm."""
    complaints: list[Issue] = []
    for name, facts in nodes.items():
        for part in (_host(name, facts), _store(name, facts, tables[name]), _shm(name, facts, tables[name])):
            complaints += part
    free = [facts.memory_free_bytes for facts in nodes.values() if facts.memory_free_bytes is not None]
    stores = [tables[name].object_store_bytes for name in nodes]
    found = f"{span(size(min(free)), size(max(free)))} free; " if free else ""
    found += f"object stores of {span(size(min(stores)), size(max(stores)))}, with room"
    return group_issues("memory", complaints) or [Finding(check="memory", level="ok", found=found)]


def _host(name: str, facts: NodeFacts) -> Iterator[Issue]:
    if not facts.memory_bytes or facts.memory_free_bytes is None:
        return
    used = 1 - facts.memory_free_bytes / facts.memory_bytes
    text = f"{used:.0%} of {size(facts.memory_bytes)} memory in use"
    remedy = "end what else runs on {who}, or give it more memory"
    if used >= _FULL:
        yield Issue(name, "problem", "memory", f"{text}: Ray kills workers at {_FULL:.0%}", remedy)
    elif used >= _NEARLY_FULL:
        yield Issue(name, "warning", "memory", text, remedy)


def _store(name: str, facts: NodeFacts, table: Node) -> Iterator[Issue]:
    used, total = facts.store_used_bytes, table.object_store_bytes
    if used is None or not total or used < _STORE_FULL * total:
        return
    text = f"the object store is {used / total:.0%} full ({size(used)} of {size(total)})"
    remedy = "other jobs hold objects on {who} (`ray memory` lists them); a job that needs the room spills to disk"
    yield Issue(name, "warning", "store", text, remedy)


def _shm(name: str, facts: NodeFacts, table: Node) -> Iterator[Issue]:
    grow = "give {who} more /dev/shm (docker --shm-size; in a pod an emptyDir of medium Memory at /dev/shm)"
    if facts.store_directory and not facts.store_directory.startswith("/dev/shm"):
        text = f"Ray's object store is in {facts.store_directory}, as /dev/shm was too small: slow"
        yield Issue(name, "warning", "store directory", text, f"{grow}: a third of the memory or more")
        return
    if facts.shm is None:
        return
    left = facts.shm.total_bytes - table.object_store_bytes
    text = f"/dev/shm has {size(facts.shm.total_bytes)}, Ray's object store alone {size(table.object_store_bytes)}"
    if left < 0:
        remedy = f"{grow}, or Ray a smaller --object-store-memory"
        yield Issue(name, "problem", "shm", f"{text}: processes die with a bus error when it is full", remedy)
    elif table.ray_gpus > 1 and left < _NCCL_SHM:
        needs = f"{text}; NCCL between its {table.ray_gpus:g} GPUs takes up to {size(_NCCL_SHM)} more"
        yield Issue(name, "warning", "shm", needs, grow)


def limits(nodes: Mapping[str, NodeFacts], tables: Mapping[str, Node]) -> list[Finding]:
    """Open files, and CPUs that Ray gives away though the container may not use them."""
    complaints: list[Issue] = []
    for name, facts in nodes.items():
        if facts.open_files is not None and 0 <= facts.open_files < _FEW_FILES:  # -1 is no limit
            text = f"a process may open {facts.open_files} files at most"
            remedy = f"`ulimit -n 65536` on {{who}} before `ray start`; {_FEW_FILES} is the least Ray advises"
            complaints.append(Issue(name, "warning", "files", text, remedy))
        if tables[name].ray_cpus > facts.cpus:
            text = f"Ray hands out {tables[name].ray_cpus:g} CPUs, processes may use {facts.cpus:g}"
            remedy = f"`ray start --num-cpus {max(1, int(facts.cpus))}` on {{who}}, or raise the container's CPU limit"
            complaints.append(Issue(name, "warning", "cpus", text, remedy))
    cpus = [facts.cpus for facts in nodes.values()]
    files = [facts.open_files for facts in nodes.values() if facts.open_files is not None]
    found = f"{span(f'{min(cpus):g}', f'{max(cpus):g}')} CPUs per node"
    found += f", {span(str(min(files)), str(max(files)))} open files" if files else ""
    return group_issues("limits", complaints) or [Finding(check="limits", level="ok", found=found)]


def clocks(nodes: Mapping[str, Clock]) -> list[Finding]:
    """How far the nodes' clocks are apart."""
    if len(nodes) < 2:
        return [Finding(check="clocks", level="skipped", found="one clock has nothing to differ from")]
    order = sorted(nodes, key=lambda name: nodes[name].offset_s)
    last, first = order[0], order[-1]
    apart = nodes[first].offset_s - nodes[last].offset_s
    unsure = nodes[first].uncertainty_s + nodes[last].uncertainty_s
    if apart - unsure < _SKEW_S:
        found = f"at most {duration(apart)} apart (give or take {duration(unsure)})"
        return [Finding(check="clocks", level="ok", found=found)]
    middle = nodes[order[len(order) // 2]].offset_s
    odd = first if nodes[first].offset_s - middle > middle - nodes[last].offset_s else last
    found = f"{first} is {duration(apart)} ahead of {last} (give or take {duration(unsure)})"
    found += f"; {odd} is the one that the others differ from" if len(nodes) > 2 else ""
    remedy = (
        "run chrony or another NTP client on the hosts: logs mix up, and tokens and requests to storage are refused"
    )
    return [Finding(check="clocks", level="problem" if apart > _BAD_SKEW_S else "warning", found=found, remedy=remedy)]


def access(nodes: Mapping[str, NodeFacts], addresses: Sequence[str]) -> list[Finding]:
    """Whether anybody on the network may run code there."""
    asks = {facts.token_needed for facts in nodes.values()}
    if True in asks:
        return [Finding(check="access", level="ok", found="the cluster asks for a token, and took the one given")]
    if False not in asks:
        return [Finding(check="access", level="skipped", found="the nodes do not tell whether they ask for a token")]
    if all(address.startswith("127.") for address in addresses):
        return [Finding(check="access", level="ok", found="no token, but this machine alone can reach it")]
    found = f"no token is asked for: whoever reaches {some(addresses, 2)} on the network can run code in the cluster"
    remedy = (
        "`ray get-auth-token --generate`, the same token on all nodes (RAY_AUTH_TOKEN or ~/.ray/auth_token), and "
        "RAY_AUTH_MODE=token wherever Ray starts; with KubeRay authOptions: {mode: token}"
    )
    return [Finding(check="access", level="warning", found=found, remedy=remedy)]
