"""The import order: a module of the launcher imports only from its own folder and from earlier ones."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

_PACKAGE = Path(__file__).resolve().parent.parent / "launcher"

# Folders on one line may not import each other. `formatting` imports nothing of the launcher.
_ORDER = (
    ("formatting",),
    ("errors",),
    ("processes", "spec"),
    ("rundir",),
    ("models", "report", "submit"),
    ("tasks",),
    ("data",),
    ("train",),
    ("driver",),
    ("tune", "predict", "init"),
    ("cli",),
    ("__main__",),
)
_RANKS = {folder: rank for rank, folders in enumerate(_ORDER) for folder in folders}
_TASK_PROTOCOL = {
    "launcher.tasks",
    "launcher.tasks.base",
    "launcher.tasks.params",
    "launcher.tasks.results",
    "launcher.tasks.samples",
}
# Who alone may import a library: modules by their path below launcher/, folders by their name.
_KEPT_IN = {
    "deepspeed": (
        "train/engine.py",
        "train/op_builders.py",
        "train/flat_gradients.py",
        "train/checkpoint/reader.py",
        "train/checkpoint/state_dict.py",
        "train/offload/nvme.py",
        "train/checkpoint/universal.py",
    ),
    "ray.tune": ("tune/",),
    "kubernetes": ("submit/",),
    "typer": ("cli/",),
}


class Import(NamedTuple):
    """One imported module, or one name imported from it, which may be a module too."""

    importer: str
    line: int
    name: str

    def __str__(self) -> str:
        return f"launcher/{self.importer}:{self.line} imports {self.name}"


def _imports(path: Path) -> Iterator[Import]:
    """Every import of a file, at module level, under TYPE_CHECKING and inside functions alike."""
    importer = path.relative_to(_PACKAGE).as_posix()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from (Import(importer, node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} is a relative import; write it as launcher.*"
            assert node.module is not None
            yield Import(importer, node.lineno, node.module)
            yield from (Import(importer, node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def _all_imports() -> list[Import]:
    return [found for path in sorted(_PACKAGE.rglob("*.py")) for found in _imports(path)]


def _folder(importer: str) -> str:
    return importer.split("/")[0].removesuffix(".py")


def _is_within(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def _is_module(name: str) -> bool:
    path = _PACKAGE.parent.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def _own_imports() -> Iterator[tuple[Import, str, str]]:
    """Imports of the launcher's own modules, with the folders on both sides."""
    for found in _all_imports():
        parts = found.name.split(".")
        # A name from `from launcher.x import name` has the folder x like its module, so it does no harm here.
        if parts[0] == "launcher" and len(parts) > 1 and _folder(found.importer) != "__init__":
            yield found, _folder(found.importer), parts[1]


def test_every_folder_has_a_place_in_the_order() -> None:
    folders = {
        path.stem
        for path in _PACKAGE.iterdir()
        if (path.is_dir() and path.name != "__pycache__") or path.suffix == ".py"
    }
    assert folders - {"__init__"} == set(_RANKS)


def test_imports_point_to_earlier_folders() -> None:
    wrong = [
        str(found)
        for found, importer, imported in _own_imports()
        if importer != imported and _RANKS[imported] >= _RANKS[importer]
    ]
    assert wrong == []


def test_data_and_train_know_no_concrete_task() -> None:
    wrong = [
        str(found)
        for found, folder, imported in _own_imports()
        if folder in ("data", "train")
        and imported == "tasks"
        and _is_module(found.name)
        and found.name not in _TASK_PROTOCOL
    ]
    assert wrong == []


@pytest.mark.parametrize("library", _KEPT_IN)
def test_a_library_stays_in_its_folder(library: str) -> None:
    homes = _KEPT_IN[library]
    wrong = [
        str(found)
        for found in _all_imports()
        if _is_within(found.name, library) and not found.importer.startswith(homes)
    ]
    assert wrong == []


def test_the_command_line_starts_without_torch_and_ray() -> None:
    heavy = {"torch", "ray", "deepspeed", "transformers"}
    code = f"import sys, launcher.cli.main; print(*sorted({heavy} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []
