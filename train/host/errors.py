"""Errors and signals that end a command with a message instead of a traceback."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOPPED = os.EX_TEMPFAIL
"""Exit status, 75, of a run that was stopped and can be resumed ("try again")."""


class StoppedError(Exception):
    """A run was asked to stop, and did.

    Attributes:
      saved: whether a checkpoint has the steps that are done.
      number: of the signal.
      reports: whether this process prints the message: one of several does.
    """

    def __init__(self, step: int, saved: bool, number: int, reports: bool = True):
        self.saved, self.number, self.reports = saved, number, reports
        outcome = (
            "a checkpoint has them: the same command with --resume goes on"
            if saved
            else "they are lost: no checkpoint was asked for, or it could not be saved"
        )
        super().__init__(f"stopped after {step} steps; {outcome}")


@contextmanager
def usage_errors() -> Iterator[None]:
    """Ends the program with the message of an error that a user can put right."""
    with other_processes_missed():
        try:
            yield
        except (ImportError, OSError, ValueError) as error:
            sys.exit(f"error: {message_of(error)}")


@contextmanager
def other_processes_missed() -> Iterator[None]:
    """Ends one of several processes with a message if it waits for another in vain."""
    try:
        yield
    except RuntimeError as error:
        jax = sys.modules.get("jax")  # a command without it has one process
        lost = jax is not None and isinstance(error, jax.errors.JaxRuntimeError)
        if jax is None or not lost or jax.process_count() == 1:
            raise
        sys.exit(
            "error: another process has ended, or cannot be reached: see the output of "
            f"each ({' '.join(str(error).split())[:200]})"
        )


def message_of(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:  # raised by the system
        return f"{error.filename or 'output'}: {error.strerror}"
    return str(error)


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Ends the program with a line and a status for a signal or a stopped run.

    The status is `STOPPED` if the run can be resumed, else 128 plus the signal's
    number, as shells have it.
    """

    def terminate(number: int, _: FrameType | None) -> None:
        print_error(f"{signal.Signals(number).name}: ended")
        sys.exit(128 + number)

    numbers = [signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # else nohup ignores it
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, terminate) for number in numbers}
    try:
        yield
    except KeyboardInterrupt:
        terminate(signal.SIGINT, None)
    except StoppedError as stopped:
        if stopped.reports:
            print_error(str(stopped))
        sys.exit(STOPPED if stopped.saved else 128 + stopped.number)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def print_error(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
