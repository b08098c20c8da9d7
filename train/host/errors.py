"""Errors that end a command with a message instead of a traceback."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def usage_errors() -> Iterator[None]:
    """What a user can put right ends the program with its message, no traceback."""
    try:
        yield
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"error: {said(error)}")


def said(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:  # the system's own
        return f"{error.filename}: {error.strerror}"
    return str(error)
