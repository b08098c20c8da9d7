"""Marks for the tests that `-m "not slow"` leaves out."""

from collections.abc import Iterable
from typing import Any

import pytest

# Left out by .ci/run too: what another test shows of one method or setting, of others.
NIGHTLY = [pytest.mark.slow, pytest.mark.nightly]


def slow_but(
    quick: Iterable[str], names: Iterable[str], slow: Iterable[str] = ()
) -> list[Any]:
    """The names as parameters, all but `quick` and `slow` for the nightly run alone."""
    marks: dict[str, Any] = {**dict.fromkeys(slow, pytest.mark.slow)}
    marks |= dict.fromkeys(quick, ())
    return [pytest.param(name, marks=marks.get(name, NIGHTLY)) for name in names]
