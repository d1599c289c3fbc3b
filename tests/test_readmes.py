"""Commands, job files, links and paths in the READMEs are parsed: what a reader copies works."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import typer
import yaml

from launcher.cli.main import app
from launcher.spec.loader import load_job

_ROOT = Path(__file__).resolve().parent.parent
_READMES = [
    _ROOT / name
    for name in (
        "README.md", "CONTRIBUTING.md", "jobs/README.md", "cluster/README.md", "launcher/README.md", "tests/README.md",
        "tests/benchmarks/README.md", "tests/gpu/README.md",
    )
]  # fmt: skip
_MAX_LINES = 200
# A job that fragments of job files are merged into.
_JOB: dict[str, Any] = {
    "name": "x",
    "task": {"type": "text-classification"},
    "model": {"name": "m"},
    "data": {"train": "a.parquet", "validation": "b.parquet"},
}


def _blocks(readme: Path, *languages: str) -> Iterator[str]:
    """Yield the code blocks of some languages."""
    fences = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
    for language, block in fences.findall(readme.read_text("utf-8")):
        if language in languages:
            yield block


def _commands() -> list[str]:
    lines = (line for readme in _READMES for block in _blocks(readme, "sh") for line in block.splitlines())
    return sorted({line.split(" #")[0].strip() for line in lines if line.strip().startswith("launcher ")})


def _parse(command: click.Command, words: list[str], parent: click.Context | None = None) -> click.Command:
    """Parse a command line as far down as its last subcommand, without running anything."""
    context = command.make_context(command.name or "launcher", words, parent)
    if not isinstance(command, click.Group):
        return command
    rest = [*context._protected_args, *context.args]
    name, found, left = command.resolve_command(context, rest)
    assert found is not None, name
    return _parse(found, left, context)


def test_there_are_commands() -> None:
    assert len(_commands()) > 20


@pytest.mark.parametrize("line", _commands())
def test_command_is_parsed(line: str) -> None:
    _parse(typer.main.get_command(app), shlex.split(line)[1:])


@pytest.mark.parametrize("readme", _READMES, ids=lambda path: path.relative_to(_ROOT).as_posix())
def test_job_file_is_valid(readme: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for number, block in enumerate(_blocks(readme, "yaml")):
        fragment = yaml.safe_load(block)
        for key, value in fragment.items():
            # A mixture stands in the place of other data.
            base = {} if key == "data" and "mixture" in value else _JOB.get(key, {})
            fragment[key] = {**base, **value} if isinstance(value, dict) else value
        path = tmp_path / f"{number}.yaml"
        path.write_text(yaml.safe_dump({**_JOB, **fragment}))
        load_job(path)


@pytest.mark.parametrize("readme", _READMES, ids=lambda path: path.relative_to(_ROOT).as_posix())
def test_links_paths_and_make_targets_exist(readme: Path) -> None:
    text = readme.read_text("utf-8")
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (readme.parent / target).exists(), target
    for target, anchor in re.findall(r"\]\(([^):#]*)#([^)]+)\)", text):
        linked = readme.parent / target if target else readme
        headings = re.findall(r"^#+ (.+)$", linked.read_text("utf-8"), re.MULTILINE)
        assert anchor in [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings], anchor
    for path in re.findall(r"`((?:launcher|tests|jobs|cluster)/[\w./-]+)`", text):
        assert (_ROOT / path).exists(), path
    targets = re.findall(r"^([\w-]+):", (_ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    for target in re.findall(r"`make ([\w-]+)`", text):
        assert target in targets, target


def test_root_readme_is_short() -> None:
    assert len((_ROOT / "README.md").read_text("utf-8").splitlines()) <= _MAX_LINES
