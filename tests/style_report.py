"""Measures how the code reads: `make style-report` prints a table, and last one JSON object.

With folders or files as arguments it lists, for each of them, every place that `tests/test_style.py` would refuse.
"""

import ast
import json
import re
import sys
import tokenize
from collections import deque
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "launcher"

VAGUE = {"it", "found", "told", "said", "kept", "given", "one", "here", "mine"}
"""Names that say nothing of a value."""

_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
# First words of a docstring that no imperative begins with. A positive list of verbs would have to grow with the code.
_FUNCTION_WORDS = """
a an the this that these those it its they whose which what who whom where when why how whether if as at by
for from in into of on to with without within until since before after behind beside besides between below
above under over per about against all any each every some no none not nothing both either neither one two
three first last other another more most less least few many and or but so such only also always never
is are was were be been has have had does do did can may must should would will there here his her their
how's what's as-is true false
"""
_NO_VERB = frozenset(_FUNCTION_WORDS.split())
_NO_NOUN = _NO_VERB - {"whether", "true", "one", "two", "three", "first", "last", "all", "any", "each", "every", "no"}
_NOUN_ENDINGS = ("tion", "sion", "ment", "ness", "ity", "ance", "ence", "ship", "ing")
# Words that are nouns or adjectives, or verbs in the third person, where a docstring has to begin with an imperative.
_THIRD_PERSON = re.compile(
    r"^(?!(pass|process|address|access|guess|express|discuss|compress|suppress|dress|press)$)\w+[^su]s$"
)


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yield the functions of a module that are not properties: those read as attributes, so a noun describes them."""
    for node in ast.walk(tree):
        if isinstance(node, _FUNCTIONS) and not any("property" in ast.unparse(d) for d in node.decorator_list):
            yield node


def opens_without_verb(docstring: str) -> bool:
    """Return whether a function's docstring does not begin with an imperative verb."""
    match = re.match(r"[A-Za-z][A-Za-z'-]*", docstring.strip())
    if match is None or not match.group()[0].isupper():
        return True  # a number, a backtick, or no sentence
    word = match.group().lower()
    return word in _NO_VERB or word.endswith(_NOUN_ENDINGS) or bool(_THIRD_PERSON.match(word))


def entries_without_noun(docstring: str) -> list[str]:
    """Return the `Args:` entries of a docstring that do not begin with a noun."""
    section = re.search(r"^\s*Args:\n((?:[ \t]+.*\n?|\n)+)", docstring, re.MULTILINE)
    if section is None:
        return []
    lines = section.group(1).splitlines()
    indent = len(lines[0]) - len(lines[0].lstrip())
    wrong = []
    for line in lines:
        entry = re.match(rf"^ {{{indent}}}(\*{{0,2}}\w+)(?: \([^)]*\))?: *(.*)", line)
        if line.strip() and len(line) - len(line.lstrip()) < indent:
            break
        if entry is not None:
            word = re.match(r"\W*([\w'-]*)", entry.group(2))
            assert word is not None
            if word.group(1).lower() in _NO_NOUN or (word.group(1)[:1].islower() and word.group(1) not in ("float32",)):
                wrong.append(f"{entry.group(1)}: {entry.group(2)}")
    return wrong


def bindings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield line and name of everything that a module binds: arguments, variables, fields."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg


def comment_lines(path: Path) -> int:
    """Return the number of lines that are a comment and nothing else."""
    with tokenize.open(path) as file:
        return sum(
            token.type == tokenize.COMMENT and not token.line[: token.start[1]].strip()
            for token in tokenize.generate_tokens(file.readline)
        )


def count_lines(paths: list[Path]) -> int:
    """Return the lines of some files, blank ones too."""
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)


def calls_to_backward() -> list[str]:
    """Return the functions on the shortest way from `train_loop_per_worker` to the engine's `backward`."""
    bodies: dict[str, set[str]] = {}
    for path in (PACKAGE / "train").rglob("*.py"):
        for function in functions(ast.parse(path.read_text(encoding="utf-8"))):
            called = (n.func for n in ast.walk(function) if isinstance(n, ast.Call))
            names = {f.attr if isinstance(f, ast.Attribute) else getattr(f, "id", "") for f in called}
            bodies.setdefault(function.name, set()).update(names)
    queue, before = deque(["train_loop_per_worker"]), {"train_loop_per_worker": ""}
    while queue:
        name = queue.popleft()
        for callee in sorted(bodies.get(name, set())):
            if callee not in before and (callee in bodies or callee == "backward"):
                before[callee] = name
                queue.append(callee)
    way = ["backward"]
    while before.get(way[0]):
        way.insert(0, before[way[0]])
    return way


def findings(path: Path) -> Iterator[str]:
    """Yield what a reader would stumble over in a file, a line each."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    name = path.relative_to(ROOT)
    for node in ast.walk(tree):
        if isinstance(node, (*_FUNCTIONS, ast.ClassDef)):
            for entry in entries_without_noun(ast.get_docstring(node) or ""):
                yield f"{name}:{node.lineno} {node.name}: Args entry without a noun: {entry}"
    for function in functions(tree):
        docstring = ast.get_docstring(function)
        if docstring and opens_without_verb(docstring):
            yield f"{name}:{function.lineno} {function.name}: docstring without a verb: {docstring.splitlines()[0]}"
    yield from (f"{name}:{line} vague name: {bound}" for line, bound in bindings(tree) if bound in VAGUE)


def measure() -> dict[str, float]:
    """Return the figures of the whole package."""
    files = sorted(PACKAGE.rglob("*.py"))
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in files]
    docstrings = [d for tree in trees for f in functions(tree) if (d := ast.get_docstring(f))]
    documented = [node for tree in trees for node in ast.walk(tree) if isinstance(node, (*_FUNCTIONS, ast.ClassDef))]
    bound = [name for tree in trees for _, name in bindings(tree)]
    loop = PACKAGE / "train" / "loop.py"
    return {
        "root_modules": sum(path.parent == PACKAGE and path.stem != "__init__" for path in files),
        "docstrings_without_verb": round(sum(map(opens_without_verb, docstrings)) / len(docstrings), 3),
        "args_without_noun": sum(len(entries_without_noun(ast.get_docstring(node) or "")) for node in documented),
        "vague_per_1000": round(1000 * sum(name in VAGUE for name in bound) / len(bound), 1),
        "comment_share": round(sum(map(comment_lines, files)) / count_lines(files), 4),
        "loop_comment_share": round(comment_lines(loop) / count_lines([loop]), 4),
        "calls_to_backward": len(calls_to_backward()) - 1,
        "readme_lines": count_lines([ROOT / "README.md"]),
        "launcher_lines": count_lines(files),
        "test_lines": count_lines(sorted((ROOT / "tests").rglob("*.py"))),
    }


def main() -> None:
    """Print the findings in the files named on the command line, or the figures of the package."""
    named = [Path(argument).resolve() for argument in sys.argv[1:]]
    if named:
        for path in named:
            for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
                print(*findings(file), sep="\n", end="\n")
        return
    figures = measure()
    for name, figure in figures.items():
        print(f"{name:<26}{figure:>10}")
    print("way to backward:", " > ".join(calls_to_backward()))
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
