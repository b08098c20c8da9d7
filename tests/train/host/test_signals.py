"""Signals, to a process of their own."""

import os
import signal
import subprocess
import sys

import pytest

from tests.helpers.repository import ROOT

START = """
import signal
from train.host.errors import StoppedError, ended_by_signals
from train.host.signals import Stop
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whatever the tests inherited
"""


def ended(program: str) -> tuple[int, str]:
    """The exit status, and what was said."""
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    process = subprocess.run(
        [sys.executable, "-c", START + program],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
    )
    return process.returncode, process.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_at_once(number):
    program = f"""
with Stop() as stop:
    assert not stop.reached(1)
    signal.raise_signal({int(number)})
    assert stop.reached(2)
    print("still here", flush=True)
    signal.raise_signal({int(number)})
    raise AssertionError("not ended")
"""
    status, said = ended(program)
    assert status == -number
    assert said == (
        f"{number.name}: stopping after this step; once more ends it at once\n"
    )


@pytest.mark.parametrize(("saved", "status"), [(True, 75), (False, 130)])
def test_the_status_says_whether_it_can_go_on(saved, status):
    program = f"""
with ended_by_signals():
    raise StoppedError(7, {saved}, signal.SIGINT)
"""
    found, said = ended(program)
    assert found == status
    assert said.startswith("stopped after 7 steps; ")
    assert ("--resume goes on" in said) == saved


def test_a_terminal_that_is_closed_asks_once():
    program = """
with Stop() as stop:
    signal.raise_signal(signal.SIGHUP)
    signal.raise_signal(signal.SIGHUP)  # of the shell and of the system
    assert stop.reached(1) and stop.number == signal.SIGHUP
"""
    status, said = ended(program)
    assert status == 0
    assert said.count("SIGHUP: stopping after this step") == 1


def test_a_closed_terminal_is_ignored_under_nohup():
    program = """
signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup leaves it
with ended_by_signals(), Stop() as stop:
    signal.raise_signal(signal.SIGHUP)
    assert not stop.reached(1)
"""
    assert ended(program) == (0, "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_outside_of_the_steps_a_signal_ends_with_a_line(number):
    program = f"""
with ended_by_signals():
    signal.raise_signal({int(number)})
"""
    assert ended(program) == (128 + number, f"{number.name}: ended\n")
