"""What scores may be of, and what they are called: a run's own splits, or other data. Runs anywhere."""

import re

from launcher.errors import RunError
from launcher.spec.job import NO_NAME, is_name

SPLITS = ("validation", "test")
"""What may be scored of a run's own data: the training stream is no evaluation."""


def check_scores_name(name: str) -> str:
    """A name for `scores-<name>.json`.

    Raises:
        RunError: it is one of the run's own splits, or no file name.
    """
    if name in (*SPLITS, "train"):
        raise RunError(f"--name: {name} is a split of the run itself, whose scores stay; give another name")
    if not is_name(name):
        raise RunError(f"--name: {name} is {NO_NAME}; give one that is")
    return name


def scores_name(location: str) -> str:
    """A name for the scores on some data: the file's or directory's, with its parent's where that says nothing."""
    bare = location.split("://", 1)[-1].split("?", 1)[0] if "://" in location else location.removeprefix("hub:")
    parts = [part for part in re.split(r"[/#]", bare) if part and part not in (".", "..")]
    named = [part for part in parts if not set(part) & set("*[]?")] or ["data"]
    words = [re.sub(r"[^A-Za-z0-9._-]+", "-", part).strip("-._") for part in named]
    is_file = bool(parts) and parts[-1] == named[-1] and "#" not in location
    last = words[-1].rsplit(".", 1)[0].rstrip("-._") if is_file and "." in words[-1] else words[-1]
    if last in (*SPLITS, "train", ""):
        before = words[-2] if len(words) > 1 and words[-2] else "other"
        last = f"{before}-{last or 'data'}"
    return last[:63]
