"""A draft as a commented job file, published at once and read back first. Runs on the client."""

import json
import os
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path

from launcher.errors import SpecError
from launcher.init.settle import Draft, Line
from launcher.rundir.uri import describe_os_error
from launcher.spec.loader import load_job
from launcher.spec.messages import one_line
from launcher.tasks import params_of

_WIDTH = 120
# Comments stand behind their values in one column: not before this one, and not behind values that reach too far.
_COLUMN = 34
_FAR = 72
_PLAIN = re.compile(r"[A-Za-z_./][A-Za-z0-9_./-]*")
_NOT_TEXT = frozenset(("null", "true", "false", "yes", "no", "on", "off", "y", "n", ".", "..", ".inf", ".nan"))


def check_target(path: Path, force: bool) -> None:
    """Refuse a place for the job file before any work is done.

    Raises:
        SpecError: something is there, or no file can be there.
    """
    if path.is_dir():
        raise SpecError((f"--output {path}: is a directory; name a file in it, {path / 'job.yaml'}",))
    if path.exists() and not force:
        raise SpecError((f"--output {path}: is there already; name another file, or --force to replace it",))
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise SpecError((f"--output {path}: nothing can be written to {above}; name a file elsewhere",))


def render(draft: Draft) -> str:
    """The job file's text."""
    title = [part for line in draft.title for part in textwrap.wrap(_comment(line), _WIDTH - 2, break_on_hyphens=False)]
    parts = ["".join(f"# {part}\n" for part in title), f"name: {scalar(draft.name)}\n"]
    for section, lines in draft.sections.items():
        parts.append(f"\n{section}:\n{_section(lines)}")
    return "".join(parts)


def publish(draft: Draft, path: Path, force: bool) -> None:
    """Write a draft's job file: it appears when it is whole and `load_job` has read it.

    Raises:
        SpecError: it cannot be written, or it is wrong.
    """
    staged = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        staged.write_text(render(draft), encoding="utf-8")
        load_job(staged, (), params_of)
        check_target(path, force)  # somebody may have been faster
        os.replace(staged, path)
    except OSError as error:
        raise SpecError(
            (f"--output {path}: cannot be written ({describe_os_error(error)}); name a file elsewhere",)
        ) from error
    except SpecError as error:
        shown = one_line(str(staged))  # as problems begin with it
        raise SpecError(tuple(problem.replace(shown, str(path), 1) for problem in error.problems)) from error
    finally:
        staged.unlink(missing_ok=True)


def _section(lines: Sequence[Line]) -> str:
    """Keys with their comments: behind the values, in one column, where they fit; else above."""
    texts = [_key(line) for line in lines]
    column = max(_COLUMN, *(len(text) for text in texts if len(text) <= _FAR and "\n" not in text), 0)
    parts = []
    for line, text in zip(lines, texts, strict=True):
        why = _comment(line.why)
        beside = f"{text:{column}}  # {why}"
        above = "".join(f"  # {part}\n" for part in textwrap.wrap(why, _WIDTH - 4, break_on_hyphens=False))
        parts.append(f"{beside}\n" if "\n" not in text and len(beside) <= _WIDTH else f"{above}{text}\n")
    return "".join(parts)


def _key(line: Line) -> str:
    text = f"  {'# ' if line.off else ''}{line.key}: {scalar(line.value)}"
    if isinstance(line.value, list) and len(text) > _WIDTH // 2:
        return f"  {line.key}:\n" + "\n".join(f"    - {scalar(item)}" for item in line.value)
    return text


def scalar(value: object) -> str:
    """A value as YAML that means it, on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {scalar(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(scalar, value)) + "]"
    if isinstance(value, float):
        # As people write a learning rate: 2e-5, not 2e-05.
        return re.sub(r"e([+-])0+", r"e\1", f"{value:g}")
    if isinstance(value, int):
        return str(value)
    text = str(value)
    if _PLAIN.fullmatch(text) and text.lower() not in _NOT_TEXT:
        return text
    # JSON's quotes are YAML's; what cannot be printed is escaped.
    return json.dumps(text, ensure_ascii=not text.isprintable())


def _comment(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
