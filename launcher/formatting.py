"""Values as text for people: cells, names, shares and bytes; URIs without the keys in them. Runs anywhere."""

import re
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
