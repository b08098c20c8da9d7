"""Steps that can be timed, how long they take, and what of."""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax

from train.records.profile import Profile, read_trace, tables


class Steps(NamedTuple):
    """Compiled steps that are taken one after the other.

    Attributes:
      take: starts a step, a refresh or an ordinary one, and returns what to wait for.
      kinds: whether steps are refreshes (`train.run.loop.kinds_of_steps`).
      every: steps from one refresh to the next; None without refreshes.
    """

    take: Callable[[bool], object]
    kinds: list[bool]
    every: int | None

    @property
    def interval(self) -> int | None:
        """`every`, where ordinary steps lie in between; None otherwise."""
        return self.every if len(self.kinds) > 1 else None

    def ordinary(self) -> object:
        """Starts a step of the first kind: an ordinary one, if there are any."""
        return self.take(self.kinds[0])


def seconds(run: Callable[[], object], steps: int = 1) -> float:
    """Seconds for one `run`, which starts work and returns what to wait for.

    Each run needs the one before, so the last result is waited for alone: the others
    may have been donated to the run that came after them, and are deleted then.
    """
    start = time.perf_counter()
    for _ in range(steps - 1):
        run()
    jax.block_until_ready(run())
    return (time.perf_counter() - start) / steps


def median_seconds(run: Callable[[], object], steps: int) -> float:
    """The median of three `seconds`, after one run that does not count."""
    jax.block_until_ready(run())
    return statistics.median(seconds(run, steps) for _ in range(3))


def print_profile(
    title: str, run: Callable[[], object], steps: int, folder: Path | None
) -> Profile:
    """`profile`, printed as tables below a title."""
    found = profile(run, steps, folder)
    print("\n" + tables(title, found), flush=True)
    return found


def profile(run: Callable[[], object], steps: int, folder: Path | None) -> Profile:
    """Steps by their kernels; the profiler's trace is kept if there is a folder."""
    if folder is None:
        with tempfile.TemporaryDirectory() as temporary:
            return profile(run, steps, Path(temporary))
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # it would slow the host
    jax.block_until_ready(run())
    with jax.profiler.trace(folder, profiler_options=options):
        wall = seconds(run, steps)
    return read_trace(folder, steps, 1e3 * wall)
