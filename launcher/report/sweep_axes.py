"""The searched keys as axes of charts: places, parts and names of their values. Pure; client or head."""

import math
from collections.abc import Sequence

from pydantic import JsonValue

from launcher.rundir.trials import SweepRecord, TrialRecord

_PARTS = 8
"""Parts that a range is cut into where cells or colours are wanted."""


def is_range(record: SweepRecord, key: str) -> bool:
    """Whether a key's values are a range rather than a list."""
    return "choice" not in record.space[key]


def is_log(record: SweepRecord, key: str) -> bool:
    """Whether a range is searched evenly on a log scale."""
    return bool({"loguniform", "logint"} & set(record.space[key]))


def axis(record: SweepRecord, trials: Sequence[TrialRecord], key: str) -> list[str]:
    """The names of a key's values or, of a range, of its parts, in order."""
    if not is_range(record, key):
        choice = record.space[key]["choice"]
        assert isinstance(choice, list)
        return [text_of(value) for value in choice]
    return list(dict.fromkeys(_part_name(record, key, i) for i in range(_parts(record, key))))


def _parts(record: SweepRecord, key: str) -> int:
    low, high, whole = _limits(record, key)
    return int(min(_PARTS, high - low + 1)) if whole else _PARTS


def _limits(record: SweepRecord, key: str) -> tuple[float, float, bool]:
    form, ends = next(iter(record.space[key].items()))
    assert isinstance(ends, list)
    low, high = (float(str(end)) for end in ends)
    return low, high, form in ("int", "logint")


def bin_of(record: SweepRecord, key: str, trial: TrialRecord) -> str:
    """The name of the value, or part of the range, that a trial falls into."""
    value = trial.params[key]
    if not is_range(record, key):
        return text_of(value)
    parts = _parts(record, key)
    return _part_name(record, key, min(parts - 1, max(0, int(place_of(record, key, value) * parts))))


def _part_name(record: SweepRecord, key: str, index: int) -> str:
    low, high, whole = _limits(record, key)
    parts = _parts(record, key)
    if whole and parts == high - low + 1:
        return text_of(int(low) + index)
    log = is_log(record, key)
    ends = [low * (high / low) ** (i / parts) if log else low + (high - low) * i / parts for i in (index, index + 1)]
    return f"{ends[0]:.2g} to {ends[1]:.2g}"


def place_of(record: SweepRecord, key: str, value: JsonValue) -> float:
    """Where on a key's axis a value stands, from 0 to 1."""
    if not is_range(record, key):
        choice = record.space[key]["choice"]
        assert isinstance(choice, list)
        return choice.index(value) / max(1, len(choice) - 1)
    low, high, _ = _limits(record, key)
    at, first, last = (math.log(v) if is_log(record, key) else v for v in (float(str(value)), low, high))
    return (at - first) / (last - first)


def ticks(record: SweepRecord, key: str) -> list[tuple[float, str]]:
    """(place, name) of the marks on a key's axis."""
    if is_range(record, key):
        low, high, _ = _limits(record, key)
        return [(0.0, f"{low:g}"), (1.0, f"{high:g}")]
    choice = record.space[key]["choice"]
    assert isinstance(choice, list)
    return [(place_of(record, key, value), text_of(value)) for value in choice]


def text_of(value: JsonValue) -> str:
    """A value in a few characters."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)
