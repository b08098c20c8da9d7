"""Signals: the step at hand is ended, and the run can go on where it stopped."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

STOPPED = os.EX_TEMPFAIL
"""Exit status, 75, of a run that was stopped and can be resumed ("try again")."""

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StoppedError(Exception):
    """A run was asked to stop, and did.

    Attributes:
      step: how many steps were done.
      saved: whether a checkpoint has them.
      number: of the signal.
    """

    def __init__(self, step: int, saved: bool, number: int) -> None:
        self.step, self.saved, self.number = step, saved, number
        kept = (
            "a checkpoint has them: the same command with --resume goes on"
            if saved
            else "they are lost: no checkpoint was asked for, or it could not be saved"
        )
        super().__init__(f"stopped after {step} steps; {kept}")


class Stop:
    """Within its `with` block a first signal asks the run to stop, a second ends it.

    Of several processes all stop after the same step, whichever was told: they agree on
    it through JAX's preemption service, which listens for SIGTERM itself and for the
    notices of clusters that it knows; an interrupt (Ctrl-C) is handed on to it. A
    second SIGTERM is the service's too, and ends nothing sooner; a second Ctrl-C does.
    """

    def __init__(self) -> None:
        self.number: int = signal.SIGTERM
        self._asked = False
        self._together = jax.process_count() > 1
        self._before: dict[signal.Signals, Any] = {}

    def reached(self, step: int) -> bool:
        """Whether to stop now; asked once after every step, by all processes."""
        if self._together:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._asked

    def __enter__(self) -> "Stop":
        # SIGTERM is the preemption service's where there is one.
        for number in SIGNALS[self._together :]:
            self._before[number] = signal.signal(number, self._hear)
        return self

    def _hear(self, number: int, _: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self._asked:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self._asked, self.number = True, number
        _say(f"{name}: stopping after this step; once more ends it at once")
        if self._together:
            os.kill(os.getpid(), signal.SIGTERM)

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """A signal, or a run that stopped, ends the program with a line and a status.

    128 and the signal's number, as shells have it, where there is nothing to go on
    with; else `STOPPED`.
    """

    def terminate(number: int, _: FrameType | None) -> None:
        _say(f"{signal.Signals(number).name}: ended")
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except KeyboardInterrupt:
        terminate(signal.SIGINT, None)
    except StoppedError as stopped:
        if jax.process_index() == 0:
            _say(str(stopped))
        sys.exit(STOPPED if stopped.saved else 128 + stopped.number)
    finally:
        signal.signal(signal.SIGTERM, before)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
