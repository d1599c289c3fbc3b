"""How the code reads: docstrings, arguments, names, comments, and the way to `backward` (see `style_report.py`)."""

import pytest

from tests import style_report


@pytest.fixture(scope="module")
def figures() -> dict[str, float]:
    """Figures of the whole package."""
    return style_report.measure()


@pytest.mark.parametrize(
    ("figure", "most"),
    [("root_modules", 3), ("docstrings_without_verb", 0.05), ("args_without_noun", 0), ("vague_per_1000", 5),
     ("calls_to_backward", 5)],
)  # fmt: skip
def test_figure_is_at_most(figures: dict[str, float], figure: str, most: float) -> None:
    assert figures[figure] <= most, "`python tests/style_report.py launcher` lists the places"


@pytest.mark.parametrize(("figure", "least"), [("comment_share", 0.04), ("loop_comment_share", 0.08)])
def test_figure_is_at_least(figures: dict[str, float], figure: str, least: float) -> None:
    assert figures[figure] >= least


@pytest.mark.parametrize(
    ("docstring", "is_wrong"),
    [("Return the newest valid step.", False), ("Process rows.", False), ("The newest valid step.", True),
     ("Returns the newest step.", True), ("Whether it is over.", True), ("`relative` as a path.", True),
     ("Newest steps of a run.", False)],
)  # fmt: skip
def test_docstrings_without_a_verb_are_found(docstring: str, is_wrong: bool) -> None:
    assert style_report.opens_without_verb(docstring) is is_wrong


def test_args_without_a_noun_are_found() -> None:
    entries = "    rank: of this worker.\n    size: Number of workers.\n    x: what it is.\n"
    docstring = f"Train.\n\nArgs:\n{entries}\nReturns:\n    y: of it.\n"
    assert style_report.entries_without_noun(docstring) == ["rank: of this worker.", "x: what it is."]
