"""Checks of single nodes: thresholds, and the finding with its remedy for each. Pure; runs on the client.

Each public function is one check of the report and returns its findings, an `ok` one where nothing is wrong. Read
`shared_checks.py` for what nodes share, storage and network.
"""

import statistics
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence

from launcher.formatting import format_size, pluralize
from launcher.spec.cluster import ClusterSpec
from launcher.submit.doctor.facts import (
    Clock,
    Disk,
    Finding,
    Gpu,
    Imports,
    Issue,
    Node,
    NodeFacts,
    Software,
    duration,
    finding,
    group_issues,
    some,
    span,
)

TRAINING = ("torch", "transformers", "deepspeed")
# Packages that affect the numbers of a run, or what its processes send each other.
_MATTERS = (
    "python", "ray", "launcher", *TRAINING, "pyarrow", "numpy", "pydantic", "cloudpickle", "tokenizers", "safetensors",
    "datasets", "torchmetrics", "peft", "pillow", "fsspec",
)  # fmt: skip
# Ray Train gives a group of workers 60 s to start; half of that may go into imports.
_SLOW_IMPORT_S = 30.0
# Below it, differences between nodes do not matter.
_FAST_IMPORT_S = 10.0
_SLOW_IMPORT_FACTOR = 3.0
_SAME_VERSIONS = (
    "give {who} the versions that are here: the same image on all nodes, or `pip install` of the same constraints file "
    "(or run the command where the nodes' versions are)"
)
_SLOW_IMPORTS = (
    "put the Python environment of {who} on a local disk or into the image, and look for other load there; "
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S gives workers more time to start"
)
# Ray stops putting objects on a disk that is 95% full (RAY_local_fs_capacity_threshold), and kills workers when 95% of
# the memory is in use (RAY_memory_usage_threshold).
_FULL, _NEARLY_FULL = 0.95, 0.90
# A block of Ray Data is 128 MiB, and several are in flight at any time.
_LITTLE_DISK = 2**30
_STORE_FULL = 0.8
# What NCCL takes of /dev/shm for 8 GPUs of one node, rounded up.
_NCCL_SHM = 2**30
# Ray's own advice; every worker and every file of a data set takes some.
_FEW_FILES = 8192
_SKEW_S, _BAD_SKEW_S = 1.0, 60.0
# Fraction of its memory; a desktop or a monitor takes less.
_GPU_IN_USE = 0.1


def job(cluster: ClusterSpec, nodes: Sequence[Node], free: Mapping[str, float]) -> list[Finding]:
    """Count how many of the job's workers fit on the nodes, and whether other jobs are in the way.

    Args:
        cluster: Resources of the job.
        nodes: Live nodes.
        free: Unreserved resources over all nodes.
    """
    request = f"{pluralize(cluster.workers, 'worker')} of {cluster.cpus_per_worker:g} CPU"
    if cluster.gpus_per_worker:
        request += f" and {cluster.gpus_per_worker:g} GPU"
    fit = sum(_fit(cluster, node) for node in nodes)
    if fit < cluster.workers:
        remedy = (
            "add nodes (an autoscaler may do that by itself), or ask for less: cluster.workers, "
            "cluster.cpus_per_worker, cluster.gpus_per_worker"
        )
        text = f"the job asks for {request}; {fit} fit on the nodes, and it would wait for the rest"
        return [finding("job", "problem", text, remedy)]
    needs = {"CPU": cluster.workers * cluster.cpus_per_worker, "GPU": cluster.workers * cluster.gpus_per_worker}
    short = [f"{free.get(kind, 0.0):g} {kind}" for kind, amount in needs.items() if amount > free.get(kind, 0.0)]
    if short:
        text = f"the job asks for {request}; other jobs leave {' and '.join(short)} free now"
        return [finding("job", "warning", text, "it waits until they end (`ray status`)")]
    return [finding("job", "ok", f"{request} fit: there is room for {fit}")]


def _fit(cluster: ClusterSpec, node: Node) -> int:
    """Return how many workers fit on one node; Ray's reservations are exact to 0.0001."""
    fits = [int(node.ray_cpus / cluster.cpus_per_worker + 1e-4)]
    if cluster.gpus_per_worker:
        fits.append(int(node.ray_gpus / cluster.gpus_per_worker + 1e-4))
    return min(fits)


def answers(names: Sequence[str], silent: Mapping[str, str]) -> list[Finding]:
    """Report the nodes that run no probe.

    Args:
        names: Nodes that answered.
        silent: Reason by node that did not.
    """
    remedy = (
        "look at {who} (`ray status`; Ray's logs there): it hangs, is overloaded, or has another Ray or another minor "
        "version of Python, which cannot run what is sent to it"
    )
    issues = [Issue(name, "problem", "silent", f"runs no probe ({reason})", remedy) for name, reason in silent.items()]
    text = f"{pluralize(len(names), 'node')} alive and answering"
    return group_issues("nodes", issues) or [finding("nodes", "ok", text)]


def versions(local: Software, nodes: Mapping[str, Software], closure: Collection[str]) -> list[Finding]:
    """Compare the packages of every node with those of the command's own environment.

    Args:
        local: Software of the command's environment.
        nodes: Software of each node.
        closure: Names of the packages that the launcher needs, directly or indirectly.
    """
    alike: dict[tuple[tuple[str, ...], tuple[str, ...]], list[str]] = defaultdict(list)
    for name, software in nodes.items():
        alike[_differences(local, software, closure)].append(name)
    findings: list[Finding] = []
    for (major, minor), names in alike.items():
        who = f"all {len(nodes)} nodes" if len(names) == len(nodes) > 1 else some(names)
        remedy = _SAME_VERSIONS.format(who=who)
        if major:
            findings.append(finding("versions", "problem", f"{who}: {some(major, 6)}", remedy))
        if minor:
            findings.append(finding("versions", "warning", f"{who}: {some(minor, 6)}", remedy))
    if not findings:
        shown = [name for name in ("python", "ray", *TRAINING) if _version(local, name)]
        text = ", ".join(f"{name} {_version(local, name)}" for name in shown)
        text += f" and {len(closure)} packages in all are the same on {pluralize(len(nodes), 'node')} and here"
        findings.append(finding("versions", "ok", text))
    return findings


def _version(software: Software, name: str) -> str | None:
    return software.python if name == "python" else software.packages.get(name)


def _differences(
    local: Software, remote: Software, closure: Collection[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the differences that affect a run, and the others, as `torch 2.12.0 (here 2.13.0)`."""
    major: list[str] = []
    minor: list[str] = []
    for name in (*_MATTERS, *sorted(set(closure) - set(_MATTERS))):
        version, other = _version(local, name), _version(remote, name)
        # A run that starts here uses only packages that are here.
        if version is None or version == other:
            continue
        # Actors' code travels as byte code (cloudpickle), which only a minor version of Python changes.
        is_patch = name == "python" and other is not None and version.split(".")[:2] == other.split(".")[:2]
        differences = major if name in _MATTERS and not is_patch else minor
        differences.append(f"{name} {other or 'missing'} (here {version})")
    # An editable install, or an image from another commit, has other code under the same version.
    has_same_version = _version(local, "launcher") == _version(remote, "launcher")
    if has_same_version and local.launcher_sha256 != remote.launcher_sha256:
        what = "other code of launcher" if remote.launcher_sha256 else "no code of launcher"
        major.append(f"{what} under the same version {_version(local, 'launcher') or '(not installed)'}")
    return tuple(major), tuple(minor)


def imports(nodes: Mapping[str, Imports]) -> list[Finding]:
    """Find libraries that cannot be imported, and nodes where imports are slow: a cold or slow disk."""
    issues: list[Issue] = []
    totals = {name: sum(times.seconds.values()) for name, times in nodes.items() if times.seconds}
    median = statistics.median(totals.values()) if totals else 0.0
    for name, times in nodes.items():
        for library, reason in times.errors.items():
            text = f"{library} cannot be imported ({reason})"
            remedy = f"fix the installation on {{who}}: an import of {library} must work there"
            issues.append(Issue(name, "problem", library, text, remedy))
        total = totals.get(name, 0.0)
        if total > _SLOW_IMPORT_S or (total > _FAST_IMPORT_S and total > _SLOW_IMPORT_FACTOR * median):
            text = f"{total:.1f} s to import ({_each(times)}); median of the nodes {median:.1f} s"
            issues.append(Issue(name, "warning", "slow", text, _SLOW_IMPORTS))
    if issues or not totals:
        return group_issues("imports", issues) or [finding("imports", "skipped", "no node answered")]
    slowest = max(totals, key=lambda name: totals[name])
    text = f"{totals[slowest]:.1f} s on the slowest node, {slowest} ({_each(nodes[slowest])})"
    return [finding("imports", "ok", text)]


def _each(times: Imports) -> str:
    return ", ".join(f"{library} {seconds:.1f} s" for library, seconds in times.seconds.items())


def disks(nodes: Mapping[str, NodeFacts]) -> list[Finding]:
    """Check the space of Ray's temporary directory and of the one it spills objects to."""
    issues: list[Issue] = []
    free: list[int] = []
    for name, facts in nodes.items():
        uses = {"temporary": facts.temp, "spill": facts.spill}
        for use, disk in uses.items():
            # The session lies in the temporary directory: one file system is reported once.
            if disk is None or not disk.total_bytes or (use == "spill" and _same(disk, facts.temp)):
                continue
            free.append(disk.free_bytes)
            issues += _disk(name, use, disk)
    if not free:
        return [finding("disk", "skipped", "the nodes do not report their disks")]
    text = f"{span(format_size(min(free)), format_size(max(free)))} free for Ray's temporary files and spilled objects"
    return group_issues("disk", issues) or [finding("disk", "ok", text)]


def _same(disk: Disk, other: Disk | None) -> bool:
    # By figures, as the probe reports no device. The two are read one after the other, so a busy disk may count twice.
    return other is not None and (disk.total_bytes, disk.free_bytes) == (other.total_bytes, other.free_bytes)


def _disk(name: str, use: str, disk: Disk) -> Iterator[Issue]:
    used = 1 - disk.free_bytes / disk.total_bytes
    free = f"{format_size(disk.free_bytes)} of {format_size(disk.total_bytes)} free"
    where = f"Ray's {use} directory, {disk.path}, is {used:.0%} full, {free}"
    option = "--temp-dir" if use == "temporary" else "--object-spilling-directory"
    remedy = f"free space in {disk.path} on {{who}}, or give Ray another disk there (`ray start {option}`)"
    if used >= _FULL:
        yield Issue(name, "problem", use, f"{where}: Ray writes no more objects there", remedy)
    elif used >= _NEARLY_FULL or disk.free_bytes < _LITTLE_DISK:
        yield Issue(name, "warning", use, where, remedy)


def memory(nodes: Mapping[str, NodeFacts], ray_nodes: Mapping[str, Node]) -> list[Finding]:
    """Check the memory of the host or container, the object store, and /dev/shm."""
    issues: list[Issue] = []
    for name, facts in nodes.items():
        for part in (_host(name, facts), _store(name, facts, ray_nodes[name]), _shm(name, facts, ray_nodes[name])):
            issues += part
    free = [facts.memory_free_bytes for facts in nodes.values() if facts.memory_free_bytes is not None]
    stores = [ray_nodes[name].object_store_bytes for name in nodes]
    text = f"{span(format_size(min(free)), format_size(max(free)))} free; " if free else ""
    text += f"object stores of {span(format_size(min(stores)), format_size(max(stores)))}, not full"
    return group_issues("memory", issues) or [finding("memory", "ok", text)]


def _host(name: str, facts: NodeFacts) -> Iterator[Issue]:
    if not facts.memory_bytes or facts.memory_free_bytes is None:
        return
    used = 1 - facts.memory_free_bytes / facts.memory_bytes
    text = f"{used:.0%} of {format_size(facts.memory_bytes)} memory in use"
    remedy = "end what else runs on {who}, or give it more memory"
    if used >= _FULL:
        yield Issue(name, "problem", "memory", f"{text}: Ray kills workers at {_FULL:.0%}", remedy)
    elif used >= _NEARLY_FULL:
        yield Issue(name, "warning", "memory", text, remedy)


def _store(name: str, facts: NodeFacts, node: Node) -> Iterator[Issue]:
    used, total = facts.store_used_bytes, node.object_store_bytes
    if used is None or not total or used < _STORE_FULL * total:
        return
    text = f"the object store is {used / total:.0%} full ({format_size(used)} of {format_size(total)})"
    remedy = "other jobs hold objects on {who} (`ray memory` lists them); a job that needs the space spills to disk"
    yield Issue(name, "warning", "store", text, remedy)


def _shm(name: str, facts: NodeFacts, node: Node) -> Iterator[Issue]:
    grow = "give {who} more /dev/shm (docker --shm-size; in a pod an emptyDir of medium Memory at /dev/shm)"
    if facts.store_directory and not facts.store_directory.startswith("/dev/shm"):
        text = f"Ray's object store is in {facts.store_directory}, as /dev/shm was too small: slow"
        yield Issue(name, "warning", "store directory", text, f"{grow}: a third of the memory or more")
        return
    if facts.shm is None:
        return
    left = facts.shm.total_bytes - node.object_store_bytes
    shm, store = format_size(facts.shm.total_bytes), format_size(node.object_store_bytes)
    text = f"/dev/shm has {shm}, Ray's object store alone {store}"
    if left < 0:
        remedy = f"{grow}, or Ray a smaller --object-store-memory"
        yield Issue(name, "problem", "shm", f"{text}: processes die with a bus error when it is full", remedy)
    elif node.ray_gpus > 1 and left < _NCCL_SHM:
        needs = f"{text}; NCCL between its {node.ray_gpus:g} GPUs takes up to {format_size(_NCCL_SHM)} more"
        yield Issue(name, "warning", "shm", needs, grow)


def limits(nodes: Mapping[str, NodeFacts], ray_nodes: Mapping[str, Node]) -> list[Finding]:
    """Check the limit of open files, and that Ray offers no more CPUs than the container may use."""
    issues: list[Issue] = []
    # RLIM_INFINITY is -1 in Python: no limit.
    files = {
        name: facts.open_files
        for name, facts in nodes.items()
        if facts.open_files is not None and facts.open_files >= 0
    }
    for name, facts in nodes.items():
        if name in files and files[name] < _FEW_FILES:
            text = f"a process may open {files[name]} files at most"
            remedy = f"`ulimit -n 65536` on {{who}} before `ray start`; {_FEW_FILES} is the least Ray advises"
            issues.append(Issue(name, "warning", "files", text, remedy))
        if ray_nodes[name].ray_cpus > facts.cpus:
            text = f"Ray offers {ray_nodes[name].ray_cpus:g} CPUs, processes may use {facts.cpus:g}"
            remedy = f"`ray start --num-cpus {max(1, int(facts.cpus))}` on {{who}}, or raise the container's CPU limit"
            issues.append(Issue(name, "warning", "cpus", text, remedy))
    cpus = [facts.cpus for facts in nodes.values()]
    text = f"{span(f'{min(cpus):g}', f'{max(cpus):g}')} CPUs per node"
    text += f", {span(str(min(files.values())), str(max(files.values())))} open files" if files else ""
    return group_issues("limits", issues) or [finding("limits", "ok", text)]


def clocks(nodes: Mapping[str, Clock]) -> list[Finding]:
    """Compare the nodes' clocks."""
    if len(nodes) < 2:
        return [finding("clocks", "skipped", "one node: there are no clocks to compare")]
    order = sorted(nodes, key=lambda name: nodes[name].offset_s)
    last, first = order[0], order[-1]
    apart = nodes[first].offset_s - nodes[last].offset_s
    uncertainty = nodes[first].uncertainty_s + nodes[last].uncertainty_s
    # No warning within the error of the measurement: over a slow link the offset is uncertain.
    if apart - uncertainty < _SKEW_S:
        return [finding("clocks", "ok", f"at most {duration(apart)} apart (± {duration(uncertainty)})")]
    middle = nodes[order[len(order) // 2]].offset_s
    odd = first if nodes[first].offset_s - middle > middle - nodes[last].offset_s else last
    text = f"{first} is {duration(apart)} ahead of {last} (± {duration(uncertainty)})"
    text += f"; {odd} differs from the others" if len(nodes) > 2 else ""
    remedy = (
        "run chrony or another NTP client on the hosts: logs mix up, and tokens and requests to storage are refused"
    )
    return [finding("clocks", "problem" if apart > _BAD_SKEW_S else "warning", text, remedy)]


def access(nodes: Mapping[str, NodeFacts], addresses: Sequence[str]) -> list[Finding]:
    """Check that Ray requires a token where others on the network can reach it."""
    answers = {facts.token_needed for facts in nodes.values()}
    if True in answers:
        return [finding("access", "ok", "the cluster requires a token, and accepted the one given")]
    if False not in answers:
        return [finding("access", "skipped", "the nodes do not report whether they require a token")]
    if all(address.startswith("127.") for address in addresses):
        return [finding("access", "ok", "no token, but only this machine can reach it")]
    text = f"no token is required: anyone who can reach {some(addresses, 2)} can run code in the cluster"
    remedy = (
        "`ray get-auth-token --generate`, the same token on all nodes (RAY_AUTH_TOKEN or ~/.ray/auth_token), and "
        "RAY_AUTH_MODE=token wherever Ray starts; with KubeRay authOptions: {mode: token}"
    )
    return [finding("access", "warning", text, remedy)]


def gpus(
    nodes: Mapping[str, NodeFacts], ray_nodes: Mapping[str, Node], imports: Mapping[str, Imports], is_wanted: bool
) -> list[Finding]:
    """Compare the GPUs that Ray offers with those that torch and the driver see, and check each GPU's health.

    Args:
        nodes: Facts of each node.
        ray_nodes: Ray's table of each node.
        imports: Import results, with the GPUs that torch sees.
        is_wanted: True if the job asks for GPUs.
    """
    issues: list[Issue] = []
    for name, facts in nodes.items():
        if facts.gpu_error:
            remedy = "`nvidia-smi` must work on {who}: look at the driver and at the container's GPU runtime"
            issues.append(Issue(name, "problem", "driver", facts.gpu_error, remedy))
        issues += _gpu_count(name, facts, ray_nodes[name], imports.get(name))
        for gpu in facts.gpus:
            issues += _gpu(name, gpu)
    if issues:
        return group_issues("gpus", issues)
    every = [gpu for facts in nodes.values() for gpu in facts.gpus]
    if not every and is_wanted:
        remedy = "add GPU nodes, start Ray where the driver is installed, or set cluster.gpus_per_worker to 0"
        return [finding("gpus", "problem", "none, and the job asks for some", remedy)]
    kinds = ", ".join(sorted({f"{gpu.name} {format_size(gpu.memory_bytes)}" for gpu in every}))
    text = f"{len(every)}: {kinds}; no memory errors, no reduced clocks" if every else "none: trains on the CPU"
    return [finding("gpus", "ok", text)]


def _gpu_count(name: str, facts: NodeFacts, node: Node, imports: Imports | None) -> Iterator[Issue]:
    torch_sees = imports.torch_gpus if imports is not None else None
    if torch_sees is None or torch_sees == node.ray_gpus:
        return
    text = f"Ray offers {node.ray_gpus:g} GPUs, torch sees {torch_sees}, NVML {len(facts.gpus)}"
    remedy = (
        "on {who}: a torch build for the CUDA driver there (torch.cuda.is_available()), and `ray start --num-gpus` of "
        "as many as there are"
    )
    yield Issue(name, "problem", "count", text, remedy)


def _gpu(name: str, gpu: Gpu) -> Iterator[Issue]:
    which = f"GPU {gpu.index} ({gpu.name})"
    if gpu.ecc_errors:
        text = f"{which} has {gpu.ecc_errors} uncorrected memory errors"
        remedy = "take {who} out of the cluster, reset the GPU (`nvidia-smi -r`), replace it if they recur"
        yield Issue(name, "problem", "ecc", text, remedy)
    if gpu.slowed_by:
        text = f"{which} runs at a reduced clock ({', '.join(gpu.slowed_by)}): the whole group waits for it"
        yield Issue(name, "warning", "slow", text, "check cooling and power of {who}, or train without it")
    if gpu.memory_bytes and gpu.memory_used_bytes > _GPU_IN_USE * gpu.memory_bytes:
        text = f"{which}: {format_size(gpu.memory_used_bytes)} of {format_size(gpu.memory_bytes)} are already in use"
        yield Issue(name, "warning", "in use", text, "`nvidia-smi` on {who} shows by whom")
