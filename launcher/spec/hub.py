"""Datasets of the Hugging Face Hub as a job file writes them (`hub:ORG/NAME#SPLIT`). Pure; runs anywhere."""

from typing import NamedTuple

HUB_PREFIX = "hub:"
_FORMS = "write hub:NAME#SPLIT, hub:ORG/NAME#SPLIT or hub:ORG/NAME/CONFIG#SPLIT"


def is_local_path(name: str) -> bool:
    """Return whether a name must be a local directory, because Hub names are NAME or ORG/NAME."""
    return name.startswith(("/", ".", "~")) or name.count("/") > 1


class HubData(NamedTuple):
    """Arguments of `datasets.load_dataset`."""

    source: str
    """NAME or ORG/NAME on the Hub, or the path of a local directory."""

    config: str | None
    """Configuration of the dataset; None uses its default."""

    split: str | None
    """Split of the dataset; None uses the split that the job file key names: train, validation or test."""


def parse_hub(location: str) -> HubData:
    """Split `hub:...` into its parts. Only slashes separate them, so the same text always means the same data.

    A location that starts with `/`, `.` or `~` is a local directory and has no config.

    Raises:
        ValueError: The location has too many parts or an empty one.
    """
    source, mark, split = location.removeprefix(HUB_PREFIX).partition("#")
    if mark and not split:
        raise ValueError(f"{location} names no split after the #; {_FORMS}")
    if source.startswith(("/", ".", "~")):
        return HubData(source, None, split or None)
    parts = source.split("/")
    if not all(parts):
        raise ValueError(f"{location} has an empty part; {_FORMS}")
    if len(parts) > 3:
        raise ValueError(f"{location} has {len(parts)} parts; {_FORMS}")
    return HubData("/".join(parts[:2]), parts[2] if len(parts) == 3 else None, split or None)
