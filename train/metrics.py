"""Metrics of a run: JSON lines and TensorBoard, one logging interval late."""

import json
import math
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np
from tensorboardX import SummaryWriter

Record = dict[str, Any]
Metrics = Mapping[str, jax.Array]


class MetricsWriter:
    """Appends records to `folder/metrics.jsonl` and `folder/tensorboard`.

    Each line is an object with "step", flushed as it is written; a number that is not
    finite is null. Opening a folder again cuts it off after `step`, the step that the
    run resumes from. Only process 0 writes.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self._lines = self._board = None
        if jax.process_index() == 0:
            path = folder / "metrics.jsonl"
            kept = [r for r in read_metrics(folder) if r["step"] <= step]
            cut = path.with_suffix(".tmp")
            cut.write_text("".join(json.dumps(r) + "\n" for r in kept))
            cut.replace(path)
            self._lines = path.open("a")
            self._board = SummaryWriter(
                str(folder / "tensorboard"), purge_step=step + 1, flush_secs=10
            )

    def write(self, record: Record) -> None:
        if self._lines is None or self._board is None:
            return
        numbers = {k: v if math.isfinite(v) else None for k, v in record.items()}
        self._lines.write(json.dumps(numbers) + "\n")
        self._lines.flush()
        for name, value in numbers.items():
            if name != "step" and value is not None:
                self._board.add_scalar(name, value, record["step"])

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._lines is not None and self._board is not None:
            self._lines.close()
            self._board.close()


def read_metrics(folder: Path) -> list[Record]:
    """The records of `folder/metrics.jsonl`, in order; none if there is no such file.

    A last line that was cut short, when the process was killed, is left out.
    """
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


class Meter:
    """Turns the device's metrics into records without making the device wait.

    `add` keeps what a step returned on the device. `log` closes a record, and returns
    the one before, which is computed by now; `flush` waits for the last one. In a
    record the loss is the mean over its steps, the other metrics are its last step's,
    and the time is the mean since the record before, pauses left out. It ends when the
    device has done the record's last step, which a thread waits for: the host itself is
    some steps ahead by then.
    """

    def __init__(self, step: int, tokens_per_step: int) -> None:
        self._tokens_per_step = tokens_per_step
        self._losses: list[jax.Array] = []
        self._waiter = ThreadPoolExecutor(1)
        self._pending: tuple[int, Future[tuple[Metrics, Any, float]]] | None = None
        self.resume(step)

    def resume(self, step: int) -> None:
        """Start the clock (again): `step` steps are done, and the device is idle."""
        self._since, self._step = time.perf_counter(), step

    def add(self, metrics: Metrics) -> None:
        self._losses.append(metrics["loss"])

    def log(self, step: int, metrics: Metrics) -> Record | None:
        record = self.flush()
        self._pending = step, self._waiter.submit(_fetched, metrics, self._losses)
        self._losses = []
        return record

    def flush(self) -> Record | None:
        if self._pending is None:
            return None
        step, fetched = self._pending
        metrics, losses, when = fetched.result()
        self._pending = None
        seconds = (when - self._since) / (step - self._step)
        self._since, self._step = when, step
        return {
            "step": step,
            **{name: value.item() for name, value in metrics.items()},
            "loss": float(np.mean(losses, dtype=np.float64)),
            "ms_per_step": seconds * 1e3,
            "tokens_per_s": self._tokens_per_step / seconds,
        }


def _fetched(metrics: Metrics, losses: list[jax.Array]) -> tuple[Metrics, Any, float]:
    """Both on the host, and when they were there."""
    on_host = jax.device_get((metrics, losses))
    return *on_host, time.perf_counter()
