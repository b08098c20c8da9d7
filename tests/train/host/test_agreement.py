"""Processes that agree, as threads with a service that they share."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from train.host import agreement
from train.host.agreement import ElsewhereError, LostProcessError, Meetings, agree


class Service:
    """What JAX's distributed client has of values by key."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}
        self._changed = threading.Condition()

    def key_value_set(self, key: str, value: str) -> None:
        with self._changed:
            self.values[key] = value
            self._changed.notify_all()

    def key_value_delete(self, key: str) -> None:
        del self.values[key]

    def blocking_key_value_get(self, key: str, timeout_ms: int) -> str:
        with self._changed:
            if not self._changed.wait_for(lambda: key in self.values, timeout_ms / 1e3):
                raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED")
            return self.values[key]


@pytest.fixture
def two(monkeypatch):
    """The service of two processes: a thread's name is the process' index."""
    service = Service()
    state = SimpleNamespace(client=service)
    monkeypatch.setattr(agreement.distributed, "global_state", state)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(
        jax, "process_index", lambda: int(threading.current_thread().name[-1])
    )
    return service


def meet(keys: tuple[list[str], list[str]], timeout_ms: int = 60_000) -> list[list]:
    """Of each process what became of its barriers."""
    monkey = next(agreement._names)

    def visit(own: list[str]) -> list[Exception | None]:
        meetings, found = Meetings(), []
        meetings._name = f"test/{monkey}"
        for key in own:
            try:
                meetings(key=key, timeout_ms=timeout_ms)
            except ElsewhereError as error:
                found.append(error)
            else:
                found.append(None)
        return found

    with ThreadPoolExecutor(2, thread_name_prefix="process") as pool:
        return [x.result() for x in [pool.submit(visit, own) for own in keys]]


def test_barriers_with_the_same_names_let_all_through(two):
    names = ["start", "written", "committed", "start", "written"]
    assert meet((names, names)) == [[None] * 5] * 2
    assert len(two.values) == 4  # those of the last two; others were removed


def test_a_process_that_left_barriers_out_is_noticed_at_once(two):
    begun = time.monotonic()
    well, failed = meet((["start", "written", "committed", "end"], ["start", "end"]))
    assert [x is None for x in well] == [True, False, False, False]
    assert [x is None for x in failed] == [True, False]
    assert "could not write" in str(well[1])
    assert time.monotonic() - begun < 10


def test_a_process_that_does_not_come_is_waited_for_in_vain(two):
    alone, _ = meet((["start", "written"], ["start"]), timeout_ms=100)
    assert alone[0] is None
    assert "did not answer" in str(alone[1])


@pytest.mark.parametrize(
    ("own", "ends", "theirs", "raised"),
    [
        (None, False, 0, None),
        (None, False, 1, ElsewhereError),
        (None, False, 2, LostProcessError),
        (ValueError(), False, 0, ValueError),
        (ValueError(), False, 1, ValueError),
        (ValueError(), False, 2, LostProcessError),
        (ValueError(), True, 2, ValueError),
    ],
)
def test_a_problem_of_one_is_one_of_all(monkeypatch, own, ends, theirs, raised):
    def allgather(row: np.ndarray) -> np.ndarray:
        return np.stack([np.full_like(row, theirs), row])

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(agreement.multihost_utils, "process_allgather", allgather)
    if raised is None:
        agree(own, ends)
        return
    with pytest.raises(raised) as error:
        agree(own, ends)
    if raised is not ValueError:
        assert "process 0" in str(error.value)
