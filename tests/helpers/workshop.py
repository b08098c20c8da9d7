"""Real runs in processes of their own, to do faults to."""

import contextlib
import functools
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from train.records.metrics import Record, read_metrics
from train.run.checkpoint import stored_checksums

PATIENCE_S = 240
"""A process that has not ended by then hangs."""

TIMES = {"ms_per_step", "tokens_per_s"}
STEPS, SAVE_EVERY = 40, 4
FLAGS = (
    *("--optimizer", "grass_jump", "--rank", "8", "--refresh-every", "7"),
    *("--layerwise", "on"),
    *("--steps", str(STEPS), "--batch-size", "8", "--seq-len", "16"),
    *("--log-every", "3", "--eval-every", "20", "--checkpoint-every", str(SAVE_EVERY)),
    *("--vocab-size", "300", "--weight-decay", "0.1", "--sample-tokens", "0"),
)

# Two processes on one machine wait for each other a hundred times in a step.
FEWER = ("--steps", "20", "--eval-every", "10")

Outcome = str | None
"""What went wrong, if anything did."""

_context = multiprocessing.get_context("forkserver")


def devices_flag(devices: int) -> str:
    """What makes a CPU so many devices, in XLA_FLAGS."""
    return f"--xla_force_host_platform_device_count={devices}"


def _trainer(
    argv: Sequence[str], log: Path, devices: int, before: Callable[[], object]
) -> None:
    os.environ["XLA_FLAGS"] = devices_flag(devices)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    before()
    from train.main import main

    try:
        main(argv)
    except SystemExit as end:  # this, and then that, Python does at its own end
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr, flush=True)
            end.code = 1
        raise
    finally:
        if jax.distributed.is_initialized():
            jax.distributed.shutdown()


class Run:
    """A trainer in a process of its own, in a folder.

    `devices` are a CPU's; `before`, of a module, is called in the process first.
    """

    def __init__(
        self,
        work: "Workshop",
        out: Path,
        *flags: str,
        devices: int = 1,
        before: Callable[[], object] = bool,
    ) -> None:
        work.count += 1
        self.out, self._log = out, work.folder / f"{work.count}.log"
        argv = [*FLAGS, *work.data, "--out", str(out), *flags]
        args = (argv, self._log, devices, before)
        self._process = _context.Process(target=_trainer, args=args)
        self._process.start()

    @property
    def log(self) -> str:
        return self._log.read_text() if self._log.exists() else ""

    @property
    def alive(self) -> bool:
        return self._process.is_alive()

    def wait_for(self, step: int) -> None:
        """Until a record of a step from `step` on is there, or the process is not."""
        end = time.monotonic() + PATIENCE_S
        while self.alive and last_step(self.out) < step and time.monotonic() < end:
            time.sleep(0.005)

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid or 0, number)

    def end(self, patience: float = PATIENCE_S) -> int | None:
        """The exit status; None for a process that hung, and was killed."""
        self._process.join(patience)
        if self.alive:
            self._process.kill()
            self._process.join()
            return None
        return self._process.exitcode

    def wrong(self, status: int | None, *expected: int) -> Outcome:
        if status is None:
            return f"hung\n{self.log}"
        if status not in expected:
            return f"status {status}\n{self.log}"
        if "Traceback" in self.log and signal.SIGKILL not in map(abs, expected):
            return f"a traceback\n{self.log}"
        return None


def last_step(out: Path) -> int:
    records = read_metrics(out) if out.exists() else []
    return records[-1]["step"] if records else 0


def without_times(out: Path) -> list[Record]:
    return [{k: v for k, v in r.items() if k not in TIMES} for r in read_metrics(out)]


class Bits(NamedTuple):
    """What a finished run computed: every record, and every bit of the last state."""

    records: list[Record]
    seals: dict[str, Any]


def bits(out: Path) -> Bits:
    records = without_times(out)
    return Bits(
        records, stored_checksums(out / "checkpoints" / str(records[-1]["step"]))
    )


class Workshop:
    """A folder with a text, and runs on it that were left alone."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.count = folder, 0
        self.random = random.Random(seed)
        self.text = folder / "text.jsonl"
        write_text(self.text)
        self.data = (
            *("--source", str(self.text), "--cache-dir", str(folder / "cache")),
        )

    @functools.cached_property
    def alone(self) -> Path:
        """The folder of a run."""
        return self.finished_in(self.folder / "alone")

    @functools.cached_property
    def bits(self) -> Bits:
        return bits(self.alone)

    @functools.cached_property
    def bits_of_two(self) -> Bits:
        """Of a run of two processes: two devices add up a gradient in another order."""
        out = self.folder / "two"
        return bits(left_alone(out, *two(self, out)))

    def finished_in(self, out: Path, *flags: str, devices: int = 1) -> Path:
        """The folder, in which a run has come to its end."""
        return left_alone(out, Run(self, out, *flags, devices=devices))

    def fresh(self, name: str = "run") -> Path:
        out = self.folder / name
        shutil.rmtree(out, ignore_errors=True)
        return out

    def finished(self, out: Path) -> Outcome:
        """Whether a run in `out` goes on to its end, to the bits of the one alone."""
        run = Run(self, out, "--resume")
        return run.wrong(run.end(), 0) or same(out, self.bits)


def left_alone(out: Path, *runs: Run) -> Path:
    for run in runs:
        if problem := run.wrong(run.end(), 0):
            raise RuntimeError(f"a run that was left alone: {problem}")
    return out


def same(out: Path, expected: Bits) -> Outcome:
    found = bits(out)
    if found.records != expected.records:
        return "other metrics than the run that was left alone"
    if found.seals != expected.seals:
        return "another state than the run that was left alone"
    return None


def alike(out: Path, expected: Bits) -> Outcome:
    """Whether losses are the same to rounding, which 20 steps make no larger."""
    pairs = zip(without_times(out), expected.records, strict=True)
    far = [a["step"] for a, b in pairs if abs(a["loss"] - b["loss"]) > 1e-3]
    return f"other losses at steps {far}" if far else None


def write_text(path: Path) -> None:
    draw = random.Random(0)
    words = ["".join(draw.choices("aeioubcdfg", k=5)) for _ in range(200)]
    texts = [" ".join(draw.choices(words, k=120)) for _ in range(60)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def two(
    work: Workshop,
    out: Path | tuple[Path, Path],
    *flags: str,
    before: tuple[Callable[[], object], Callable[[], object]] = (bool, bool),
) -> list[Run]:
    """Two processes of one run, each in its folder, if there are two."""
    outs = out if isinstance(out, tuple) else (out, out)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    meeting = ("--distributed", "--coordinator", f"127.0.0.1:{port}")
    meeting += ("--process-count", "2", "--process-id")
    return [
        Run(work, outs[i], *FEWER, *flags, *meeting, str(i), before=before[i])
        for i in range(2)
    ]


@contextlib.contextmanager
def small_disk(work: Workshop, size: str = "24m") -> Iterator[Path]:
    """A file system of this size; needs the right to mount one."""
    disk = work.folder / "disk"
    disk.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
    subprocess.run(mount, check=True, capture_output=True)
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def fill(path: Path) -> None:
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def prepare(folder: Path, platform: str = "cpu") -> None:
    """What a process loads is loaded once, and programs are compiled once."""
    _context.set_forkserver_preload(["train.main"])
    os.environ |= {
        "JAX_PLATFORMS": platform,
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }
    if platform == "cpu":  # one device, and quickly compiled
        os.environ |= {"XLA_FLAGS": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}


@contextlib.contextmanager
def workshop(folder: Path) -> Iterator[Workshop]:
    """For tests: the environment is what it was when the block ends."""
    before = dict(os.environ)
    prepare(folder)
    try:
        yield Workshop(folder, seed=0)
    finally:
        os.environ.clear()
        os.environ.update(before)
