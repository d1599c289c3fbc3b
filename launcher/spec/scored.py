"""Names of evaluation results (`scores-NAME.json`), of a run's own splits or of other data. Runs anywhere."""

import re

from launcher.errors import RunError
from launcher.spec.job import INVALID_NAME, is_name

EVALUATION_SPLITS = ("validation", "test")
"""Splits of a run's own data that can be evaluated; the training split cannot."""


def check_scores_name(name: str) -> str:
    """Validate a name for `scores-<name>.json` and return it.

    Raises:
        RunError: The name is one of the run's own splits, or not a valid file name.
    """
    if name in (*EVALUATION_SPLITS, "train"):
        raise RunError(f"--name: {name} is a split of the run, and its scores are not overwritten; give another name")
    if not is_name(name):
        raise RunError(f"--name: {name} is {INVALID_NAME}; give one that is")
    return name


def scores_name(location: str) -> str:
    """Name the scores after the file or directory of the data, with its parent if that is just the name of a split."""
    # Without the query: it may hold a key, and the name becomes that of a file.
    bare = location.split("://", 1)[-1].split("?", 1)[0] if "://" in location else location.removeprefix("hub:")
    parts = [part for part in re.split(r"[/#]", bare) if part and part not in (".", "..")]
    named = [part for part in parts if not set(part) & set("*[]?")] or ["data"]
    words = [re.sub(r"[^A-Za-z0-9._-]+", "-", part).strip("-._") for part in named]
    is_file = bool(parts) and parts[-1] == named[-1] and "#" not in location
    last = words[-1].rsplit(".", 1)[0].rstrip("-._") if is_file and "." in words[-1] else words[-1]
    if last in (*EVALUATION_SPLITS, "train", ""):
        before = words[-2] if len(words) > 1 and words[-2] else "other"
        last = f"{before}-{last or 'data'}"
    # The limit of a name (`is_name`), which the result has to pass.
    return last[:63]
