"""cluster/Dockerfile, which no test can build: what it copies is there, what it installs is pinned, who it runs as."""

import re
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parents[2]
_TEXT = (_ROOT / "cluster" / "Dockerfile").read_text(encoding="utf-8")


def _instructions() -> list[tuple[str, str]]:
    """Return (instruction, its words) in order, without comments and with continued lines joined."""
    lines = "\n".join(line for line in _TEXT.splitlines() if not line.lstrip().startswith("#"))
    joined = re.sub(r"\\\n", " ", lines)
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in joined.splitlines() if line.strip()]


def test_the_variants_are_stages() -> None:
    stages = {words.split(" AS ")[1] for name, words in _instructions() if name == "FROM"}
    assert {"base-cpu", "base-cuda"} <= stages
    arguments = {words.split("=")[0] for name, words in _instructions() if name == "ARG"}
    bases = [words for name, words in _instructions() if name == "FROM"]
    used = {name for words in bases for name in re.findall(r"\$\{(\w+)\}", words)}
    assert used <= arguments and "VARIANT" in used


def test_what_it_copies_is_in_the_repository_and_travels() -> None:
    ignore = (_ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert "*" in ignore, "what is not named does not travel"
    copied = {line[1:].strip("/") for line in ignore if line.startswith("!")}
    sources = [
        source for name, words in _instructions() if name == "COPY" and "--from" not in words
        for source in words.split()[:-1]
    ]  # fmt: skip
    assert {"constraints.txt", "pyproject.toml", "launcher"} <= set(sources)
    for source in sources:
        assert (_ROOT / source).exists(), f"COPY {source}: there is no such file"
        assert source in copied, f"COPY {source}: .dockerignore keeps it back"


def test_what_it_installs_is_pinned() -> None:
    for command in re.findall(
        r"pip install[^&|;]*", " ".join(words for name, words in _instructions() if name == "RUN")
    ):
        assert "--constraint" in command or "--no-deps" in command, command


def test_constraints_hold_all_the_launcher_asks_for() -> None:
    tomllib = pytest.importorskip("tomllib", reason="is in Python 3.11 and newer")
    project = tomllib.loads((_ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    constraints = (_ROOT / "constraints.txt").read_text(encoding="utf-8")
    pinned = {_plain(line.split("==")[0]) for line in constraints.splitlines() if "==" in line}
    extras = [entry for extra in ("kube", "mlflow") for entry in project["optional-dependencies"][extra]]
    asked = {_plain(re.split(r"[\[<>=~! ]", entry)[0]) for entry in [*project["dependencies"], *extras]}
    assert asked - pinned == set()


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_it_ends_as_a_user_and_without_a_process_of_its_own() -> None:
    from launcher.spec.kubernetes import HOME, KubernetesSpec

    instructions = _instructions()
    users = [words for name, words in instructions if name == "USER"]
    assert users[-1] == f"{KubernetesSpec(image='x').run_as_user}:{KubernetesSpec(image='x').run_as_user}"
    assert any(name == "WORKDIR" and words == HOME for name, words in instructions)
    assert not [name for name, _ in instructions if name == "ENTRYPOINT"], (
        "process 1 must be `ray start`, to receive SIGTERM"
    )
