"""Randomly broken job files: each either loads and survives `dump_job`, or is refused in sentences."""

import copy
import io
import json
import os
import re
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from launcher.errors import SpecError
from launcher.spec.job import JobSpec
from launcher.spec.loader import dump_job, load_job
from launcher.tasks import params_class

# The examples are the same in every run; FUZZ_EXAMPLES=5000 tries new ones.
_EXAMPLES = os.environ.get("FUZZ_EXAMPLES")
FUZZ = settings(
    max_examples=int(_EXAMPLES or 120),
    derandomize=_EXAMPLES is None,
    database=None,
    deadline=timedelta(seconds=20),
    suppress_health_check=list(HealthCheck),
)

_FOLDER = Path(__file__).resolve().parents[2] / "jobs"
_JOBS = [YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8")) for path in sorted(_FOLDER.glob("*.yaml"))]
_KEYS = sorted({key for job in _JOBS for section in job.values() if isinstance(section, dict) for key in section})

Value = Any  # what YAML may hold
Path_ = tuple[Any, ...]

_TEXTS = st.text(max_size=12) | st.sampled_from(
    ["", " ", "null", "~", "yes", "1e3", "0x1F", "hub:", "hub:a/b/c/d", "s3://", "a: b", "*a", "&a", "!x", "%",
     "é\u2028", "\x00", "\x85", "<<"]
)  # fmt: skip
_NUMBERS = (
    st.integers()
    | st.sampled_from([-1, 0, 2**31, 2**63, -(2**63) - 1, 10**30, 10**400])
    | st.floats()
    | st.sampled_from([float("nan"), float("inf"), float("-inf"), 5e-324, 1.7e308, -0.0])
)
_SCALARS = st.none() | st.booleans() | _NUMBERS | _TEXTS
_VALUES = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_TEXTS | st.sampled_from(_KEYS), inner, max_size=4),
    max_leaves=10,
)


def _deep(depth: int) -> Value:
    value: Value = 1
    for level in range(depth):
        value = [value] if level % 2 else {"a": value}
    return value


_ANY = _VALUES | st.integers(1, 60).map(_deep)


def _places(value: Value, path: Path_ = ()) -> list[Path_]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in inner for place in _places(item, (*path, key)))]


def _at(value: Value, path: Path_) -> Value:
    for key in path:
        value = value[key]
    return value


@st.composite
def _broken_jobs(draw: Callable[..., Any]) -> Value:
    """Draw a job of jobs/ and change it in up to four places."""
    job = copy.deepcopy(draw(st.sampled_from(_JOBS)))
    for _ in range(draw(st.integers(1, 4))):
        places = _places(job)[1:]
        if not places:
            break
        *outer, last = draw(st.sampled_from(places))
        _change(draw, job, _at(job, tuple(outer)), last)
        if _contains_itself(job):
            return {"name": "x", "data": {"train": _loop()}}
    return job


def _change(draw: Callable[..., Any], job: Value, holder: Value, last: Any) -> None:
    what = draw(st.sampled_from(["delete", "rename", "replace", "replace", "wrap", "move", "share", "loop"]))
    value = holder[last]
    if what in ("delete", "move"):
        del holder[last]
    if what in ("move", "share"):  # to another place, or to both, which is an alias
        target = _at(job, draw(st.sampled_from(_places(job))))
        if isinstance(target, dict):
            target[draw(st.sampled_from(_KEYS))] = value
        elif isinstance(target, list):
            target.append(value)
    elif what == "rename" and isinstance(holder, dict):
        holder[draw(_TEXTS | st.sampled_from(_KEYS) | st.just(f"{last}s"))] = holder.pop(last)
    elif what == "wrap":
        holder[last] = draw(st.sampled_from([[value], {"type": value}, {str(last): value}]))
    elif what != "delete":
        holder[last] = _loop() if what == "loop" else draw(_ANY)


def _loop() -> Value:
    loop: list[Value] = []
    loop.append(loop)
    return loop


def _contains_itself(value: Value, above: tuple[int, ...] = ()) -> bool:
    if id(value) in above:
        return True
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(_contains_itself(item, (*above, id(value))) for item in inner)


def _dump_yaml(job: Value, flow: bool) -> str:
    """Dump as YAML; a value that occurs twice becomes an anchor and an alias."""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style, yaml.allow_unicode, yaml.width = flow, True, 200
    text = io.StringIO()
    yaml.dump(job, text)
    return text.getvalue()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "job.yaml"


def _check_loads_or_is_refused(file: Path) -> None:
    try:
        job = load_job(file, (), params_class)
    except SpecError as error:
        assert error.problems
        for problem in error.problems:
            _check_sentence(problem, file)
        return
    text = dump_job(job)
    file.write_text(text, encoding="utf-8", newline="")
    again = load_job(file, (), params_class)
    assert again == job and again.task.parameters() == job.task.parameters()
    assert dump_job(again) == text


_UNREADABLE = ("not valid YAML: ", "the job file is ", "the job file has ", "a key of ", "byte 0x")


def _check_sentence(problem: str, file: Path) -> None:
    """Check that a problem names file, line and key (or why there is none), and a fix after the semicolon."""
    assert problem.isprintable(), repr(problem)
    match = re.fullmatch(re.escape(str(file)) + r"(:\d+)?(:\d+)?: (.+)", problem)
    assert match is not None, problem
    sentence = match[3]
    assert sentence.startswith(_UNREADABLE) or re.match(r"\S+?[ :]", sentence) or " is " in sentence, problem
    assert "; " in sentence or " needs " in sentence, problem


@FUZZ
@given(job=_broken_jobs(), flow=st.booleans())
def test_a_job_file_with_changed_values_loads_or_is_refused(file: Path, job: Value, flow: bool) -> None:
    file.write_text(_dump_yaml(job, flow), encoding="utf-8", newline="")
    _check_loads_or_is_refused(file)


@FUZZ
@given(data=st.data(), name=st.sampled_from(sorted(path.name for path in _FOLDER.glob("*.yaml"))))
def test_a_job_file_with_changed_bytes_loads_or_is_refused(file: Path, data: st.DataObject, name: str) -> None:
    content = bytearray((_FOLDER / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        begin = data.draw(st.integers(0, len(content)))
        end = min(len(content), begin + data.draw(st.sampled_from([0, 0, 1, 5, 40])))
        more = st.sampled_from(
            [b"", b"\t", b"\n", b"\r\n", b" ", b":", b"- ", b"&a ", b"*a", b"!!", b"{", b"]", b"'", b"#", b"|\n",
             b"\xff"]
        )  # fmt: skip
        content[begin:end] = data.draw(more | st.binary(max_size=4))
    file.write_bytes(content)
    _check_loads_or_is_refused(file)


_YAML_CHARACTERS = st.sampled_from("ab:-[]{}\n \t#&*!|>'\"?,.%@0\x00é\u2028~")


@FUZZ
@given(
    content=st.binary(max_size=60)
    | st.text(max_size=60).map(str.encode)
    | st.text(_YAML_CHARACTERS, max_size=40).map(str.encode)
    | _ANY.map(lambda value: json.dumps(value).encode())
)
def test_any_bytes_load_or_are_refused(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    _check_loads_or_is_refused(file)


def test_every_job_file_survives_a_round_trip(file: Path) -> None:
    for job in _JOBS:
        file.write_text(_dump_yaml(job, False), encoding="utf-8")
        assert isinstance(load_job(file, (), params_class), JobSpec)
        _check_loads_or_is_refused(file)
