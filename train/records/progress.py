"""Progress of a run on the screen: a bar on a terminal, lines elsewhere."""

import math
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType

import jax
from tqdm import tqdm

from train.host.console import say
from train.records.metrics import Metrics, Record


class Progress:
    """Shows the steps of a run, in process 0.

    A bar if the error output is a terminal. If it is not, or the output is none (a
    file, a pipe), every record is a line of the output. The bar counts the steps that
    the device has done, which a thread waits for: the host is some steps ahead. Its
    rate leaves out the first step, which loads the program.
    """

    def __init__(self, name: str, start: int, last: int) -> None:
        bar, lines = sys.stderr.isatty(), sys.stdout.isatty()
        main = jax.process_index() == 0
        self._name, self._start, self._last = name, start, last
        self._lines = main and not (bar and lines)
        self._waiter = ThreadPoolExecutor(1)
        self._bar = tqdm(
            desc=name,
            initial=start,
            total=last,
            unit="step",
            smoothing=0,  # the mean of all steps
            disable=not (main and bar),
        )

    def step(self, metrics: Metrics) -> None:
        """Counts a step of the device once its metrics are there."""
        if not self._bar.disable:
            self._waiter.submit(self._done, metrics["loss"])

    def _done(self, loss: jax.Array) -> None:
        loss.block_until_ready()
        if self._bar.n == self._start:
            self._bar.initial = self._start + 1
            self._bar.start_t = self._bar.last_print_t = time.time()
        self._bar.update()

    def record(self, record: Record) -> None:
        """Shows the metrics since the record before."""
        losses = {"loss": f"{record['loss']:.3f}"}
        if "eval_loss" in record:
            losses["held-out"] = f"{record['eval_loss']:.3f}"
        self._bar.set_postfix(losses, refresh=False)
        if self._lines:
            say(f"{self._name}: {line(record, self._last)}")

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._waiter.shutdown(cancel_futures=kind is not None)
        self._bar.close()


def line(record: Record, last: int) -> str:
    """Formats "step 20/300, loss 5.123, learning rate 2e-03, 9000 tokens/s"."""
    parts = [
        f"step {record['step']}/{last}",
        f"loss {record['loss']:.4f}",
        f"learning rate {record['learning_rate']:.3g}",
    ]
    if math.isfinite(record["tokens_per_s"]):
        parts.append(f"{record['tokens_per_s']:.0f} tokens/s")
    if "eval_loss" in record:
        parts.append(f"held-out loss {record['eval_loss']:.4f}")
    if record["skipped"]:
        parts.append(f"{record['skipped']} skipped")
    return ", ".join(parts)
