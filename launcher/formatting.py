"""Formats values for messages (cells, names, fractions, bytes), prints them, masks secrets in URIs. Runs anywhere."""

import math
import re
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

_MAX_CHARACTERS = 60
_MAX_NAMES = 20

# USER:PASSWORD@, and for S3 also KEY@ alone. `abfs://container@account` and `hdfs://user@host` are not secrets.
_ACCOUNT = re.compile(r"(\bs3a?://)[^/@\s'\"]+@|(\b[A-Za-z][A-Za-z0-9+.-]*://)[^/@\s:'\"]*:[^/@\s'\"]+@")
_OPTION = re.compile(
    r"([?&][^=&\s'\"]*(?:sig|signature|secret|token|passw(?:or)?d|credential|access_?key|accesskeyid|api_?key)"
    r"[^=&\s'\"]*=)([^&\s'\"#]*[^&\s'\"#:;,.)\]}])",  # without punctuation that ends a sentence
    re.IGNORECASE,
)
_MASK = "***"


def mask_secrets(text: str) -> str:
    """Mask the credentials and keys in the URIs of a text."""
    if "://" not in text:
        return text
    bare = _ACCOUNT.sub(lambda match: match.group(1) or match.group(2), text)
    return _OPTION.sub(rf"\g<1>{_MASK}", bare)


def find_secret(text: str) -> str | None:
    """Describe the secret in a text's URIs, such as `a key (sig)`; None if there is none."""
    if "://" not in text:
        return None
    if _ACCOUNT.search(text):
        return "an account"
    match = _OPTION.search(text)
    # A masked value is no secret: texts pass through here more than once.
    return f"a key ({match.group(1)[1:-1]})" if match is not None and match.group(2) != _MASK else None


def as_text(value: object, column: str) -> str:
    """Return a cell as text. Numbers and dates are converted.

    Raises:
        ValueError: The cell is null, a list, a struct or bytes.
    """
    if value is None:
        raise ValueError(f"{column} is null")
    if isinstance(value, list | dict | bytes):
        raise ValueError(f"{column} is {show_value(value)}, which is not text")
    return str(value)


def show_value(value: object) -> str:
    """Format a cell for a message, shortened if it is long."""
    text = repr(value)
    return text if len(text) <= _MAX_CHARACTERS else text[: _MAX_CHARACTERS - 3] + "..."


def format_percent(share: float) -> str:
    """Format a fraction as percent; below 10 % with two significant digits."""
    return f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.2g} %"


def list_names(names: Sequence[str]) -> str:
    """Join names for a message; of more than 20 only the first, and the count."""
    more = f" ... ({len(names)} in all)" if len(names) > _MAX_NAMES else ""
    return ", ".join(names[:_MAX_NAMES]) + more


def format_bytes(count: int) -> str:
    """Format a number of bytes in GiB, or in MiB below 0.01 GiB."""
    return f"{count / 2**30:.2f} GiB" if not 0 < count < 2**30 / 100 else f"{count / 2**20:.2f} MiB"


def format_number(value: float) -> str:
    """Return a metric or a loss: four decimals near one, fewer for large values, scientific far from one."""
    if not math.isfinite(value):
        return "not finite"
    size = abs(value)
    # int() of infinity raises, hence the check above. Up to 1e15 a float holds every whole number.
    if value == int(value) and size < 1e15:
        return f"{int(value):,}" if size >= 2 else f"{value:.4f}"
    if size < 1e-3 or size >= 1e9:
        return f"{value:.3e}"
    return f"{value:.4f}" if size < 10 else f"{value:,.2f}"


def format_rounded(value: float) -> str:
    """Return a number with three significant digits, for headlines."""
    if not math.isfinite(value):
        return "not finite"
    if 0.01 <= abs(value) < 1:
        return f"{value:.3f}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def format_duration(seconds: float) -> str:
    """Return a duration in its two largest units."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    # Rounded before the comparisons: 59.7 s are 1 min 00 s, not 60 s.
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 48 * 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def format_size(num_bytes: int) -> str:
    """Return bytes in the largest binary unit that fits."""
    value = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit in ("B", "KiB") or value >= 100 else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def format_time(seconds: float) -> str:
    """Return a moment, given in seconds since the epoch, as date and time in UTC."""
    # UTC, because client and nodes may be in different time zones.
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds))


def format_param(value: object, max_chars: int | None = 40) -> str:
    """Return the value of a searched key: floats with three digits, long texts (paths) shortened to their end."""
    text = f"{value:.3g}" if isinstance(value, float) else str(value)
    # The end, because paths of one sweep begin alike.
    return text if max_chars is None or len(text) <= max_chars else f"…{text[1 - max_chars :]}"


def clip(text: str, max_chars: int) -> str:
    """Return at most `max_chars` characters of a text, with an ellipsis in place of the rest."""
    return text if len(text) <= max_chars else text[: max_chars - 1].rstrip() + "…"


def pluralize(count: int, noun: str) -> str:
    """Return a number with its noun: `1 node`, `2 nodes`."""
    return f"{count} {noun}{'s' * (count != 1)}"


def print_line(console: "Console", text: str) -> None:
    """Print text as it is: no markup, which brackets in a path would be, no colors, no wrapping."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)
