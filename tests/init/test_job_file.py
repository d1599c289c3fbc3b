"""Text of the job file: it means what the draft says, for any names, and is published atomically."""

from pathlib import Path

import pytest
from ruamel.yaml import YAML

from launcher.errors import SpecError
from launcher.init.defaults import Draft, Line
from launcher.init.job_file import check_target, job_name, publish, render, scalar

_ODD = [
    "plain", "with space", "yes", "null", "12", "1e5", "a: b", "# no", "", "ü",
    '"q"', "a\nb", "\x85", "-", "*x", "😀",
]  # fmt: skip


@pytest.mark.parametrize("text", _ODD)
def test_any_text_survives_as_yaml(text: str) -> None:
    assert YAML(typ="safe", pure=True).load(f"key: {scalar(text)}\nin: [{scalar(text)}]") == {"key": text, "in": [text]}


def test_numbers_have_their_usual_form() -> None:
    written = [scalar(value) for value in (2e-5, 3, 0.5, {"a": 0.8}, [1, "x"])]
    assert written == ["2e-5", "3", "0.5", "{a: 0.8}", "[1, x]"]


def _draft(**sections: tuple[Line, ...]) -> Draft:
    base = {
        "task": (Line("type", "causal-lm", "why"), Line("text", "my: column", "c" * 150)),
        "model": (Line("name", "gpt2", "small"),),
        "data": (Line("train", ["a" * 60, "b c"], "two\nfiles"), Line("validation", "PATH", "none", True)),
    }
    return Draft(("From `x\ny`.",), "run", {**base, **sections})


def test_comments_follow_their_values_or_precede_them() -> None:
    assert render(_draft()) == (
        "# From `x y`.\nname: run\n\ntask:\n"
        "  type: causal-lm                   # why\n"
        f"  # {'c' * 116}\n  # {'c' * 34}\n"
        '  text: "my: column"\n\n'
        "model:\n  name: gpt2                        # small\n\n"
        f'data:\n  # two files\n  train:\n    - {"a" * 60}\n    - "b c"\n'
        "  # validation: PATH                # none\n"
    )


def test_published_file_is_the_only_one(tmp_path: Path) -> None:
    publish(_draft(), tmp_path / "new" / "job.yaml", False)
    with pytest.raises(SpecError, match="exists already"):  # as if another process had written it meanwhile
        publish(_draft(), tmp_path / "new" / "job.yaml", False)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["job.yaml"]


def test_invalid_draft_is_not_published(tmp_path: Path) -> None:
    wrong = _draft(train=(Line("epochs", 0, "none"),))
    with pytest.raises(SpecError) as caught:
        publish(wrong, tmp_path / "job.yaml", False)
    assert caught.value.problems[0].startswith(f"{tmp_path}/job.yaml:") and "train.epochs" in caught.value.problems[0]
    assert list(tmp_path.iterdir()) == []


def test_existing_or_impossible_target_is_refused(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("mine")
    for path, reason in (
        (tmp_path / "job.yaml", "exists already; name another file, or --force to replace it"),
        (tmp_path, f"is a directory; name a file in it, {tmp_path}/job.yaml"),
        (tmp_path / "job.yaml" / "x", f"nothing can be written to {tmp_path}/job.yaml; name a file elsewhere"),
    ):
        with pytest.raises(SpecError) as caught:
            check_target(path, False)
        assert caught.value.problems == (f"--output {path}: {reason}",)
    check_target(tmp_path / "job.yaml", True)


@pytest.mark.parametrize(
    ("location", "output", "name"),
    [
        ("data/sst2/train.parquet", "job", "sst2"),
        ("data/my reviews/*.csv", "job", "my-reviews"),
        ("reviews.csv", "job", "reviews"),
        ("data/sst2/", "mine", "mine"),
        ("hub:org/imdb#train", "job", "imdb"),
        ("s3://bucket/texts?region=eu", "job", "texts"),
        ("data/sst2", "ü.1", "1"),
    ],
)
def test_run_is_named_after_the_job_file_or_the_data(location: str, output: str, name: str) -> None:
    assert job_name(location, output) == name
