"""Agreement of the processes of a run, so that none goes on without the others."""

import itertools

import jax
import numpy as np
from jax._src import distributed  # the client has no public name
from jax.experimental import multihost_utils


class ElsewhereError(Exception):
    """Another process could not do what all must do; this one could."""


class LostProcessError(Exception):
    """Another process had to end."""


def gathered(values: list[int]) -> list[list[int]]:
    """The numbers of every process, as many of each, in the order of the processes."""
    if jax.process_count() == 1:
        return [values]
    return multihost_utils.process_allgather(np.asarray(values, np.int32)).tolist()


def agree(problem: Exception | None, ends: bool = False) -> None:
    """Returns if no process has a problem; all processes call it, and all raise.

    Args:
      problem: of this process.
      ends: whether it ends this process; the others then end too.

    Raises:
      Exception: `problem`, where there is one.
      LostProcessError: on the others, if a process ends.
      ElsewhereError: on the others, if none does.
    """
    each = [row[0] for row in gathered([0 if problem is None else 1 + ends])]
    worst = max(each)
    if worst == 0:
        return
    if problem is not None and (ends or worst == 1):
        raise problem
    where = f"process {each.index(worst)}"
    if worst > 1:
        raise LostProcessError(f"{where} had to end, and so does this; see its output")
    raise ElsewhereError(f"{where} could not; see its output")


_names = itertools.count()


class Meetings:
    """Barriers for orbax (`AsyncOptions.barrier_sync_fn`) that a failure ends at once.

    Every process comes to the same barriers in the same order, unless it failed to
    write, and so left some out. A barrier here is the n-th of each, whatever its name;
    the names are exchanged, and if they differ, this one and all later ones raise an
    error. Orbax's own barriers wait for a name, for twenty minutes.
    """

    def __init__(self) -> None:
        self._name, self._count = f"meetings/{next(_names)}", itertools.count()
        self._apart = False

    def __call__(self, *, key: str, timeout_ms: int) -> None:
        if jax.process_count() == 1:
            return
        client, number = distributed.global_state.client, next(self._count)
        if client is None or self._apart:
            raise ElsewhereError("the processes are no longer in step")
        own = jax.process_index()
        client.key_value_set(f"{self._name}/{number}/{own}", key)
        try:
            others = {
                client.blocking_key_value_get(
                    f"{self._name}/{number}/{process}", timeout_ms
                )
                for process in range(jax.process_count())
            }
        except jax.errors.JaxRuntimeError:
            self._apart = True
            raise ElsewhereError("another process did not answer in time") from None
        if len(others) > 1:
            self._apart = True
            raise ElsewhereError("another process could not write; see its output")
        if number > 1:  # all have read it, or they would not be here
            client.key_value_delete(f"{self._name}/{number - 2}/{own}")
