"""Rows longer than `task.max_length`: the plan says which share of the tokens is cut off."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from launcher.driver.prepare import prepare
from tests.support.jobs import make_job

_LONG, _SHORT = " ".join(f"w{i % 200}" for i in range(90)), "w1 w2"


def _notes(folder: Path, model: Path, table: pa.Table, **task: Any) -> list[str]:
    pq.write_table(table, folder / "train.parquet")
    job = make_job(model, {"train": str(folder / "train.parquet")}, folder / "runs", task=task)
    notes = prepare(job, measure=True).plan.notes
    return [note for note in notes if note.startswith("task.max_length")]


@pytest.mark.parametrize(
    ("task", "columns", "expected"),
    [
        # 91 tokens with the end, of which 32 are kept; the others are 3 long.
        ("causal-lm", {"text": [_LONG, _SHORT] * 20}, "about 63 % of the tokens are cut off, as 20 of the 40 rows"),
        ("text-classification", {"text": [_LONG] * 40, "label": ["a", "b"] * 20},
         "about 65 % of the tokens are cut off, as 40 of the 40 rows"),
        ("token-classification", {"text": [_LONG.split()] * 40, "labels": [["O"] * 89 + ["B-x"]] * 40},
         "about 65 % of the tokens are cut off, as 40 of the 40 rows"),
    ],
)  # fmt: skip
def test_the_plan_notes_the_share_that_is_cut_off(
    task: str, columns: dict[str, Any], expected: str, tmp_path: Path, tiny_models: dict[str, Path]
) -> None:
    more = {"text": "text", "label": "labels"} if task == "token-classification" else {}
    (note,) = _notes(tmp_path, tiny_models[task], pa.table(columns), type=task, max_length=32, **more)
    assert expected in note and "looked at have more than 32 (up to 9" in note


def test_the_plan_notes_nothing_if_nothing_is_cut_off(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    table = pa.table({"text": [_SHORT] * 40})
    assert _notes(tmp_path, tiny_models["causal-lm"], table, type="causal-lm", max_length=32) == []


def test_rows_of_a_large_file_are_sampled_everywhere(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    table = pa.table({"text": [_SHORT] * 900 + [_LONG] * 100})
    (note,) = _notes(tmp_path, tiny_models["causal-lm"], table, type="causal-lm", max_length=32)
    assert "of the 256 rows looked at have more than 32" in note
