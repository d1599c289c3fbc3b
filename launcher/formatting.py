"""Formats values for messages (cells, names, fractions, bytes) and masks secrets in URIs. Runs anywhere."""

import re
from collections.abc import Sequence

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
