"""Keys that stand in URIs (`s3://KEY:SECRET@bucket`, signed queries): found, and masked for people. Runs anywhere."""

import re

# A name before a password; of S3 also a key alone. `abfs://container@account` and `hdfs://user@host` are no secrets.
_ACCOUNT = re.compile(r"(\bs3a?://)[^/@\s'\"]+@|(\b[A-Za-z][A-Za-z0-9+.-]*://)[^/@\s:'\"]*:[^/@\s'\"]+@")
_OPTION = re.compile(
    r"([?&][^=&\s'\"]*(?:sig|signature|secret|token|passw(?:or)?d|credential|access_?key|accesskeyid|api_?key)"
    r"[^=&\s'\"]*=)([^&\s'\"#]*[^&\s'\"#:;,.)\]}])",  # not what ends a sentence
    re.IGNORECASE,
)
_MASK = "***"


def masked(text: str) -> str:
    """Return a text without the accounts and keys of the URIs in it."""
    if "://" not in text:
        return text
    bare = _ACCOUNT.sub(lambda found: found.group(1) or found.group(2), text)
    return _OPTION.sub(rf"\g<1>{_MASK}", bare)


def secret_in(text: str) -> str | None:
    """Return what of a text's URIs is a secret, in words; None where nothing is."""
    if "://" not in text:
        return None
    if _ACCOUNT.search(text):
        return "an account"
    found = _OPTION.search(text)
    return f"a key ({found.group(1)[1:-1]})" if found is not None and found.group(2) != _MASK else None
