"""Metrics of a run: JSON lines and TensorBoard, one logging interval late."""

import json
import math
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from train.host.atomic import Appender
from train.host.console import warn
from train.host.paths import AnyPath
from train.records.tensorboard import Board, Record
from train.records.tracking import Tracking

Metrics = Mapping[str, jax.Array]


class MetricsWriter:
    """Appends records to `folder/metrics.jsonl`, `folder/tensorboard` and trackers.

    Each line is an object with "step", and is on the disk when it is written; a number
    that is not finite is null. Opening a folder again truncates it after `step`, the
    step that the run resumes from. Only process 0 writes. If a record cannot be written
    (a full disk), the run goes on: a warning is printed once, and the record is written
    later. A tracker also gets those records up to `step` that it has not.
    """

    def __init__(
        self, folder: AnyPath, step: int, trackers: Sequence[Tracking] = ()
    ) -> None:
        self._outputs: list[_Output] = []
        if jax.process_index() == 0:
            lines = _Lines(folder / "metrics.jsonl", step)
            board = Board(folder / "tensorboard", purge_step=step + 1)
            self._outputs = [_Output(lines), _Output(board)]
            # A bucket's file has later records until it is written again.
            earlier = [x for x in read_metrics(folder) if x["step"] <= step]
            for tracker in trackers:
                self._outputs.append(_Output(tracker))
                self._outputs[-1].write(*earlier)

    def write(self, record: Record) -> None:
        numbers = {k: v if math.isfinite(v) else None for k, v in record.items()}
        for output in self._outputs:
            output.write(numbers)

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_: object) -> None:
        for output in self._outputs:
            output.close()


class _Output:
    """An output, and the records that are still to be written there."""

    def __init__(self, target: "_Lines | Board | Tracking") -> None:
        self._target = target
        self._waiting: list[Record] = []
        self._warned = False

    def write(self, *records: Record) -> None:
        self._waiting += records
        try:
            self._target.append(self._waiting)
        except OSError as error:
            if not self._warned:
                warn(
                    f"{self._target.path} cannot be written ({error.strerror}); the "
                    "run goes on, and it is written when that is possible"
                )
            self._warned = True
        else:
            self._waiting = []

    def close(self) -> None:
        if self._waiting:
            self.write()
        if self._waiting:
            steps = [record["step"] for record in self._waiting]
            warn(f"{self._target.path} lacks the records of the steps {steps}")


class _Lines:
    """A file of JSON lines."""

    def __init__(self, path: AnyPath, step: int) -> None:
        self.path = path
        self._file = Appender(path, _size_up_to(path, step) if path.exists() else 0)

    def append(self, records: Sequence[Record]) -> None:
        self._file.append(b"".join(json.dumps(r).encode() + b"\n" for r in records))


def _size_up_to(path: AnyPath, step: int) -> int:
    """Bytes of the lines before a later step's record or a truncated line."""
    size = 0
    with path.open("rb") as file:
        for line in file:
            record = _parsed(line)
            if not line.endswith(b"\n") or (record and record["step"] > step):
                break
            size += len(line)
    return size


def _parsed(line: bytes) -> Record | None:
    try:
        record = json.loads(line)
        return record if isinstance(record["step"], int) else None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def read_metrics(folder: AnyPath) -> list[Record]:
    """The records of `folder/metrics.jsonl`, in order; none if there is no such file.

    Lines that are no record are left out, such as one truncated when the process was
    killed.
    """
    path = folder / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    records = [_parsed(line) for line in lines if line.endswith(b"\n")]
    return [record for record in records if record is not None]


def mean_ms(records: Sequence[Record]) -> float | None:
    """The mean time of a step, each record's weighing as its steps; None if unknown."""
    steps = [0, *(record["step"] for record in records)]
    known = [
        (step - before, record["ms_per_step"])
        for record, before, step in zip(records, steps, steps[1:], strict=False)
        if record.get("ms_per_step") is not None
    ]
    return sum(n * ms for n, ms in known) / sum(n for n, _ in known) if known else None


def is_healthy(record: Record) -> bool:
    """Whether a record's losses are finite, and its step was taken."""
    losses = [record[x] for x in ("loss", "eval_loss") if x in record]
    finite = all(x is not None and math.isfinite(x) for x in losses)
    return finite and record.get("skipped_in_a_row", 0) == 0


class Meter:
    """Turns the device's metrics into records without making the device wait.

    `add` stores a step's metrics on the device. `log` closes a record, and returns the
    one before, which is computed by now; `flush` waits for the last one. In a record
    the loss is the mean over its steps, other metrics are those of its last step, and
    the time is the mean since the record before, pauses left out. The time begins after
    the first step of each kind, which also loads its program: that one is waited for. A
    record without another step has NaN for a time. A thread waits for the end of the
    record's last step on the device, as the host is some steps ahead.
    """

    def __init__(
        self, step: int, tokens_per_step: int, losses: Sequence[float] = ()
    ) -> None:
        self._tokens_per_step = tokens_per_step
        self._losses: list[Any] = list(losses)
        self._waiter = ThreadPoolExecutor(1)
        self._pending: tuple[int, Future[tuple[Metrics, Any, float]]] | None = None
        self._loaded: dict[bool, tuple[int, float]] = {}
        self._added = step
        self.resume(step)

    def resume(self, step: int) -> None:
        """Starts the clock (again): `step` steps are done, and the device is idle."""
        self._since, self._step = time.perf_counter(), step

    def add(self, metrics: Metrics, refresh: bool = False) -> None:
        """Takes the metrics of the next step, which was a refresh or not."""
        self._losses.append(metrics["loss"])
        self._added += 1
        if refresh not in self._loaded:
            jax.block_until_ready(metrics["loss"])
            self._loaded[refresh] = self._added, time.perf_counter()

    @property
    def losses(self) -> list[float]:
        """The losses of the steps since the last closed record; waits for them."""
        return [float(x) for x in jax.device_get(self._losses)]

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
        starts = [(self._step, self._since), *self._loaded.values()]
        before, since = max(start for start in starts if start[0] <= step)
        seconds = (when - since) / (step - before) if before < step else math.nan
        self._since, self._step = when, step
        return {
            "step": step,
            **{name: value.item() for name, value in metrics.items()},
            "loss": float(np.mean(losses, dtype=np.float64)),
            "ms_per_step": seconds * 1e3,
            "tokens_per_s": self._tokens_per_step / seconds,
        }


def _fetched(metrics: Metrics, losses: list[jax.Array]) -> tuple[Metrics, Any, float]:
    """Both on the host, and the time when they arrived."""
    on_host = jax.device_get((metrics, losses))
    return *on_host, time.perf_counter()
