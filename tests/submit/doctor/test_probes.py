"""What the doctor's probes tell of this machine, how they travel, and how a cluster that cannot be joined is told."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher.rundir.uri import open_uri
from launcher.submit.doctor import host, probes, session
from launcher.submit.doctor.closure import dependency_closure
from launcher.submit.doctor.facts import Imports, NodeFacts, Software
from launcher.submit.doctor.probes import Probe
from launcher.submit.doctor.team import by_value


def launcher(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_ADDRESS")}
    return subprocess.run(
        [sys.executable, "-m", "launcher", *arguments], capture_output=True, text=True, env=kept | env, timeout=60
    )


class TestThisMachine:
    def test_facts_are_a_record(self) -> None:
        facts = NodeFacts.model_validate(Probe().facts())
        assert facts.software.packages["ray"] and facts.software.launcher_sha256
        assert 0 < facts.cpus <= (os.cpu_count() or 1)
        assert facts.memory_bytes and facts.memory_free_bytes and facts.memory_free_bytes < facts.memory_bytes
        assert facts.gpus == () and facts.gpu_error == ""

    def test_a_disk_of_a_directory_that_is_still_to_come(self, tmp_path: Path) -> None:
        found = host.disk(str(tmp_path / "a" / "b"))
        assert found is not None and found["path"] == str(tmp_path / "a" / "b")
        assert 0 < found["free_bytes"] <= found["total_bytes"]
        assert host.disk("") is None

    def test_imports_of_a_new_process(self) -> None:
        found = Imports.model_validate(Probe().imports(["json", "no_such_library"], 60))
        assert list(found.seconds) == ["json", "no_such_library"] and found.torch_gpus is None
        assert found.errors == {"no_such_library": "ModuleNotFoundError: No module named 'no_such_library'"}

    def test_imports_that_end_the_process(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "deadly.py").write_text("import os, sys; print('no driver', file=sys.stderr); os._exit(3)")
        (tmp_path / "sleepy.py").write_text("import time; time.sleep(60)")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        assert Probe().imports(["deadly"], 60)["errors"] == {"deadly": "no driver"}
        assert Probe().imports(["sleepy"], 0.5)["errors"] == {"sleepy": "not done after 0 s"}

    def test_the_version_that_an_import_finds(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        info = tmp_path / "Typing.Extensions-0.1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: Typing.Extensions\nVersion: 0.1\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        assert Software.model_validate(probes.software()).packages["typing-extensions"] == "0.1"

    def test_a_hash_tells_other_code(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        package = tmp_path / "some_package"
        package.mkdir()
        (package / "__init__.py").write_text("raise RuntimeError('must not be imported')")
        monkeypatch.syspath_prepend(str(tmp_path))
        first = probes.source_hash("some_package")
        (package / "more.py").write_text("")
        second = probes.source_hash("some_package")
        assert first and second and first != second
        assert probes.source_hash("no_such_package") is None


class TestContainers:
    def test_limits_of_version_2_hold_from_any_level(self, tmp_path: Path) -> None:
        own = tmp_path / "own"
        own.write_text("0::/pod/container\n")
        for folder in ("pod/container", "pod"):
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / "pod" / "cpu.max").write_text("50000 100000\n")
        (tmp_path / "pod/container/cpu.max").write_text("max 100000\n")
        (tmp_path / "pod/container/memory.max").write_text("1000\n")
        (tmp_path / "pod/container/memory.current").write_text("900\n")
        (tmp_path / "pod/container/memory.stat").write_text("anon 300\nactive_file 200\ninactive_file 400\n")
        (tmp_path / "pod/memory.max").write_text("max\n")
        folders = list(host.cgroup_folders(tmp_path, own))
        assert folders[:3] == [tmp_path / "pod/container", tmp_path / "pod", tmp_path]
        assert host.usable_cpus(folders) == 0.5
        assert host.host_memory(folders) == (1000, 700)  # what files left in memory is free

    def test_limits_of_version_1(self, tmp_path: Path) -> None:
        own = tmp_path / "own"
        own.write_text("12:memory:/docker/" + "a" * 300 + "\n11:cpu,cpuacct:/docker/a\n")
        for controller, name, value in (
            ("cpu", "cpu.cfs_quota_us", "75000"),
            ("cpu", "cpu.cfs_period_us", "100000"),
            ("memory", "memory.limit_in_bytes", "1000"),
            ("memory", "memory.usage_in_bytes", "400"),
        ):
            (tmp_path / controller).mkdir(exist_ok=True)
            (tmp_path / controller / name).write_text(f"{value}\n")
        folders = list(host.cgroup_folders(tmp_path, own))
        assert host.usable_cpus(folders) == 0.75
        assert host.host_memory(folders) == (1000, 600)

    def test_no_limits(self, tmp_path: Path) -> None:
        folders = list(host.cgroup_folders(tmp_path, tmp_path / "none"))
        total, free = host.host_memory(folders)
        assert host.usable_cpus(folders) >= 1 and total and free and total > 2**30


def test_one_line_of_nvidia_smi() -> None:
    line = "1, NVIDIA H100 80GB HBM3, 81559, 12, 3, Not Active, Active, Not Active, Active"
    assert host.gpu_of(line) == {
        "index": 1, "name": "NVIDIA H100 80GB HBM3", "memory_bytes": 81559 * 2**20, "memory_used_bytes": 12 * 2**20,
        "ecc_errors": 3, "slowed_by": ["hw_thermal_slowdown", "hw_power_brake_slowdown"],
    }  # fmt: skip
    silent = host.gpu_of("0, GTX, 100, 0, [N/A], [N/A], [N/A], [N/A], [N/A]")
    assert silent["ecc_errors"] is None and silent["slowed_by"] == []


def test_nvidia_smi_as_a_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    command.write_text("#!/bin/sh\necho '0, A100, 40000, 10, 0, Not Active, Not Active, Not Active, Not Active'\n")
    command.chmod(0o755)
    assert [gpu["name"] for gpu in host.nvidia_gpus()[0]] == ["A100"]
    command.write_text("#!/bin/sh\necho 'Failed to initialize NVML: Driver/library version mismatch'; exit 18\n")
    assert host.nvidia_gpus() == ([], "Failed to initialize NVML: Driver/library version mismatch")
    monkeypatch.setattr(host, "_NVIDIA_S", 0.2)
    command.write_text("#!/bin/sh\nexec sleep 20\n")
    assert host.nvidia_gpus() == ([], "nvidia-smi gave no answer within 0 s")


class TestStorageProbes:
    def test_writes_reads_and_leaves_nothing(self, tmp_path: Path) -> None:
        place = str(tmp_path / "runs" / "deep" / ".doctor")
        probe = Probe()
        made = probe.missing(open_uri, place)
        assert made == [str(tmp_path / "runs"), str(tmp_path / "runs" / "deep"), place]
        assert probe.write(open_uri, place, "0.txt", "token")["wrote"] == ""
        assert probe.read(open_uri, place, {"0.txt": "token"}, 1.0) == ["0.txt"]
        assert probe.read(open_uri, place, {"0.txt": "another"}, 0.1) == []
        probe.clean(open_uri, place, ["0.txt", "1.txt"], made)
        assert list(tmp_path.iterdir()) == []

    def test_keeps_what_was_there(self, tmp_path: Path) -> None:
        place = str(tmp_path / "runs" / ".doctor")
        (tmp_path / "runs").mkdir()
        probe = Probe()
        made = probe.missing(open_uri, place)
        probe.write(open_uri, place, "0.txt", "token")
        (tmp_path / "runs" / ".doctor" / "of-somebody-else").touch()
        probe.clean(open_uri, place, ["0.txt"], made)
        assert [path.name for path in (tmp_path / "runs" / ".doctor").iterdir()] == ["of-somebody-else"]
        (tmp_path / "runs" / ".doctor" / "of-somebody-else").unlink()
        probe.clean(open_uri, place, ["0.txt"], made)
        assert [path.name for path in tmp_path.iterdir()] == ["runs"]

    def test_other_file_systems(self) -> None:
        place, probe = "memory://doctor-test/.doctor", Probe()
        assert probe.missing(open_uri, place) == []
        assert probe.write(open_uri, place, "0.txt", "token") == {"wrote": "", "disk": None}
        assert probe.read(open_uri, place, {"0.txt": "token"}, 1.0) == ["0.txt"]
        probe.clean(open_uri, place, ["0.txt"], [])
        assert probe.read(open_uri, place, {"0.txt": "token"}, 0.1) == []

    def test_why_it_cannot_be_written(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        assert Probe().write(open_uri, str(tmp_path / "file" / "x"), "0", "")["wrote"] == "Not a directory"
        assert "no-such-protocol" in Probe().write(open_uri, "no-such-protocol://x", "0", "")["wrote"]


def test_probes_run_where_there_is_no_launcher(tmp_path: Path) -> None:
    from ray import cloudpickle

    with by_value():
        sent = cloudpickle.dumps((Probe, open_uri, str(tmp_path / "storage")))
    (tmp_path / "sent").write_bytes(sent)
    code = """
import json, pickle, sys
sys.modules["launcher"] = None  # an import of it fails
Probe, open_uri, place = pickle.load(open(sys.argv[1], "rb"))
probe = Probe()
wrote = probe.write(open_uri, place, "0.txt", "token")
unknown = probe.write(open_uri, "no-such-protocol://x", "0", "")
read = probe.read(open_uri, place, {"0.txt": "token"}, 1.0)
print(json.dumps([probe.facts(), wrote["wrote"], unknown["wrote"], read, [m for m in sys.modules if "launcher." in m]]))
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "sent")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    facts, wrote, unknown, read, modules = json.loads(done.stdout.splitlines()[-1])
    assert NodeFacts.model_validate(facts).software.launcher_sha256 is None
    assert (wrote, read, modules) == ("", ["0.txt"], []) and unknown.startswith("RunError: no-such-protocol")


def test_the_closure_of_a_package() -> None:
    found = dependency_closure("launcher")
    assert {"launcher", "ray", "torch", "typing-extensions", "aiohttp"} <= found  # aiohttp by ray's extra `default`
    assert not {"pytest", "mypy", "ruff"} & found  # needed by launcher's extra `dev` alone
    assert dependency_closure("no-such-package") == frozenset()


class TestIsNode:
    @pytest.fixture
    def processes(self, tmp_path: Path) -> Path:
        """As /proc: a process that cannot be read, one that is no Ray, a raylet of the cluster 0a0b."""
        (tmp_path / "self").mkdir()
        (tmp_path / "1").mkdir()
        self.process(tmp_path / "2", "bash", "-c", "--x=1")
        self.process(tmp_path / "3", "raylet", f"--raylet_socket_name={tmp_path}/socket", "--cluster-id=0a0b")
        return tmp_path

    def process(self, folder: Path, *words: str) -> None:
        folder.mkdir()
        (folder / "cmdline").write_bytes(b"".join(word.encode() + b"\0" for word in words))

    def test_by_cluster_and_socket(self, processes: Path) -> None:
        answer = b"\x12\x02\x0a\x0b"
        assert not session.is_node(answer, processes)  # a container's, whose socket is not seen
        (processes / "socket").touch()
        assert session.is_node(answer, processes)
        assert not session.is_node(b"\x12\x02\x0a\x0c", processes)  # another cluster's

    def test_without_proc(self, tmp_path: Path) -> None:
        assert session.is_node(b"", tmp_path)


class TestRefused:
    """What `ray.init` says, in one sentence."""

    def test_other_versions(self) -> None:
        said = "Version mismatch: The cluster was started with:\n    Ray: 2.59.0\n    Python: 3.10.1\nThis process"
        found = session.why_refused("h:1", RuntimeError(said))
        assert found.startswith("h:1: Version mismatch: The cluster was started with: Ray: 2.59.0 Python: 3.10.1 This")
        assert "run the doctor with the cluster's own versions" in found

    def test_no_node(self) -> None:
        error = ConnectionError("Failed to connect to Ray cluster at h:1")
        error.__cause__ = RuntimeError("No node info found matching attributes: '' when trying to resolve node")
        assert "this machine is no node of it" in session.why_refused("h:1", error)

    def test_anything_else(self) -> None:
        assert session.why_refused("h:1", ValueError("odd\nmore")) == "h:1: Ray could not join (odd)"
        assert session.why_refused("", RuntimeError()) == "no local Ray could be started (RuntimeError)"


class TestCommand:
    def test_a_dead_address_is_told_within_seconds(self) -> None:
        start = time.monotonic()
        done = launcher("doctor", "--address", "127.0.0.1:1")
        assert time.monotonic() - start < 10
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert "127.0.0.1:1: nothing listens there (Connection refused)" in done.stdout
        assert "cluster: is Ray running on 127.0.0.1, and is 1 its port?" in done.stdout
        assert "1 problem, 0 warnings" in done.stdout

    def test_json_is_all_of_standard_output(self) -> None:
        done = launcher("doctor", "--json", RAY_ADDRESS="127.0.0.1:1")
        assert done.returncode == 2 and "nothing listens" in done.stderr
        found = json.loads(done.stdout)
        assert [(each["check"], each["level"]) for each in found["findings"]] == [("cluster", "problem")]

    def test_a_job_file_that_is_wrong(self, tmp_path: Path) -> None:
        (tmp_path / "job.yaml").write_text("nam: x\n")
        done = launcher("doctor", str(tmp_path / "job.yaml"))
        assert done.returncode == 2 and "nam is not a key" in done.stderr and done.stdout == ""
