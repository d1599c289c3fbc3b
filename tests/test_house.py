"""House rules that no linter knows: sizes of files and functions, and job files that parse."""

import ast
from pathlib import Path

import pytest

from launcher.spec.loader import load_job
from launcher.tasks import task_names

_ROOT = Path(__file__).resolve().parent.parent
_FILES = sorted((_ROOT / "launcher").rglob("*.py"))
_JOBS = sorted((_ROOT / "jobs").glob("*.yaml"))

_MAX_FILE_LINES = 500
_MAX_TASK_LINES = 150
_MAX_FUNCTION_LINES = 60


def _name(path: Path) -> str:
    return path.relative_to(_ROOT).as_posix()


def _limit(path: Path) -> int:
    is_task = path.parent.name == "tasks" and path.stem.replace("_", "-") in task_names()
    return _MAX_TASK_LINES if is_task else _MAX_FILE_LINES


def _body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef, source: list[str]) -> int:
    """Return the lines of a function without docstring and comments: an explanation does not make it long."""
    assert function.end_lineno is not None
    begin = function.lineno
    if ast.get_docstring(function) is not None:
        docstring = function.body[0]
        assert docstring.end_lineno is not None
        begin += docstring.end_lineno - docstring.lineno + 1
    return function.end_lineno - begin + 1 - _comments(source[function.lineno - 1 : function.end_lineno])


def _comments(lines: list[str]) -> int:
    return sum(line.lstrip().startswith("#") for line in lines)


def _size(path: Path) -> int:
    """Return the lines of a file; of a task without comments and imports, as of a function."""
    lines = path.read_text(encoding="utf-8").splitlines()
    imports = sum(line.startswith(("from ", "import ")) for line in lines)
    return len(lines) - (_comments(lines) + imports if _limit(path) == _MAX_TASK_LINES else 0)


def test_files_are_short() -> None:
    sizes = {_name(path): (_size(path), _limit(path)) for path in _FILES}
    assert {name: size for name, (size, limit) in sizes.items() if size > limit} == {}


def test_functions_are_short() -> None:
    sizes = {
        f"{_name(path)}:{node.lineno} {node.name}": _body_lines(node, source.splitlines())
        for path in _FILES
        for source in [path.read_text(encoding="utf-8")]
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert {name: size for name, size in sizes.items() if size > _MAX_FUNCTION_LINES} == {}


def test_there_are_job_files() -> None:
    assert _JOBS


@pytest.mark.parametrize("path", _JOBS, ids=_name)
def test_a_job_file_parses_and_is_named_like_its_file(path: Path) -> None:
    assert load_job(path).name == path.stem
