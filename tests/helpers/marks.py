"""Marks for the tests that `-m "not slow"` leaves out."""

from collections.abc import Iterable
from typing import Any

import pytest


def slow_but(quick: Iterable[str], names: Iterable[str]) -> list[Any]:
    """The names as parameters, all but `quick` for the whole suite alone."""
    chosen = {*quick}
    return [
        name if name in chosen else pytest.param(name, marks=pytest.mark.slow)
        for name in names
    ]
