"""Data sets of the Hugging Face hub as they are written in a job file. Pure; runs anywhere."""

from typing import NamedTuple

PREFIX = "hub:"
_FORMS = "write hub:NAME#SPLIT, hub:ORG/NAME#SPLIT or hub:ORG/NAME/CONFIG#SPLIT"


def is_path(name: str) -> bool:
    """Whether a name can be none on the hub, which is NAME or ORG/NAME, so that it must be a local directory."""
    return name.startswith(("/", ".", "~")) or name.count("/") > 1


class HubData(NamedTuple):
    """What `datasets.load_dataset` is asked for."""

    source: str
    """NAME or ORG/NAME on the hub, or the path of a local directory."""

    config: str | None
    """One of the data set's configurations; None takes its default."""

    split: str | None
    """None takes the split that the job file asks for: train, validation or test."""


def parse_hub(location: str) -> HubData:
    """The parts of `hub:...`; slashes alone tell them, so that the same text always means the same data.

    What starts with `/`, `.` or `~` is a local directory and has no config.

    Raises:
        ValueError: the text has too many parts or an empty one.
    """
    source, mark, split = location.removeprefix(PREFIX).partition("#")
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
