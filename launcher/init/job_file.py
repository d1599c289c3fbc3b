"""Job file of a draft: render YAML with comments, load it as a check, publish it atomically. Runs on the client."""

import json
import os
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path

from launcher.errors import SpecError
from launcher.init.defaults import Draft, Line
from launcher.init.splits import split_of
from launcher.rundir.uri import describe_os_error
from launcher.spec.hub import HUB_PREFIX
from launcher.spec.loader import load_job
from launcher.spec.messages import one_line
from launcher.tasks import params_class

_WIDTH = 120
# Comments follow their values, aligned in one column from here on; longer values than _MAX_ALIGNED do not count.
_COLUMN = 34
_MAX_ALIGNED = 72
# Without a leading digit or sign: YAML would read such a text as a number or a date.
_PLAIN = re.compile(r"[A-Za-z_./][A-Za-z0-9_./-]*")
# Includes the words of YAML 1.1: the launcher reads 1.2, in which `no` is text, but other tools may not.
_NOT_TEXT = frozenset(("null", "true", "false", "yes", "no", "on", "off", "y", "n", ".", "..", ".inf", ".nan"))


def check_target(path: Path, force: bool) -> None:
    """Check that the job file can be written, before any work is done.

    Raises:
        SpecError: The file exists, or cannot be created.
    """
    if path.is_dir():
        raise SpecError((f"--output {path}: is a directory; name a file in it, {path / 'job.yaml'}",))
    if path.exists() and not force:
        raise SpecError((f"--output {path}: exists already; name another file, or --force to replace it",))
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise SpecError((f"--output {path}: nothing can be written to {above}; name a file elsewhere",))


def render(draft: Draft) -> str:
    """Return the text of the job file."""
    title = [part for line in draft.title for part in textwrap.wrap(_comment(line), _WIDTH - 2, break_on_hyphens=False)]
    parts = ["".join(f"# {part}\n" for part in title), f"name: {scalar(draft.name)}\n"]
    for section, lines in draft.sections.items():
        parts.append(f"\n{section}:\n{_section(lines)}")
    return "".join(parts)


def publish(draft: Draft, path: Path, force: bool) -> None:
    """Write the job file atomically, after `load_job` has accepted it.

    Raises:
        SpecError: The file cannot be written, or the draft is not a valid job.
    """
    # In the same directory, as a rename is atomic only within one file system.
    staged = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        staged.write_text(render(draft), encoding="utf-8")
        # From the file, as `train` will do: this also tests quoting and comments. A draft that the launcher refuses is
        # an error of `init`, and must not replace a file of the user.
        load_job(staged, (), params_class)
        check_target(path, force)  # the file may have been created in the meantime
        os.replace(staged, path)
    except OSError as error:
        raise SpecError(
            (f"--output {path}: cannot be written ({describe_os_error(error)}); name a file elsewhere",)
        ) from error
    except SpecError as error:
        # Problems begin with the path of the staged file, which the user does not know.
        prefix = one_line(str(staged))
        raise SpecError(tuple(problem.replace(prefix, str(path), 1) for problem in error.problems)) from error
    finally:
        staged.unlink(missing_ok=True)


def _section(lines: Sequence[Line]) -> str:
    """Return the lines of a section, each with its comment: after the value if it fits, else above."""
    texts = [_key(line) for line in lines]
    # The 0 is for a section without short values: `max` of one number is an error.
    column = max(_COLUMN, *(len(text) for text in texts if len(text) <= _MAX_ALIGNED and "\n" not in text), 0)
    parts = []
    for line, text in zip(lines, texts, strict=True):
        why = _comment(line.why)
        beside = f"{text:{column}}  # {why}"
        # Not at hyphens: a break would cut options and paths.
        above = "".join(f"  # {part}\n" for part in textwrap.wrap(why, _WIDTH - 4, break_on_hyphens=False))
        parts.append(f"{beside}\n" if "\n" not in text and len(beside) <= _WIDTH else f"{above}{text}\n")
    return "".join(parts)


def _key(line: Line) -> str:
    text = f"  {'# ' if line.is_commented else ''}{line.key}: {scalar(line.value)}"
    if isinstance(line.value, list) and len(text) > _WIDTH // 2:
        return f"  {line.key}:\n" + "\n".join(f"    - {scalar(item)}" for item in line.value)
    return text


def scalar(value: object) -> str:
    """Return a value as YAML on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {scalar(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(scalar, value)) + "]"
    if isinstance(value, float):
        # The usual form of a learning rate: 2e-5, not 2e-05.
        # Read back as a number by YAML 1.2 alone; YAML 1.1 (PyYAML) takes it for a text, as it has no point.
        return re.sub(r"e([+-])0+", r"e\1", f"{value:g}")
    if isinstance(value, int):
        return str(value)
    if value is None:
        return "null"
    text = str(value)
    if _PLAIN.fullmatch(text) and text.lower() not in _NOT_TEXT:
        return text
    # A JSON string is a valid YAML string; unprintable characters are escaped.
    return json.dumps(text, ensure_ascii=not text.isprintable())


def _comment(text: str) -> str:
    # A line end in a comment would make the rest of it a key. Column names may contain one.
    return "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))


def job_name(location: str, output: str) -> str:
    """Return a name for the run: the name of the job file, or of the data if that is `job`.

    Args:
        location: Location of the data.
        output: File name of the job file, without its suffix.
    """
    if output != "job":
        return _clean(output) or "my-job"
    bare = location.removeprefix(HUB_PREFIX).split("#")[0].split("?")[0].rstrip("/")
    parts = [part for part in os.path.abspath(bare).split("/") if not set("*?[") & set(part)]
    names = [_clean(part.rsplit(".", 1)[0] if index == 0 else part) for index, part in enumerate(reversed(parts))]
    # Names such as `train` or `data` say nothing; the directory above usually does.
    return next((name for name in names if name and not split_of(name) and name != "data"), "my-job")


def _clean(text: str) -> str:
    """Replace the characters that the name of a run may not have."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("._-")[:63]
