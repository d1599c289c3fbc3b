"""The doctor's checks: the finding for each kind of fact, branch by branch. No cluster needed."""

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


class TestImports:
    def test_fast(self) -> None:
        quick = Imports(seconds={"torch": 2.0, "deepspeed": 1.0}, errors={}, torch_gpus=0)
        (finding,) = checks.imports({"a": quick})
        assert (finding.level, finding.found) == ("ok", "3.0 s on the slowest node, a (torch 2.0 s, deepspeed 1.0 s)")

    @pytest.mark.parametrize("seconds", [31.0, 12.0])  # slow as such; slow against the others
    def test_slow(self, seconds: float) -> None:
        nodes = {name: Imports(seconds={"torch": 3.0}, errors={}, torch_gpus=0) for name in "ab"}
        nodes["c"] = Imports(seconds={"torch": seconds}, errors={}, torch_gpus=0)
        (finding,) = checks.imports(nodes)
        assert finding.level == "warning" and finding.found.startswith(f"c: {seconds} s to import (torch {seconds} s)")
        assert "median of the nodes 3.0 s" in finding.found and "of c on a local disk" in finding.remedy

    def test_broken(self) -> None:
        broken = Imports(seconds={}, errors={"torch": "ImportError: no libcudart"}, torch_gpus=None)
        (finding,) = checks.imports({"a": broken, "b": broken})
        assert (finding.level, finding.found) == (
            "problem",
            "a, b: torch cannot be imported (ImportError: no libcudart)",
        )

    def test_no_answer(self) -> None:
        assert levels(checks.imports({})) == ["skipped"]


class TestDisks:
    def test_room(self) -> None:
        (finding,) = checks.disks({"a": facts(), "b": facts(spill=disk(free=60 * GIB))})
        assert finding.level == "ok" and finding.found.startswith("50.0 GiB to 60.0 GiB free")

    def test_full_and_nearly_full(self) -> None:
        full, nearly = disk(free=4 * GIB, path="/spill"), disk(free=9 * GIB)
        problem, warning = checks.disks({"a": facts(spill=full), "b": facts(temp=nearly, spill=nearly)})
        assert problem.found.startswith("a: Ray's spill directory, /spill, is 96% full, 4.0 GiB of 100 GiB free: Ray w")
        assert problem.level == "problem" and "--object-spilling-directory" in problem.remedy
        # One file system under both directories is told once.
        assert warning.found == "b: Ray's temporary directory, /tmp/ray, is 91% full, 9.0 GiB of 100 GiB free"
        assert warning.level == "warning" and "free space in /tmp/ray on b" in warning.remedy

    def test_small(self) -> None:
        small = disk(total=GIB, free=GIB // 2)
        assert levels(checks.disks({"a": facts(temp=small, spill=small)})) == ["warning"]

    def test_unknown(self) -> None:
        assert levels(checks.disks({"a": facts(temp=None, spill=disk(total=0, free=0))})) == ["skipped"]


class TestMemory:
    def test_room(self) -> None:
        (finding,) = checks.memory({"a": facts()}, {"a": node()})
        assert (finding.level, finding.found) == ("ok", "32.0 GiB free; object stores of 16.0 GiB, not full")

    @pytest.mark.parametrize(("free", "level"), [(2 * GIB, "problem"), (5 * GIB, "warning")])
    def test_used_by_others(self, free: int, level: str) -> None:
        (finding,) = checks.memory({"a": facts(memory_free_bytes=free)}, {"a": node()})
        assert finding.level == level and "of 64.0 GiB memory in use" in finding.found

    def test_unknown_memory_is_no_complaint(self) -> None:
        assert levels(checks.memory({"a": facts(memory_bytes=None, shm=None)}, {"a": node()})) == ["ok"]

    def test_full_store(self) -> None:
        (finding,) = checks.memory({"a": facts(store_used_bytes=14 * GIB)}, {"a": node()})
        assert (finding.level, finding.found) == ("warning", "a: the object store is 88% full (14.0 GiB of 16.0 GiB)")

    def test_shm_smaller_than_the_store(self) -> None:
        (finding,) = checks.memory({"a": facts(shm=disk(GIB, GIB, "/dev/shm"))}, {"a": node()})
        assert finding.level == "problem" and "/dev/shm has 1.0 GiB, Ray's object store alone 16.0 GiB" in finding.found

    def test_shm_without_room_for_nccl(self) -> None:
        tight = facts(shm=disk(16 * GIB, 16 * GIB, "/dev/shm"))
        (finding,) = checks.memory({"a": tight}, {"a": node(gpus=8)})
        assert finding.level == "warning" and "NCCL between its 8 GPUs takes up to 1.0 GiB more" in finding.found
        assert levels(checks.memory({"a": tight}, {"a": node(gpus=1)})) == ["ok"]

    def test_store_on_a_disk(self) -> None:
        (finding,) = checks.memory({"a": facts(store_directory="/tmp")}, {"a": node()})
        assert (
            finding.level == "warning" and "object store is in /tmp" in finding.found and "shm-size" in finding.remedy
        )


class TestLimits:
    def test_enough(self) -> None:
        (finding,) = checks.limits({"a": facts(), "b": facts(cpus=16.0)}, {"a": node(), "b": node("b")})
        assert (finding.level, finding.found) == ("ok", "8 to 16 CPUs per node, 65536 open files")

    def test_few_files_and_more_cpus_than_there_are(self) -> None:
        files, cpus = checks.limits({"a": facts(open_files=1024, cpus=2.5)}, {"a": node()})
        assert (files.level, files.found) == ("warning", "a: a process may open 1024 files at most")
        assert cpus.found == "a: Ray offers 8 CPUs, processes may use 2.5" and "--num-cpus 2` on a" in cpus.remedy

    def test_no_limit_is_no_complaint(self) -> None:
        assert levels(checks.limits({"a": facts(open_files=-1)}, {"a": node()})) == ["ok"]


class TestClocks:
    def test_together(self) -> None:
        clock = Clock(offset_s=0.002, uncertainty_s=0.001)
        assert levels(checks.clocks({"a": clock, "b": clock})) == ["ok"]
        assert levels(checks.clocks({"a": clock})) == ["skipped"]

    @pytest.mark.parametrize(("offset", "level"), [(3.0, "warning"), (-3.0, "warning"), (100.0, "problem")])
    def test_apart(self, offset: float, level: str) -> None:
        right, wrong = Clock(offset_s=0.0, uncertainty_s=0.001), Clock(offset_s=offset, uncertainty_s=0.001)
        (finding,) = checks.clocks({"a": right, "b": wrong, "c": right})
        assert finding.level == level and f"{abs(offset)} s ahead" in finding.found
        assert "b differs from the others" in finding.found

    def test_within_what_can_be_known(self) -> None:
        slow = Clock(offset_s=1.5, uncertainty_s=0.9)
        assert levels(checks.clocks({"a": Clock(offset_s=0.0, uncertainty_s=0.1), "b": slow})) == ["ok"]


class TestAccess:
    @pytest.mark.parametrize(
        ("needed", "address", "level"),
        [
            (True, "10.0.0.1", "ok"),
            (False, "10.0.0.1", "warning"),
            (False, "127.0.0.1", "ok"),
            (None, "10.0.0.1", "skipped"),
        ],
    )  # fmt: skip
    def test_by_token_and_address(self, needed: bool | None, address: str, level: str) -> None:
        (finding,) = checks.access({"a": facts(token_needed=needed)}, [address])
        assert finding.level == level
        assert ("RAY_AUTH_MODE=token" in finding.remedy) == (level == "warning")


class TestGpus:
    GPU = Gpu(index=0, name="H100", memory_bytes=80 * GIB, memory_used_bytes=0)

    def check(self, *gpus: Gpu, torch_sees: int = 1, wanted: bool = True, **changes: object) -> list[Finding]:
        imports = {"a": Imports(seconds={}, errors={}, torch_gpus=torch_sees)}
        return checks.gpus({"a": facts(gpus=gpus, **changes)}, {"a": node(gpus=1)}, imports, wanted)

    def test_healthy(self) -> None:
        (finding,) = self.check(self.GPU)
        assert (finding.level, finding.found) == ("ok", "1: H100 80.0 GiB; no memory errors, no reduced clocks")

    def test_none(self) -> None:
        without = {"a": Imports(seconds={}, errors={}, torch_gpus=0)}
        check = checks.gpus
        assert levels(check({"a": facts()}, {"a": node()}, without, is_wanted=False)) == ["ok"]
        assert levels(check({"a": facts()}, {"a": node()}, without, is_wanted=True)) == ["problem"]
        assert levels(check({"a": facts()}, {"a": node()}, {}, is_wanted=False)) == ["ok"]  # torch was not asked

    def test_ray_and_torch_count_differently(self) -> None:
        (finding,) = self.check(self.GPU, torch_sees=0)
        assert (finding.level, finding.found) == ("problem", "a: Ray offers 1 GPUs, torch sees 0, NVML 1")

    @pytest.mark.parametrize(
        ("change", "level", "text"),
        [
            ({"ecc_errors": 3}, "problem", "a: GPU 0 (H100) has 3 uncorrected memory errors"),
            ({"slowed_by": ("hw_slowdown",)}, "warning", "a: GPU 0 (H100) runs at a reduced clock (hw_slowdown): the"),
            ({"memory_used_bytes": 9 * GIB}, "warning", "a: GPU 0 (H100): 9.0 GiB of 80.0 GiB are already in use"),
        ],
    )  # fmt: skip
    def test_sick(self, change: dict[str, object], level: str, text: str) -> None:
        (finding,) = self.check(self.GPU.model_copy(update=change))
        assert finding.level == level and finding.found.startswith(text)

    def test_no_driver(self) -> None:
        (finding,) = self.check(gpu_error="Failed to initialize NVML", torch_sees=1)
        assert (finding.level, finding.found) == ("problem", "a: Failed to initialize NVML")


class TestStorage:
    def check(self, **nodes: StorageSeen) -> list[Finding]:
        return shared_checks.storage("/mnt/runs", nodes)

    def test_shared(self) -> None:
        seen = StorageSeen(wrote="", sees=("a", "b"), disk=disk())
        (finding,) = self.check(a=seen, b=seen)
        assert (finding.level, finding.found) == (
            "ok",
            "/mnt/runs: all nodes write and read the same files, 50.0 GiB free",
        )

    def test_one_node_on_an_object_store(self) -> None:
        (finding,) = self.check(a=StorageSeen(wrote="", sees=("a",)))
        assert (finding.level, finding.found) == ("ok", "/mnt/runs: can be written and read")

    def test_each_its_own(self) -> None:
        (finding,) = self.check(**{name: StorageSeen(wrote="", sees=(name,)) for name in "abc"})
        assert (finding.level, finding.found) == (
            "problem",
            "/mnt/runs is another directory on each of a, b, c: not shared",
        )
        assert "ReadWriteMany" in finding.remedy

    def test_one_sees_something_else(self) -> None:
        together = StorageSeen(wrote="", sees=("a", "b"))
        (finding,) = self.check(a=together, b=together, c=StorageSeen(wrote="", sees=("c",)))
        assert (finding.level, finding.found) == ("problem", "c sees another /mnt/runs than a, b")

    def test_one_cannot_write_but_reads(self) -> None:
        (finding,) = self.check(
            a=StorageSeen(wrote="", sees=("a",)), b=StorageSeen(wrote="Read-only file system", sees=("a",))
        )
        assert (finding.level, finding.found) == ("problem", "b cannot write to /mnt/runs (Read-only file system)")

    def test_nobody_can_write(self) -> None:
        denied = StorageSeen(wrote="Permission denied")
        (finding,) = self.check(a=denied, b=denied)
        assert finding.found == "a, b cannot write to /mnt/runs (Permission denied)"

    @pytest.mark.parametrize(("free", "level"), [(4 * GIB, "problem"), (9 * GIB, "warning")])
    def test_room(self, free: int, level: str) -> None:
        seen = StorageSeen(wrote="", sees=("a", "b"), disk=disk(free=free))
        (finding,) = self.check(a=seen, b=seen)
        assert (finding.level, finding.found) == (level, f"a, b: /mnt/runs has {free // GIB}.0 GiB of 100 GiB free")


def transfer(nodes: str, mb_per_s: float, latency_s: float = 1e-4, error: str = "") -> Transfer:
    """Return an all-reduce; with two ranks each byte crosses the link once."""
    ranks = len(nodes)
    seconds = 0.0 if error else 2 * (ranks - 1) / ranks * 1e6 / (mb_per_s * 1e6)
    return Transfer(nodes=tuple(nodes), ranks=ranks, num_bytes=10**6, seconds=seconds, latency_s=latency_s, error=error)


class TestNetwork:
    def check(self, ring: Transfer, *pairs: Transfer, note: str = "") -> list[Finding]:
        return shared_checks.network(Network(backend="gloo", ring=ring, pairs=pairs, note=note))

    def test_fast(self) -> None:
        (finding,) = self.check(transfer("ab", 1000), transfer("ab", 1200))
        assert finding.level == "ok"
        assert finding.found == "gloo all-reduce over 2 ranks: 1.0 GB/s, 0.1 ms latency; between pairs 1.2 GB/s"

    @pytest.mark.parametrize(("mb_per_s", "level"), [(5, "problem"), (50, "warning")])
    def test_slow_altogether(self, mb_per_s: float, level: str) -> None:
        (finding,) = self.check(transfer("ab", mb_per_s), transfer("ab", mb_per_s))
        assert finding.level == level and "the slowest link, a to b" in finding.found
        assert f"gradients of 1 GB take {2000 / mb_per_s:.1f} s per step" in finding.found

    @pytest.mark.parametrize(("mb_per_s", "level"), [(20, "problem"), (400, "warning")])
    def test_a_slow_node_is_named(self, mb_per_s: float, level: str) -> None:
        (finding,) = self.check(
            transfer("abc", mb_per_s), transfer("ab", 1000), transfer("ac", mb_per_s), transfer("bc", mb_per_s)
        )
        assert finding.level == level
        assert finding.found.startswith(
            f"c is slow: {mb_per_s} MB/s on its best link, the other nodes 1.0 GB/s; gloo all-"
        )

    def test_a_slow_link_between_two_fast_nodes(self) -> None:
        pairs = [transfer(pair, 1000) for pair in ("ab", "bc", "cd", "ad", "bd")]
        (finding,) = self.check(transfer("abcd", 900), transfer("ac", 100), *pairs)
        assert finding.level == "problem"
        assert finding.found.startswith("the link between a and c is slow: 100 MB/s, the other links 1.0 GB/s")

    def test_a_slow_head_that_trains_nothing_is_no_problem(self) -> None:
        (finding,) = self.check(transfer("ab", 1000), transfer("ab", 1000), transfer("ah", 20), transfer("bh", 20))
        assert finding.level == "warning" and finding.found.startswith("h is slow: 20 MB/s on its best link")

    def test_latency(self) -> None:
        (finding,) = self.check(transfer("ab", 1000), transfer("ab", 1000, latency_s=0.02))
        assert finding.level == "warning" and finding.found.startswith("20.0 ms latency between a and b")

    def test_a_node_that_nobody_reaches(self) -> None:
        lost = [transfer(pair, 0, error="connect timeout") for pair in ("ac", "bc")]
        (finding,) = self.check(transfer("abc", 0, error="timeout"), transfer("ab", 1000), *lost)
        assert (finding.level, finding.found) == ("problem", "c forms no group with any other node (connect timeout)")
        assert "GLOO_SOCKET_IFNAME" in finding.remedy

    def test_two_nodes_that_do_not_reach_each_other(self) -> None:
        (finding,) = self.check(
            transfer("abc", 0, error="timeout"), transfer("ab", 0, error="refused"), transfer("ac", 1000),
            transfer("bc", 1000),
        )  # fmt: skip
        assert finding.found == "a and b form no group (refused)"

    def test_nobody_reaches_anybody(self) -> None:
        (finding,) = self.check(transfer("ab", 0, error="timeout"), transfer("ab", 0, error="refused"))
        assert finding.found == "no two of a, b could form a group (refused)"

    def test_only_the_whole_group_fails(self) -> None:
        (finding,) = self.check(transfer("abc", 0, error="out of ports"), transfer("ab", 1000), transfer("ac", 1000))
        assert finding.found == "a, b, c form no group together (out of ports)"

    def test_busy_gpus(self) -> None:
        warning, figures = self.check(transfer("ab", 1000), note="no free GPU on a")
        assert (warning.level, warning.found) == ("warning", "no free GPU on a")
        assert (figures.level, figures.found) == ("ok", "gloo all-reduce over 2 ranks: 1.0 GB/s, 0.1 ms latency")

    def test_busy_gpus_of_a_single_node(self) -> None:
        assert levels(self.check(Transfer(nodes=("a",)), note="no free GPU on a")) == ["warning"]


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


class TestJob:
    CLUSTER = ClusterSpec(workers=4, cpus_per_worker=3.0)

    def test_fits(self) -> None:
        (finding,) = checks.job(self.CLUSTER, [node("a"), node("b")], {"CPU": 16.0})
        assert (finding.level, finding.found) == ("ok", "4 workers of 3 CPU fit: there is room for 4")

    def test_whole_workers_per_node(self) -> None:
        (finding,) = checks.job(self.CLUSTER, [node("a", cpus=5.0), node("b", cpus=11.0)], {"CPU": 16.0})
        assert levels([finding]) == ["ok"]
        (finding,) = checks.job(self.CLUSTER, [node(name, cpus=5.0) for name in "abc"], {"CPU": 15.0})
        assert finding.level == "problem" and "asks for 4 workers of 3 CPU; 3 fit" in finding.found

    def test_gpus_count(self) -> None:
        cluster = ClusterSpec(workers=1, gpus_per_worker=1.0)
        (finding,) = checks.job(cluster, [node("a")], {"CPU": 8.0})
        assert finding.level == "problem" and "1 worker of 1 CPU and 1 GPU; 0 fit" in finding.found

    def test_taken_by_others(self) -> None:
        (finding,) = checks.job(self.CLUSTER, [node("a"), node("b")], {"CPU": 2.0})
        assert finding.level == "warning" and finding.found.endswith("other jobs leave 2 CPU free now")


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
