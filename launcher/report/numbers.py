"""How numbers, times, sizes and long texts are written for a reader. Runs anywhere."""

import math
import time


def number(value: float) -> str:
    """A metric or a loss: four decimals near one, fewer for large values, scientific far from one."""
    if not math.isfinite(value):
        return "not finite"
    size = abs(value)
    if value == int(value) and size < 1e15:
        return f"{int(value):,}" if size >= 2 else f"{value:.4f}"
    if size < 1e-3 or size >= 1e9:
        return f"{value:.3e}"
    return f"{value:.4f}" if size < 10 else f"{value:,.2f}"


def short(value: float) -> str:
    """Three significant digits, for the title."""
    if not math.isfinite(value):
        return "not finite"
    if 0.01 <= abs(value) < 1:
        return f"{value:.3f}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """Seconds as the two units a reader thinks in."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 48 * 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def size(num_bytes: int) -> str:
    """Bytes in binary units."""
    value = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit in ("B", "KiB") or value >= 100 else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def clock(seconds: float) -> str:
    """A moment, given in seconds since the epoch, in UTC."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds))


def clip(text: str, limit: int) -> str:
    """The first `limit` characters, with an ellipsis where some are left out."""
    return text if len(text) <= limit else text[: limit - 1].rstrip() + "…"
