"""Passwords in URLs, which would stand in a run's folder for all to read."""

import re

_PASSWORD = re.compile(r"//[^/?#\s]*:[^/?#\s]*@")
_QUERY = re.compile(
    r"[?&][^=&]*(token|secret|password|passwd|signature|sig|credential|key)[^=&]*=",
    re.IGNORECASE,
)


def check_no_password(flag: str, name: str | None) -> None:
    """ValueError for a URL with a password or an access token; does not repeat it."""
    if name is None or "//" not in name:
        return
    if _PASSWORD.search(name) or _QUERY.search(name):
        raise ValueError(
            f"{flag}: the URL has a password or an access token, which would be stored "
            "beside the run: take it out, and give it by the environment (as "
            "FSSPEC_FTP_PASSWORD, or what the store's own tools read) or in a file "
            "that only you can read (~/.config/fsspec/conf.json, ~/.netrc)"
        )
