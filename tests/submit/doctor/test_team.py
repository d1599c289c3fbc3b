"""How the doctor asks: in time, whatever hangs; and that it takes away what it put into the storage."""

import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from launcher.rundir.uri import open_uri
from launcher.submit.doctor import storage
from launcher.submit.doctor.facts import Node
from launcher.submit.doctor.probes import Probe
from launcher.submit.doctor.team import ProbeGroup


class Rooms:
    """A team of probes in this process, each with a root directory of its own: two with the same one share it."""

    def __init__(self, roots: Mapping[str, Path], interrupted: str = "") -> None:
        self._roots, self._interrupted = roots, interrupted
        self.names = list(roots)
        self.errors: dict[str, str] = {}
        self.asked: list[str] = []

    def ask(self, calls: Mapping[str, tuple[Any, ...]], method: str, timeout_s: float) -> dict[str, Any]:
        self.asked.append(method)
        if method == self._interrupted:
            raise KeyboardInterrupt
        answers = {}
        for name, (_, place, *rest) in calls.items():
            root = self._roots[name]

            def opened(uri: str, root: Path = root) -> tuple[Any, str]:
                return open_uri(f"{root}{uri}")

            answers[name] = getattr(Probe(), method)(opened, place, *rest)
        return answers

    def ask_all(self, method: str, *arguments: Any, timeout_s: float) -> dict[str, Any]:
        return self.ask(dict.fromkeys(self.names, arguments), method, timeout_s)


class TestStorage:
    @pytest.fixture(autouse=True)
    def impatient(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(storage, "_READ_S", 0.3)

    def try_it(self, rooms: Rooms) -> dict[str, tuple[str, ...]]:
        return {name: seen.sees for name, seen in storage.try_storage("/runs", rooms).items()}  # type: ignore[arg-type]

    def test_each_sees_what_is_shared(self, tmp_path: Path) -> None:
        for name in ("one", "two"):
            (tmp_path / name).mkdir()
        rooms = Rooms({"a": tmp_path / "one", "b": tmp_path / "one", "c": tmp_path / "two"})
        assert self.try_it(rooms) == {"a": ("a", "b"), "b": ("a", "b"), "c": ("c",)}
        assert [path.name for path in sorted(tmp_path.rglob("*"))] == ["one", "two"]

    def test_a_node_that_cannot_write(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        seen = storage.try_storage("/runs", Rooms({"a": tmp_path, "b": tmp_path / "file"}))  # type: ignore[arg-type]
        assert (seen["a"].wrote, seen["a"].sees) == ("", ("a",))
        assert (seen["b"].wrote, seen["b"].sees) == ("Not a directory", ())

    @pytest.mark.parametrize("moment", ["write", "read"])
    def test_nothing_is_left_after_an_interrupt(self, tmp_path: Path, moment: str) -> None:
        rooms = Rooms({"a": tmp_path, "b": tmp_path}, interrupted=moment)
        with pytest.raises(KeyboardInterrupt):
            self.try_it(rooms)
        assert rooms.asked[-1] == "clean" and list(tmp_path.iterdir()) == []

    def test_a_relative_path_means_one_directory(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        assert storage.absolute("runs") == str(tmp_path / "runs")
        assert storage.absolute("s3://bucket/runs/") == "s3://bucket/runs"


class Sleeper:
    """Answers when it likes."""

    def ready(self) -> str:
        return "awake"

    def answer(self, seconds: float) -> float:
        time.sleep(seconds)
        if seconds < 0.1:
            raise ValueError("too short\nto be told")
        return seconds


class Broken:
    """Has no process that could answer."""

    def __init__(self) -> None:
        raise RuntimeError("no torch here")

    def ready(self) -> None:
        """Never reached."""


@pytest.mark.ray
class TestTeam:
    @pytest.fixture
    def here(self, ray_cluster: None) -> Iterator[Node]:
        import ray
        from ray import cloudpickle

        cloudpickle.register_pickle_by_value(sys.modules[__name__])
        yield Node(
            node_id=ray.nodes()[0]["NodeID"], name="here", address="", is_head=True, ray_cpus=1, ray_gpus=0,
            object_store_bytes=0,
        )  # fmt: skip
        cloudpickle.unregister_pickle_by_value(sys.modules[__name__])

    def test_who_hangs_or_fails_keeps_nobody_from_answering(self, here: Node) -> None:
        team = ProbeGroup(Sleeper)
        try:
            for name in ("quick", "slow", "wrong"):
                team.add(name, here)
            assert team.muster(60) == []
            start = time.monotonic()
            answers = team.ask({"quick": (0.2,), "slow": (30.0,), "wrong": (0.01,), "gone": (0.2,)}, "answer", 2)
            assert answers == {"quick": 0.2} and time.monotonic() - start < 10
            assert team.errors == {"slow": "no answer within 2 s", "wrong": "ValueError: to be told"}
        finally:
            team.dismiss()
        assert team.names == [] and team.ask({"quick": (0.2,)}, "answer", 2) == {}

    def test_who_cannot_start_is_let_go(self, here: Node) -> None:
        team = ProbeGroup(Broken)
        team.add("a", here)
        assert team.muster(60) == ["a"] and team.names == []
        assert "no torch here" in team.errors["a"]
