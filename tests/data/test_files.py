"""Globs: `*` stays in one directory, `**` crosses them."""

from pathlib import Path

import pytest

from launcher.data.files import glob_pattern, list_files

_FILES = [
    "a.parquet", "b.parquet", "b1.parquet", "odd[1].parquet", "x/c.parquet", "x/y/d.parquet", "x/y/e.csv",
    "_skip/f.parquet",
]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in _FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize(
    ("glob", "expected"),
    [
        ("*.parquet", ["a.parquet", "b.parquet", "b1.parquet", "odd[1].parquet"]),
        ("b*.parquet", ["b.parquet", "b1.parquet"]),
        ("?.parquet", ["a.parquet", "b.parquet"]),
        ("[!a].parquet", ["b.parquet"]),
        ("b[0-9].parquet", ["b1.parquet"]),
        ("odd[1].parquet", ["odd[1].parquet"]),  # a file of that name exists: no glob
        ("*/*.parquet", ["x/c.parquet"]),
        ("x/*", ["x/c.parquet"]),
        ("*/y/*.csv", ["x/y/e.csv"]),
        ("x/**", ["x/c.parquet", "x/y/d.parquet", "x/y/e.csv"]),
        ("**/*.parquet", ["a.parquet", "b.parquet", "b1.parquet", "odd[1].parquet", "x/c.parquet", "x/y/d.parquet"]),
        ("x/**/d.parquet", ["x/y/d.parquet"]),
        ("**/y/*", ["x/y/d.parquet", "x/y/e.csv"]),
    ],
)
def test_glob_matches_files(folder: Path, monkeypatch: pytest.MonkeyPatch, glob: str, expected: list[str]) -> None:
    paths = [str(folder / name) for name in expected]
    assert [file.path for file in list_files("train", f"{folder}/{glob}")] == paths
    if "?" not in glob:  # in a URI it begins options
        uris = [file.path for file in list_files("train", f"{folder.as_uri()}/{glob}")]
        assert uris == [f"file://{path}" for path in paths]
    monkeypatch.chdir(folder)
    assert [file.path for file in list_files("train", glob)] == paths


def test_options_of_a_uri_are_kept_for_every_file(folder: Path) -> None:
    for location in (f"{folder.as_uri()}/x?a=b", f"{folder.as_uri()}/x/*?a=b", f"{folder.as_uri()}/x/c.parquet?a=b"):
        assert list_files("train", location)[0][:3] == (f"file://{folder}/x/c.parquet?a=b", "c.parquet", "parquet")


@pytest.mark.parametrize(
    ("glob", "text", "is_match"),
    [
        ("a.b", "axb", False),
        ("[a-c]", "b", True),
        ("[a-c]", "-", False),
        ("[!a-c]", "d", True),
        ("[^]", "x", False),
        ("a[b", "a[b", True),
        ("(a|b)+", "(a|b)+", True),
    ],
)
def test_all_other_characters_of_a_glob_are_literal(glob: str, text: str, is_match: bool) -> None:
    assert bool(glob_pattern(glob).fullmatch(text)) is is_match
