"""How the doctor asks: in time, whatever hangs; and that it takes away what it put into the probes."""

import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from launcher.rundir.uri import open_uri
from launcher.submit.doctor import probes
from launcher.submit.doctor.actors import Probe
from launcher.submit.doctor.facts import Node
from launcher.submit.doctor.probes import ProbeGroup


class LocalProbes:
    """A group of probes in this process, each with its own root directory; two with the same one share it."""

    def __init__(self, roots: Mapping[str, Path], interrupted: str = "") -> None:
        self._roots, self._interrupted = roots, interrupted
        self.names = list(roots)
        self.errors: dict[str, str] = {}
        self.calls: list[str] = []

    def call(self, calls: Mapping[str, tuple[Any, ...]], method: str, timeout_s: float) -> dict[str, Any]:
        self.calls.append(method)
        if method == self._interrupted:
            raise KeyboardInterrupt
        answers = {}
        for name, (_, place, *rest) in calls.items():
            root = self._roots[name]

            def opened(uri: str, root: Path = root) -> tuple[Any, str]:
                return open_uri(f"{root}{uri}")

            answers[name] = getattr(Probe(), method)(opened, place, *rest)
        return answers

    def call_all(self, method: str, *arguments: Any, timeout_s: float) -> dict[str, Any]:
        return self.call(dict.fromkeys(self.names, arguments), method, timeout_s)


class TestStorage:
    @pytest.fixture(autouse=True)
    def short_wait(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(probes, "_READ_S", 0.3)

    def sees(self, local: LocalProbes) -> dict[str, tuple[str, ...]]:
        return {name: seen.sees for name, seen in probes.try_storage("/runs", local).items()}  # type: ignore[arg-type]

    def test_each_sees_what_is_shared(self, tmp_path: Path) -> None:
        for name in ("one", "two"):
            (tmp_path / name).mkdir()
        local = LocalProbes({"a": tmp_path / "one", "b": tmp_path / "one", "c": tmp_path / "two"})
        assert self.sees(local) == {"a": ("a", "b"), "b": ("a", "b"), "c": ("c",)}
        assert [path.name for path in sorted(tmp_path.rglob("*"))] == ["one", "two"]

    def test_a_node_that_cannot_write(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        seen = probes.try_storage("/runs", LocalProbes({"a": tmp_path, "b": tmp_path / "file"}))  # type: ignore[arg-type]
        assert (seen["a"].wrote, seen["a"].sees) == ("", ("a",))
        assert (seen["b"].wrote, seen["b"].sees) == ("Not a directory", ())

    @pytest.mark.parametrize("moment", ["write", "read"])
    def test_nothing_is_left_after_an_interrupt(self, tmp_path: Path, moment: str) -> None:
        local = LocalProbes({"a": tmp_path, "b": tmp_path}, interrupted=moment)
        with pytest.raises(KeyboardInterrupt):
            self.sees(local)
        assert local.calls[-1] == "clean" and list(tmp_path.iterdir()) == []

    def test_a_relative_path_means_one_directory(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        assert probes.absolute("runs") == str(tmp_path / "runs")
        assert probes.absolute("s3://bucket/runs/") == "s3://bucket/runs"


class Sleeper:
    """An actor that answers after a given time."""

    def ready(self) -> str:
        return "awake"

    def answer(self, seconds: float) -> float:
        time.sleep(seconds)
        if seconds < 0.1:
            raise ValueError("too short\nto be told")
        return seconds


class Broken:
    """An actor that fails to start."""

    def __init__(self) -> None:
        raise RuntimeError("no torch here")

    def ready(self) -> None:
        """Do nothing; never called."""


@pytest.mark.ray
class TestProbeGroup:
    @pytest.fixture
    def node(self, ray_cluster: None) -> Iterator[Node]:
        import ray
        from ray import cloudpickle

        cloudpickle.register_pickle_by_value(sys.modules[__name__])
        yield Node(
            node_id=ray.nodes()[0]["NodeID"], name="node", address="", is_head=True, ray_cpus=1, ray_gpus=0,
            object_store_bytes=0,
        )  # fmt: skip
        cloudpickle.unregister_pickle_by_value(sys.modules[__name__])

    def test_a_probe_that_hangs_or_fails_delays_no_other(self, node: Node) -> None:
        group = ProbeGroup(Sleeper)
        try:
            for name in ("quick", "slow", "wrong"):
                group.add(name, node)
            assert group.wait_ready(60) == []
            start = time.monotonic()
            answers = group.call({"quick": (0.2,), "slow": (30.0,), "wrong": (0.01,), "gone": (0.2,)}, "answer", 2)
            assert answers == {"quick": 0.2} and time.monotonic() - start < 10
            assert group.errors == {"slow": "no answer within 2 s", "wrong": "ValueError: to be told"}
        finally:
            group.stop()
        assert group.names == [] and group.call({"quick": (0.2,)}, "answer", 2) == {}

    def test_a_probe_that_cannot_start_is_removed(self, node: Node) -> None:
        group = ProbeGroup(Broken)
        group.add("a", node)
        assert group.wait_ready(60) == ["a"] and group.names == []
        assert "no torch here" in group.errors["a"]
