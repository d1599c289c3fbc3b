"""Data files opened as a job opens them."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from launcher.data.convert import splittable_files
from launcher.data.splits import Split, open_files
from launcher.tasks.params import ColumnKind


def open_data(
    *locations: "Path | str", cache: Path, kinds: dict[str, ColumnKind] | None = None, format: str = "auto"
) -> Split:
    """Open a training split, converting the files without footers.

    Args:
        locations: Files, directories, globs or names of the Hub.
        cache: Directory for converted files.
        kinds: Kinds of the columns that the task reads; None if no task is chosen yet.
        format: Format of all files, or `auto`.
    """
    ready = splittable_files("train", [str(location) for location in locations], format, str(cache), kinds)
    return open_files("train", ready, kinds=kinds)


def read_all(split: Split, *columns: str) -> pa.Table:
    """Read all rows of a split, of some columns or of all."""
    return split.read(np.arange(split.rows), list(columns) or split.schema.names)


def use_own_hub_cache(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Give `datasets` a cache below `folder`, and silence its progress bars."""
    import datasets

    monkeypatch.setenv("HF_HOME", str(folder / "hf"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "hf" / "datasets")
    datasets.disable_progress_bars()
