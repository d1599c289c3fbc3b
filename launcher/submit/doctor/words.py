"""Figures and names as the doctor says them. Pure; runs on the client."""

from collections.abc import Iterable

_SHOWN = 4


def some(names: Iterable[str], shown: int = _SHOWN) -> str:
    """The first names, and how many more."""
    listed = list(names)
    more = f" and {len(listed) - shown} more" if len(listed) > shown else ""
    return ", ".join(listed[:shown]) + more


def size(num_bytes: float) -> str:
    """Bytes in the unit that keeps the number short."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(num_bytes) < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" or num_bytes >= 100 else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"


def speed(bytes_per_s: float) -> str:
    """As networks are sold by it: MB/s and GB/s of 1000."""
    if bytes_per_s < 999.5e6:
        return f"{bytes_per_s / 1e6:.0f} MB/s" if bytes_per_s >= 10e6 else f"{bytes_per_s / 1e6:.1f} MB/s"
    return f"{bytes_per_s / 1e9:.1f} GB/s"


def span(low: str, high: str) -> str:
    """A range of two figures, one where they read the same."""
    return low if low == high else f"{low} to {high}"


def duration(seconds: float) -> str:
    """Seconds, or milliseconds where they are few."""
    return f"{seconds:.1f} s" if abs(seconds) >= 1 else f"{seconds * 1000:.1f} ms"
