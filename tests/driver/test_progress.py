"""Text on the console."""

from io import StringIO
from pathlib import Path
from typing import Any

from rich.console import Console

from launcher.driver.progress import TrainingProgress
from launcher.driver.run import _print_plan
from launcher.formatting import print_line
from launcher.rundir.records import EvaluationRecord
from tests.support.jobs import prepared_job, write_splits


def test_brackets_are_no_markup(tiny_bert: Path, tmp_path: Path) -> None:
    """A path may have brackets, and rich raises for a closing tag that nothing has opened."""
    text = StringIO()
    console = Console(file=text)
    # A file that is named twice is a note with its path.
    path = write_splits(tmp_path / "[data]", train=20)["train"]
    prepared = prepared_job(tiny_bert, {"train": [path, path]}, tmp_path)
    _print_plan(prepared, console)
    values: dict[str, Any] = {"loss": 1.0, "rows": 5, "skipped_rows": 0, "seconds": 1.0, "best": False}
    line = EvaluationRecord(split="validation", step=1, metrics={"[b]/loss": 1.0}, **values)
    TrainingProgress(prepared.plan, console).show(line)
    print_line(console, "a worker stopped: [/data]")
    lines = text.getvalue().splitlines()
    assert f"note: data.train: {path} is named more than once, and its rows count as often" in lines
    assert "validation at step 1: [b]/loss 1.0000  loss 1.0000  (5 rows)" in lines
    assert lines[-1] == "a worker stopped: [/data]"
