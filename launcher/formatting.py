"""Values as text for people: cells, names, shares and bytes; URIs without the keys in them. Runs anywhere."""

import math
import re
import time
from collections.abc import Sequence

_LONGEST_SHOWN, _MOST_SHOWN = 60, 20

# A name before a password; of S3 also a key alone. `abfs://container@account` and `hdfs://user@host` are no secrets.
_ACCOUNT = re.compile(r"(\bs3a?://)[^/@\s'\"]+@|(\b[A-Za-z][A-Za-z0-9+.-]*://)[^/@\s:'\"]*:[^/@\s'\"]+@")
_OPTION = re.compile(
    r"([?&][^=&\s'\"]*(?:sig|signature|secret|token|passw(?:or)?d|credential|access_?key|accesskeyid|api_?key)"
    r"[^=&\s'\"]*=)([^&\s'\"#]*[^&\s'\"#:;,.)\]}])",  # not what ends a sentence
    re.IGNORECASE,
)
_MASK = "***"


def mask_secrets(text: str) -> str:
    """Return a text without the accounts and keys of the URIs in it."""
    if "://" not in text:
        return text
    bare = _ACCOUNT.sub(lambda found: found.group(1) or found.group(2), text)
    return _OPTION.sub(rf"\g<1>{_MASK}", bare)


def find_secret(text: str) -> str | None:
    """Return what of a text's URIs is a secret, in words; None where nothing is."""
    if "://" not in text:
        return None
    if _ACCOUNT.search(text):
        return "an account"
    found = _OPTION.search(text)
    return f"a key ({found.group(1)[1:-1]})" if found is not None and found.group(2) != _MASK else None


def as_text(value: object, column: str) -> str:
    """A cell as text; numbers and dates are written out, what is no text is not.

    Raises:
        ValueError: it is null, a list, a struct or bytes.
    """
    if value is None:
        raise ValueError(f"{column} is null")
    if isinstance(value, list | dict | bytes):
        raise ValueError(f"{column} is {show_value(value)}, which is not text")
    return str(value)


def show_value(value: object) -> str:
    """A cell as a message can bear it."""
    text = repr(value)
    return text if len(text) <= _LONGEST_SHOWN else text[: _LONGEST_SHOWN - 3] + "..."


def format_percent(share: float) -> str:
    """Return a share for a message, small ones with two digits."""
    return f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.2g} %"


def list_names(names: Sequence[str]) -> str:
    """Names for a message: all, or the first of many and how many there are."""
    more = f" ... ({len(names)} in all)" if len(names) > _MOST_SHOWN else ""
    return ", ".join(names[:_MOST_SHOWN]) + more


def format_bytes(count: int) -> str:
    """Return bytes for people; less than a hundredth of a GiB in MiB."""
    return f"{count / 2**30:.2f} GiB" if not 0 < count < 2**30 / 100 else f"{count / 2**20:.2f} MiB"


def format_number(value: float) -> str:
    """Return a metric or a loss: four decimals near one, fewer for large values, scientific far from one."""
    if not math.isfinite(value):
        return "not finite"
    size = abs(value)
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
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds))


def format_param(value: object, max_chars: int | None = 40) -> str:
    """Return the value of a searched key: floats with three digits, long texts (paths) shortened to their end."""
    text = f"{value:.3g}" if isinstance(value, float) else str(value)
    return text if max_chars is None or len(text) <= max_chars else f"…{text[1 - max_chars :]}"


def clip(text: str, max_chars: int) -> str:
    """Return at most `max_chars` characters of a text, with an ellipsis in place of the rest."""
    return text if len(text) <= max_chars else text[: max_chars - 1].rstrip() + "…"
