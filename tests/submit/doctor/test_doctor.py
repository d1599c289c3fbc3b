"""The doctor's checks: the finding for each kind of fact, branch by branch. No cluster needed."""

from collections.abc import Callable

import pytest

from launcher.spec.cluster import ClusterSpec
from launcher.submit.doctor import checks, shared_checks
from launcher.submit.doctor.facts import (
    Clock,
    Disk,
    DoctorRecord,
    Finding,
    Gpu,
    Imports,
    Issue,
    Level,
    Network,
    Node,
    NodeFacts,
    Software,
    StorageSeen,
    Transfer,
    duration,
    group_issues,
    some,
    span,
    speed,
)
from launcher.submit.doctor.probes import tournament
from launcher.submit.doctor.report import nodes_of

GIB = 2**30
HERE = Software(
    python="3.11.7",
    packages={"torch": "2.13.0", "ray": "2.60.0", "launcher": "0.1.0", "tqdm": "4.70"},
    launcher_sha256="aa",
)
CLOSURE = frozenset({"torch", "ray", "launcher", "tqdm"})


def software(python: str = "3.11.7", sha256: str | None = "aa", **versions: str | None) -> Software:
    packages = {name: version for name, version in {**HERE.packages, **versions}.items() if version is not None}
    return Software(python=python, packages=packages, launcher_sha256=sha256)


def disk(total: int = 100 * GIB, free: int = 50 * GIB, path: str = "/tmp/ray") -> Disk:
    return Disk(path=path, total_bytes=total, free_bytes=free)


def facts(**changes: object) -> NodeFacts:
    healthy = NodeFacts(
        software=HERE, cpus=8.0, memory_bytes=64 * GIB, memory_free_bytes=32 * GIB, open_files=65536, temp=disk(),
        spill=disk(path="/tmp/ray/session"), shm=disk(32 * GIB, 32 * GIB, "/dev/shm"), store_directory="/dev/shm",
        store_used_bytes=0, gpus=(), gpu_error="", token_needed=True,
    )  # fmt: skip
    return healthy.model_copy(update=changes)


def node(name: str = "a", cpus: float = 8.0, gpus: float = 0.0, store: int = 16 * GIB) -> Node:
    return Node(
        node_id=name * 8, name=name, address="10.0.0.1", is_head=False, ray_cpus=cpus, ray_gpus=gpus,
        object_store_bytes=store,
    )  # fmt: skip


def levels(findings: list[Finding]) -> list[str]:
    return [finding.level for finding in findings]


def check_imports(**seconds: float) -> list[Finding]:
    nodes = {name: Imports(seconds={"torch": value}, errors={}, torch_gpus=0) for name, value in seconds.items()}
    return checks.imports(nodes)


def check_memory(gpus: float = 0.0, **changes: object) -> list[Finding]:
    return checks.memory({"a": facts(**changes)}, {"a": node(gpus=gpus)})


def check_limits(**changes: object) -> list[Finding]:
    return checks.limits({"a": facts(**changes)}, {"a": node()})


def check_clocks(*offsets: float, uncertainty: float = 0.001) -> list[Finding]:
    clocks = [Clock(offset_s=offset, uncertainty_s=uncertainty) for offset in offsets]
    return checks.clocks(dict(zip("abc", clocks, strict=False)))


def check_access(needed: bool | None, address: str = "10.0.0.1") -> list[Finding]:
    return checks.access({"a": facts(token_needed=needed)}, [address])


def gpu(**changes: object) -> Gpu:
    healthy = Gpu(index=0, name="H100", memory_bytes=80 * GIB, memory_used_bytes=0)
    return healthy.model_copy(update=changes)


def check_gpus(
    *gpus: Gpu, torch_gpus: int = 1, ray_gpus: float = 1, is_wanted: bool = True, **changes: object
) -> list[Finding]:
    imports = {"a": Imports(seconds={}, errors={}, torch_gpus=torch_gpus)}
    return checks.gpus({"a": facts(gpus=gpus, **changes)}, {"a": node(gpus=ray_gpus)}, imports, is_wanted)


def seen(*names: str, wrote: str = "", free: int | None = None) -> StorageSeen:
    return StorageSeen(wrote=wrote, sees=names, disk=None if free is None else disk(free=free))


def check_storage(**nodes: StorageSeen) -> list[Finding]:
    return shared_checks.storage("/mnt/runs", nodes)


def transfer(nodes: str, mb_per_s: float, latency_s: float = 1e-4, error: str = "") -> Transfer:
    """Return an all-reduce; with two ranks each byte crosses the link once."""
    ranks = len(nodes)
    seconds = 0.0 if error else 2 * (ranks - 1) / ranks * 1e6 / (mb_per_s * 1e6)
    return Transfer(nodes=tuple(nodes), ranks=ranks, num_bytes=10**6, seconds=seconds, latency_s=latency_s, error=error)


def check_network(ring: Transfer, *pairs: Transfer, note: str = "") -> list[Finding]:
    return shared_checks.network(Network(backend="gloo", ring=ring, pairs=pairs, note=note))


def check_job(*cpus: float, free: float = 16.0, gpus_per_worker: float = 0.0) -> list[Finding]:
    cluster = ClusterSpec(workers=4, cpus_per_worker=3.0, gpus_per_worker=gpus_per_worker)
    return checks.job(cluster, [node(name, cpu) for name, cpu in zip("abc", cpus, strict=False)], {"CPU": free})


ONE_FINDING: dict[str, tuple[Callable[[], list[Finding]], Level, str, str]] = {
    "imports: fast": (lambda: check_imports(a=2.0),
        "ok", "2.0 s on the slowest node, a (torch 2.0 s)", ""),
    "imports: slow": (lambda: check_imports(a=3.0, b=3.0, c=31.0),
        "warning", "c: 31.0 s to import (torch 31.0 s); median of the nodes 3.0 s", "of c on a local disk"),
    "imports: slower than the others": (lambda: check_imports(a=3.0, b=3.0, c=12.0),
        "warning", "c: 12.0 s to import (torch 12.0 s); median of the nodes 3.0 s", ""),
    "imports: no answer": (lambda: check_imports(),
        "skipped", "no node answered", ""),
    "disk: room": (lambda: checks.disks({"a": facts(), "b": facts(spill=disk(free=60 * GIB))}),
        "ok", "50.0 GiB to 60.0 GiB free for Ray's temporary files and spilled objects", ""),
    "disk: small": (lambda: checks.disks({"a": facts(temp=disk(GIB, GIB // 2), spill=disk(GIB, GIB // 2))}),
        "warning", "a: Ray's temporary directory, /tmp/ray, is 50% full, 512 MiB of 1.0 GiB free",
        "free space in /tmp/ray on a"),
    "disk: unknown": (lambda: checks.disks({"a": facts(temp=None, spill=disk(total=0, free=0))}),
        "skipped", "the nodes do not report their disks", ""),
    "memory: room": (lambda: check_memory(),
        "ok", "32.0 GiB free; object stores of 16.0 GiB, not full", ""),
    "memory: nearly full": (lambda: check_memory(memory_free_bytes=5 * GIB),
        "warning", "a: 92% of 64.0 GiB memory in use", ""),
    "memory: full": (lambda: check_memory(memory_free_bytes=2 * GIB),
        "problem", "a: 97% of 64.0 GiB memory in use: Ray kills workers at 95%", ""),
    "memory: unknown": (lambda: check_memory(memory_bytes=None, shm=None),
        "ok", "32.0 GiB free; object stores of 16.0 GiB, not full", ""),
    "memory: full store": (lambda: check_memory(store_used_bytes=14 * GIB),
        "warning", "a: the object store is 88% full (14.0 GiB of 16.0 GiB)", ""),
    "memory: small shm": (lambda: check_memory(shm=disk(GIB, GIB, "/dev/shm")),
        "problem", "a: /dev/shm has 1.0 GiB, Ray's object store alone 16.0 GiB: processes die with a bus error when "
        "it is full", ""),
    "memory: shm without room for NCCL": (lambda: check_memory(gpus=8, shm=disk(16 * GIB, 16 * GIB, "/dev/shm")),
        "warning", "a: /dev/shm has 16.0 GiB, Ray's object store alone 16.0 GiB; NCCL between its 8 GPUs takes up to "
        "1.0 GiB more", ""),
    "memory: shm of one GPU": (lambda: check_memory(gpus=1, shm=disk(16 * GIB, 16 * GIB, "/dev/shm")),
        "ok", "32.0 GiB free; object stores of 16.0 GiB, not full", ""),
    "memory: store on a disk": (lambda: check_memory(store_directory="/tmp"),
        "warning", "a: Ray's object store is in /tmp, as /dev/shm was too small: slow", "docker --shm-size"),
    "limits: enough": (lambda: check_limits(),
        "ok", "8 CPUs per node, 65536 open files", ""),
    "limits: few files": (lambda: check_limits(open_files=1024),
        "warning", "a: a process may open 1024 files at most", ""),
    "limits: no limit of files": (lambda: check_limits(open_files=-1),
        "ok", "8 CPUs per node", ""),
    "limits: fewer CPUs than Ray offers": (lambda: check_limits(cpus=2.5),
        "warning", "a: Ray offers 8 CPUs, processes may use 2.5", "--num-cpus 2` on a"),
    "clocks: together": (lambda: check_clocks(0.002, 0.002),
        "ok", "at most 0.0 ms apart (± 2.0 ms)", ""),
    "clocks: one node": (lambda: check_clocks(0.002),
        "skipped", "one node: there are no clocks to compare", ""),
    "clocks: ahead": (lambda: check_clocks(0.0, 3.0, 0.0),
        "warning", "b is 3.0 s ahead of a (± 2.0 ms); b differs from the others", ""),
    "clocks: behind": (lambda: check_clocks(0.0, -3.0, 0.0),
        "warning", "c is 3.0 s ahead of b (± 2.0 ms); b differs from the others", ""),
    "clocks: far ahead": (lambda: check_clocks(0.0, 100.0, 0.0),
        "problem", "b is 100.0 s ahead of a (± 2.0 ms); b differs from the others", ""),
    "clocks: within what can be known": (lambda: check_clocks(0.0, 1.5, uncertainty=0.5),
        "ok", "at most 1.5 s apart (± 1.0 s)", ""),
    "access: token": (lambda: check_access(True),
        "ok", "the cluster requires a token, and accepted the one given", ""),
    "access: open": (lambda: check_access(False),
        "warning", "no token is required: anyone who can reach 10.0.0.1 can run code in the cluster",
        "RAY_AUTH_MODE=token"),
    "access: only here": (lambda: check_access(False, "127.0.0.1"),
        "ok", "no token, but only this machine can reach it", ""),
    "access: unknown": (lambda: check_access(None),
        "skipped", "the nodes do not report whether they require a token", ""),
    "gpus: healthy": (lambda: check_gpus(gpu()),
        "ok", "1: H100 80.0 GiB; no memory errors, no reduced clocks", ""),
    "gpus: none": (lambda: check_gpus(torch_gpus=0, ray_gpus=0, is_wanted=False),
        "ok", "none: trains on the CPU", ""),
    "gpus: none, wanted": (lambda: check_gpus(torch_gpus=0, ray_gpus=0),
        "problem", "none, and the job asks for some", ""),
    "gpus: other counts": (lambda: check_gpus(gpu(), torch_gpus=0),
        "problem", "a: Ray offers 1 GPUs, torch sees 0, NVML 1", ""),
    "gpus: memory errors": (lambda: check_gpus(gpu(ecc_errors=3)),
        "problem", "a: GPU 0 (H100) has 3 uncorrected memory errors", ""),
    "gpus: slow": (lambda: check_gpus(gpu(slowed_by=("hw_slowdown",))),
        "warning", "a: GPU 0 (H100) runs at a reduced clock (hw_slowdown): the whole group waits for it", ""),
    "gpus: in use": (lambda: check_gpus(gpu(memory_used_bytes=9 * GIB)),
        "warning", "a: GPU 0 (H100): 9.0 GiB of 80.0 GiB are already in use", ""),
    "gpus: no driver": (lambda: check_gpus(gpu_error="Failed to initialize NVML"),
        "problem", "a: Failed to initialize NVML", ""),
    "storage: shared": (lambda: check_storage(a=seen("a", "b", free=50 * GIB), b=seen("a", "b", free=50 * GIB)),
        "ok", "/mnt/runs: all nodes write and read the same files, 50.0 GiB free", ""),
    "storage: one node": (lambda: check_storage(a=seen("a")),
        "ok", "/mnt/runs: can be written and read", ""),
    "storage: each its own": (lambda: check_storage(a=seen("a"), b=seen("b"), c=seen("c")),
        "problem", "/mnt/runs is another directory on each of a, b, c: not shared", "ReadWriteMany"),
    "storage: one sees another": (lambda: check_storage(a=seen("a", "b"), b=seen("a", "b"), c=seen("c")),
        "problem", "c sees another /mnt/runs than a, b", ""),
    "storage: one cannot write": (lambda: check_storage(a=seen("a"), b=seen("a", wrote="Read-only file system")),
        "problem", "b cannot write to /mnt/runs (Read-only file system)", ""),
    "storage: nobody can write": (lambda: check_storage(a=seen(wrote="Permission denied"),
        b=seen(wrote="Permission denied")),
        "problem", "a, b cannot write to /mnt/runs (Permission denied)", ""),
    "storage: full": (lambda: check_storage(a=seen("a", free=4 * GIB)),
        "problem", "a: /mnt/runs has 4.0 GiB of 100 GiB free", ""),
    "storage: little space": (lambda: check_storage(a=seen("a", free=9 * GIB)),
        "warning", "a: /mnt/runs has 9.0 GiB of 100 GiB free", ""),
    "network: fast": (lambda: check_network(transfer("ab", 1000), transfer("ab", 1200)),
        "ok", "gloo all-reduce over 2 ranks: 1.0 GB/s, 0.1 ms latency; between pairs 1.2 GB/s", ""),
    "network: too slow": (lambda: check_network(transfer("ab", 5), transfer("ab", 5)),
        "problem", "gloo all-reduce over a, b: 5.0 MB/s; the slowest link, a to b, 5.0 MB/s: gradients of 1 GB take "
        "400.0 s per step", ""),
    "network: slow": (lambda: check_network(transfer("ab", 50), transfer("ab", 50)),
        "warning", "gloo all-reduce over a, b: 50 MB/s; the slowest link, a to b, 50 MB/s: gradients of 1 GB take "
        "40.0 s per step", ""),
    "network: slow node": (lambda: check_network(transfer("abc", 20), transfer("ab", 1000), transfer("ac", 20),
        transfer("bc", 20)),
        "problem", "c is slow: 20 MB/s on its best link, the other nodes 1.0 GB/s; gloo all-reduce over a, b, c: 20 "
        "MB/s: gradients of 1 GB take 100.0 s per step", ""),
    "network: slower node": (lambda: check_network(transfer("abc", 400), transfer("ab", 1000), transfer("ac", 400),
        transfer("bc", 400)),
        "warning", "c is slow: 400 MB/s on its best link, the other nodes 1.0 GB/s; gloo all-reduce over a, b, c: "
        "400 MB/s: gradients of 1 GB take 5.0 s per step", ""),
    "network: slow link": (lambda: check_network(transfer("abcd", 900), transfer("ac", 100), *(transfer(pair,
        1000) for pair in ("ab", "bc", "cd", "ad", "bd"))),
        "problem", "the link between a and c is slow: 100 MB/s, the other links 1.0 GB/s; gloo all-reduce over a, b, "
        "c, d: 900 MB/s: gradients of 1 GB take 2.2 s per step", ""),
    "network: slow head that does not train": (lambda: check_network(transfer("ab", 1000), transfer("ab", 1000),
        transfer("ah", 20), transfer("bh", 20)),
        "warning", "h is slow: 20 MB/s on its best link, the other nodes 1.0 GB/s; gloo all-reduce over a, b: 1.0 "
        "GB/s: gradients of 1 GB take 2.0 s per step", ""),
    "network: latency": (lambda: check_network(transfer("ab", 1000), transfer("ab", 1000, latency_s=0.02)),
        "warning", "20.0 ms latency between a and b; below 1 ms is usual", ""),
    "network: unreachable node": (lambda: check_network(transfer("abc", 0, error="timeout"), transfer("ab", 1000),
        transfer("ac", 0, error="refused"), transfer("bc", 0, error="refused")),
        "problem", "c forms no group with any other node (refused)", "GLOO_SOCKET_IFNAME"),
    "network: unreachable pair": (lambda: check_network(transfer("abc", 0, error="timeout"), transfer("ab", 0,
        error="refused"), transfer("ac", 1000), transfer("bc", 1000)),
        "problem", "a and b form no group (refused)", ""),
    "network: nobody reaches anybody": (lambda: check_network(transfer("ab", 0, error="timeout"), transfer("ab", 0,
        error="refused")),
        "problem", "no two of a, b could form a group (refused)", ""),
    "network: only the whole group fails": (lambda: check_network(transfer("abc", 0, error="out of ports"),
        transfer("ab", 1000), transfer("ac", 1000)),
        "problem", "a, b, c form no group together (out of ports)", ""),
    "network: busy GPUs of a single node": (lambda: check_network(Transfer(nodes=("a",)), note="no free GPU on a"),
        "warning", "no free GPU on a", ""),
    "job: fits": (lambda: check_job(8.0, 8.0),
        "ok", "4 workers of 3 CPU fit: there is room for 4", ""),
    "job: whole workers per node": (lambda: check_job(5.0, 11.0),
        "ok", "4 workers of 3 CPU fit: there is room for 4", ""),
    "job: too small nodes": (lambda: check_job(5.0, 5.0, 5.0),
        "problem", "the job asks for 4 workers of 3 CPU; 3 fit on the nodes, and it would wait for the rest", ""),
    "job: no GPUs": (lambda: check_job(8.0, gpus_per_worker=1.0),
        "problem", "the job asks for 4 workers of 3 CPU and 1 GPU; 0 fit on the nodes, and it would wait for the "
        "rest", ""),
    "job: taken by others": (lambda: check_job(8.0, 8.0, free=2.0),
        "warning", "the job asks for 4 workers of 3 CPU; other jobs leave 2 CPU free now", ""),
}  # fmt: skip
"""Checks by what they meet: level, result and a part of the remedy of their only finding."""


@pytest.mark.parametrize(("check", "level", "found", "remedy"), ONE_FINDING.values(), ids=list(ONE_FINDING))
def test_a_check_has_one_finding(check: Callable[[], list[Finding]], level: Level, found: str, remedy: str) -> None:
    (finding,) = check()
    assert (finding.level, finding.found) == (level, found)
    assert remedy in finding.remedy


def test_busy_gpus_are_a_finding_of_their_own() -> None:
    warning, figures = check_network(transfer("ab", 1000), note="no free GPU on a")
    assert (warning.level, warning.found) == ("warning", "no free GPU on a")
    assert (figures.level, figures.found) == ("ok", "gloo all-reduce over 2 ranks: 1.0 GB/s, 0.1 ms latency")


def test_a_library_that_cannot_be_imported() -> None:
    broken = Imports(seconds={}, errors={"torch": "ImportError: no libcudart"}, torch_gpus=None)
    (finding,) = checks.imports({"a": broken, "b": broken})
    assert (finding.level, finding.found) == (
        "problem",
        "a, b: torch cannot be imported (ImportError: no libcudart)",
    )


def test_full_and_nearly_full_disks() -> None:
    full, nearly = disk(free=4 * GIB, path="/spill"), disk(free=9 * GIB)
    problem, warning = checks.disks({"a": facts(spill=full), "b": facts(temp=nearly, spill=nearly)})
    assert problem.found.startswith("a: Ray's spill directory, /spill, is 96% full, 4.0 GiB of 100 GiB free: Ray w")
    assert problem.level == "problem" and "--object-spilling-directory" in problem.remedy
    # One file system under both directories is told once.
    assert warning.found == "b: Ray's temporary directory, /tmp/ray, is 91% full, 9.0 GiB of 100 GiB free"
    assert warning.level == "warning" and "free space in /tmp/ray on b" in warning.remedy


class TestVersions:
    def test_the_same_everywhere(self) -> None:
        (finding,) = checks.versions(HERE, {"a": HERE, "b": HERE}, CLOSURE)
        assert finding.level == "ok"
        assert (
            finding.found
            == "python 3.11.7, ray 2.60.0, torch 2.13.0 and 4 packages in all are the same on 2 nodes and here"
        )

    def test_what_matters_is_a_problem_and_the_rest_a_warning(self) -> None:
        problem, warning = checks.versions(HERE, {"a": HERE, "b": software(torch="2.12.0", tqdm=None)}, CLOSURE)
        assert (problem.level, problem.found) == ("problem", "b: torch 2.12.0 (here 2.13.0)")
        assert (warning.level, warning.found) == ("warning", "b: tqdm missing (here 4.70)")
        assert "give b the versions that are here" in problem.remedy

    def test_nodes_with_the_same_differences_are_told_together(self) -> None:
        other = software(ray="2.59.0")
        (finding,) = checks.versions(HERE, {name: other for name in "abcdef"}, CLOSURE)
        assert finding.found == "all 6 nodes: ray 2.59.0 (here 2.60.0)"
        (finding,) = checks.versions(HERE, {"z": HERE, **{name: other for name in "abcdef"}}, CLOSURE)
        assert finding.found == "a, b, c, d and 2 more: ray 2.59.0 (here 2.60.0)"

    @pytest.mark.parametrize(("python", "level"), [("3.12.1", "problem"), ("3.11.9", "warning")])
    def test_python_by_its_minor_version(self, python: str, level: str) -> None:
        (finding,) = checks.versions(HERE, {"a": software(python=python)}, CLOSURE)
        assert (finding.level, finding.found) == (level, f"a: python {python} (here 3.11.7)")

    @pytest.mark.parametrize(("sha256", "what"), [("bb", "other code"), (None, "no code")])
    def test_another_launcher_under_the_same_version(self, sha256: str | None, what: str) -> None:
        (finding,) = checks.versions(HERE, {"a": software(sha256=sha256)}, CLOSURE)
        assert (finding.level, finding.found) == ("problem", f"a: {what} of launcher under the same version 0.1.0")

    def test_a_package_that_is_only_there_does_not_matter(self) -> None:
        assert levels(checks.versions(HERE, {"a": software(vllm="1.0")}, CLOSURE)) == ["ok"]


@pytest.mark.parametrize("count", [2, 3, 4, 5, 8, 33])
def test_a_tournament_gives_everybody_as_many_partners(count: int) -> None:
    names = [str(number) for number in range(count)]
    rounds = tournament(names)
    met = {name: [match for matches in rounds for match in matches if name in match] for name in names}
    for matches in rounds:
        players = [name for match in matches for name in match]
        assert len(players) == len(set(players))
    assert all(len(set(matches)) == len(matches) for matches in met.values())
    assert {len(matches) for matches in met.values()} <= {min(3, count - 1), min(4, count - 1)}


class TestIssues:
    def test_one_text_is_one_finding(self) -> None:
        same = [Issue(name, "warning", "kind", "too old", "renew {who}") for name in "abcdef"]
        (finding,) = group_issues("check", same)
        assert (finding.found, finding.remedy) == ("a, b, c, d and 2 more: too old", "renew a, b, c, d and 2 more")

    def test_of_one_kind_with_other_figures(self) -> None:
        several = [Issue(name, "warning", "kind", f"{n}%", "renew {who}") for n, name in enumerate("abcd")]
        (finding,) = group_issues("check", several)
        assert finding.found == "a: 0%; b: 1%; c: 2%; also on d"

    def test_levels_stay_apart(self) -> None:
        mixed = [Issue("a", "warning", "kind", "x", ""), Issue("b", "problem", "kind", "x", "")]
        assert levels(group_issues("check", mixed)) == ["warning", "problem"]


def test_nodes_that_are_alive_by_a_name_of_their_own() -> None:
    def table(host: str, node_id: str, alive: bool = True, **resources: float) -> dict[str, object]:
        return {
            "NodeManagerHostname": host, "NodeManagerAddress": "10.0.0.1", "NodeID": node_id, "Alive": alive,
            "Resources": resources,
        }  # fmt: skip

    head = {"node:__internal_head__": 1.0}
    nodes = nodes_of(
        [table("b", "1" * 9, CPU=4.0, GPU=2.0), table("h", "2" * 9, **head), table("x", "3" * 9, alive=False)]
    )
    assert list(nodes) == ["h", "b"] and nodes["h"].is_head and not nodes["h"].trains
    assert (nodes["b"].ray_cpus, nodes["b"].ray_gpus) == (4.0, 2.0) and nodes["b"].trains
    twins = nodes_of([table("b", "1" * 9), table("b", "2" * 9)])
    assert list(twins) == ["b (10.0.0.1, 111111)", "b (10.0.0.1, 222222)"]


def test_a_warning_is_no_reason_to_stop() -> None:
    warning = Finding(check="x", level="warning", found="")
    assert DoctorRecord(address="", findings=(warning,)).healthy
    assert not DoctorRecord(address="", findings=(warning, warning.model_copy(update={"level": "problem"}))).healthy


def test_words() -> None:
    assert [speed(n) for n in (2.4e6, 25e6, 1.1e9)] == ["2.4 MB/s", "25 MB/s", "1.1 GB/s"]
    assert [duration(n) for n in (0.0001, 2.0)] == ["0.1 ms", "2.0 s"]
    assert (some(["a"]), some("abcdef")) == ("a", "a, b, c, d and 2 more")
    assert (span("1", "1"), span("1", "2")) == ("1", "1 to 2")
