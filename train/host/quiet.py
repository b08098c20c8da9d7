"""Silences what orbax and tensorstore print of errors that they also raise."""

import gc
import logging
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any


@contextmanager
def quiet() -> Iterator[None]:
    """Suppresses a page of text for each array of a damaged or unsaved checkpoint.

    That is orbax's own log of an error, complaints of the other tasks of an event loop
    that an error ended, and of threads that find this loop closed. A task complains
    when it is collected, which can be later: orbax's tasks stay silent for good.
    """
    tasks, log = logging.getLogger("asyncio"), logging.getLogger("absl")
    hook = sys.unraisablehook
    tasks.disabled, sys.unraisablehook = True, partial(_unless_closed, hook)
    tasks.addFilter(_unless_orbax_task)
    log.addFilter(_unless_orbax)
    try:
        yield
    finally:
        gc.collect()
        tasks.disabled, sys.unraisablehook = False, hook
        log.removeFilter(_unless_orbax)


def _unless_closed(hook: Callable[[Any], Any], raised: Any) -> None:
    if str(raised.exc_value) != "Event loop is closed":
        hook(raised)


def _unless_orbax(entry: logging.LogRecord) -> bool:
    return entry.levelno < logging.ERROR or "orbax" not in entry.pathname


def _unless_orbax_task(entry: logging.LogRecord) -> bool:
    """False for a task of orbax; the message names the file of its function."""
    return not re.search(r"defined at \S*\borbax\b", entry.getMessage())
