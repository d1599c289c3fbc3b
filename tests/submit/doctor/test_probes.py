"""The doctor's probes of this machine, how their code travels, and the errors of a cluster that cannot be joined."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from launcher.rundir.uri import open_uri
from launcher.submit.doctor import actors, probes
from launcher.submit.doctor.actors import Probe
from launcher.submit.doctor.facts import Imports, NodeFacts, Software
from launcher.submit.doctor.probes import by_value
from launcher.submit.doctor.report import dependency_closure


def launcher(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_ADDRESS")}
    return subprocess.run(
        [sys.executable, "-m", "launcher", *arguments], capture_output=True, text=True, env=inherited | env, timeout=60
    )


class TestThisMachine:
    def test_facts_are_a_record(self) -> None:
        facts = NodeFacts.model_validate(Probe().facts())
        assert facts.software.packages["ray"] and facts.software.launcher_sha256
        assert 0 < facts.cpus <= (os.cpu_count() or 1)
        assert facts.memory_bytes and facts.memory_free_bytes and facts.memory_free_bytes < facts.memory_bytes
        assert facts.gpus == () and facts.gpu_error == ""

    def test_a_disk_of_a_directory_that_is_still_to_come(self, tmp_path: Path) -> None:
        usage = actors.disk(str(tmp_path / "a" / "b"))
        assert usage is not None and usage["path"] == str(tmp_path / "a" / "b")
        assert 0 < usage["free_bytes"] <= usage["total_bytes"]
        assert actors.disk("") is None

    def test_imports_of_a_new_process(self) -> None:
        result = Imports.model_validate(Probe().imports(["json", "no_such_library"], 60))
        assert list(result.seconds) == ["json", "no_such_library"] and result.torch_gpus is None
        assert result.errors == {"no_such_library": "ModuleNotFoundError: No module named 'no_such_library'"}

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
        assert Software.model_validate(actors.software()).packages["typing-extensions"] == "0.1"

    def test_a_hash_tells_other_code(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        package = tmp_path / "some_package"
        package.mkdir()
        (package / "__init__.py").write_text("raise RuntimeError('must not be imported')")
        monkeypatch.syspath_prepend(str(tmp_path))
        first = actors.source_hash("some_package")
        (package / "more.py").write_text("")
        second = actors.source_hash("some_package")
        assert first and second and first != second
        assert actors.source_hash("no_such_package") is None


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
        folders = list(actors.cgroup_folders(tmp_path, own))
        assert folders[:3] == [tmp_path / "pod/container", tmp_path / "pod", tmp_path]
        assert actors.usable_cpus(folders) == 0.5
        assert actors.host_memory(folders) == (1000, 700)  # what files left in memory is free

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
        folders = list(actors.cgroup_folders(tmp_path, own))
        assert actors.usable_cpus(folders) == 0.75
        assert actors.host_memory(folders) == (1000, 600)

    def test_no_limits(self, tmp_path: Path) -> None:
        folders = list(actors.cgroup_folders(tmp_path, tmp_path / "none"))
        total, free = actors.host_memory(folders)
        assert actors.usable_cpus(folders) >= 1 and total and free and total > 2**30


class FakeNvml:
    """A driver with the given answers; a GPU does not report what is None."""

    NVML_ERROR_LIBRARY_NOT_FOUND, NVML_ERROR_NOT_SUPPORTED = 12, 3
    NVML_MEMORY_ERROR_TYPE_UNCORRECTED, NVML_VOLATILE_ECC = 1, 0
    nvmlClocksThrottleReasonHwSlowdown, nvmlClocksThrottleReasonSwThermalSlowdown = 8, 32
    nvmlClocksThrottleReasonHwThermalSlowdown, nvmlClocksThrottleReasonHwPowerBrakeSlowdown = 64, 128

    class NVMLError(Exception):
        def __init__(self, value: int) -> None:
            super().__init__("Driver/library version mismatch" if value == 18 else f"error {value}")
            self.value = value

    def __init__(self, init_error: int = 0, ecc: int | None = None, reasons: int | None = None) -> None:
        self.init_error, self.ecc, self.reasons = init_error, ecc, reasons

    def nvmlInit(self) -> None:  # NVML's names
        if self.init_error:
            raise self.NVMLError(self.init_error)

    def nvmlShutdown(self) -> None: ...

    def nvmlDeviceGetCount(self) -> int:
        return 1

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetName(self, handle: int) -> str:
        return "NVIDIA H100 80GB HBM3"

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> SimpleNamespace:
        return SimpleNamespace(total=80 * 2**30, used=2**30)

    def nvmlDeviceGetTotalEccErrors(self, handle: int, kind: int, counter: int) -> int:
        return self._reported(self.ecc)

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: int) -> int:
        return self._reported(self.reasons)

    def _reported(self, value: int | None) -> int:
        if value is None:
            raise self.NVMLError(self.NVML_ERROR_NOT_SUPPORTED)
        return value


@pytest.mark.parametrize(
    ("ecc", "reasons", "slowed_by"),
    [(3, 64 | 128 | 4, ["hw_thermal_slowdown", "hw_power_brake_slowdown"]), (None, None, [])],
)
def test_gpus_as_nvml_reports_them(
    ecc: int | None, reasons: int | None, slowed_by: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(ecc=ecc, reasons=reasons))  # type: ignore[arg-type]
    gpu = {
        "index": 0, "name": "NVIDIA H100 80GB HBM3", "memory_bytes": 80 * 2**30, "memory_used_bytes": 2**30,
        "ecc_errors": ecc, "slowed_by": slowed_by,
    }  # fmt: skip
    assert actors.nvidia_gpus() == ([gpu], "")


def test_nvml_that_fails_or_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(init_error=18))  # type: ignore[arg-type]
    assert actors.nvidia_gpus() == ([], "NVML: Driver/library version mismatch")
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(init_error=12))  # type: ignore[arg-type]
    assert actors.nvidia_gpus() == ([], "")  # no driver, no GPUs
    blocked = threading.Event()
    monkeypatch.setattr(actors, "_query_nvml", blocked.wait)
    monkeypatch.setattr(actors, "_NVML_S", 0.05)
    assert actors.nvidia_gpus() == ([], "NVML gave no answer within 0 s")
    blocked.set()


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
    names = dependency_closure("launcher")
    assert {"launcher", "ray", "torch", "typing-extensions", "aiohttp"} <= names  # aiohttp by ray's extra `default`
    assert not {"pytest", "mypy", "ruff"} & names  # needed by launcher's extra `dev` alone
    assert dependency_closure("no-such-package") == frozenset()


def test_a_node_is_recognised_by_cluster_and_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raylet = ["raylet", f"--raylet_socket_name={tmp_path}/socket", "--cluster-id=0a0b"]
    processes = [SimpleNamespace(info={"cmdline": words}) for words in (None, ["bash", "-c", "--x=1"], raylet)]
    monkeypatch.setattr(probes.psutil, "process_iter", lambda names: processes)
    answer = b"\x12\x02\x0a\x0b"
    assert not probes.is_node(answer)  # the socket of a container's raylet is not visible
    (tmp_path / "socket").touch()
    assert probes.is_node(answer)
    assert not probes.is_node(b"\x12\x02\x0a\x0c")  # another cluster


class TestJoinError:
    """One sentence for each error of `ray.init`."""

    def test_other_versions(self) -> None:
        message = "Version mismatch: The cluster was started with:\n    Ray: 2.59.0\n    Python: 3.10.1\nThis process"
        sentence = probes.join_error("h:1", RuntimeError(message))
        assert sentence.startswith(
            "h:1: Version mismatch: The cluster was started with: Ray: 2.59.0 Python: 3.10.1 This"
        )
        assert "run the doctor with the cluster's own versions" in sentence

    def test_no_node(self) -> None:
        error = ConnectionError("Failed to connect to Ray cluster at h:1")
        error.__cause__ = RuntimeError("No node info found matching attributes: '' when trying to resolve node")
        assert "this machine is no node of it" in probes.join_error("h:1", error)

    def test_anything_else(self) -> None:
        assert probes.join_error("h:1", ValueError("odd\nmore")) == "h:1: Ray could not join (odd)"
        assert probes.join_error("", RuntimeError()) == "no local Ray could be started (RuntimeError)"


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
        record = json.loads(done.stdout)
        assert [(finding["check"], finding["level"]) for finding in record["findings"]] == [("cluster", "problem")]

    def test_a_job_file_that_is_wrong(self, tmp_path: Path) -> None:
        (tmp_path / "job.yaml").write_text("nam: x\n")
        done = launcher("doctor", str(tmp_path / "job.yaml"))
        assert done.returncode == 2 and "nam is not a key" in done.stderr and done.stdout == ""
