"""Signals that ask a run to stop: it ends its step, and can be resumed."""

import os
import signal
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

from train.host.errors import StoppedError, print_error

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Stop:
    """Within its `with` block a first signal asks the run to stop, a second ends it.

    A terminal that is closed may send SIGHUP twice: the second ends nothing. Where it
    is ignored from the start, as by nohup, it stays so.

    Several processes all stop after the same step, whichever got the signal. They agree
    through JAX's preemption service, which listens for SIGTERM and for the notices of
    the clusters that it knows; the other signals are passed on to it. A second
    SIGTERM goes to the service too, and ends nothing sooner; a second Ctrl-C does.
    """

    def __init__(self) -> None:
        self.number: int = signal.SIGTERM
        self._asked = False
        self._together = jax.process_count() > 1
        self._before: dict[signal.Signals, Any] = {}

    def reached(self, step: int) -> bool:
        """Whether to stop now; all processes ask once after every step."""
        if self._together:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._asked

    def error(self, step: int, saved: bool) -> StoppedError:
        """The error that ends the run; one of several processes reports it."""
        return StoppedError(step, saved, self.number, jax.process_index() == 0)

    def __enter__(self) -> "Stop":
        # The preemption service, where there is one, handles SIGTERM.
        for number in SIGNALS[self._together :]:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._receive)
        return self

    def _receive(self, number: int, _: FrameType | None) -> None:
        if self._asked and number == signal.SIGHUP:
            return
        if self._asked:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self._asked, self.number = True, number
        name = signal.Signals(number).name
        print_error(f"{name}: stopping after this step; once more ends it at once")
        if self._together:
            os.kill(os.getpid(), signal.SIGTERM)

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
