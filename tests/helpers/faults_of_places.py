"""Faults done to what is around a run: its output, and its folder."""

import io
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from tests.helpers.workshop import (
    SAVE_EVERY,
    STEPS,
    Outcome,
    Run,
    Workshop,
    same,
    small_disk,
)
from train.host.errors import STOPPED

# --- outputs: each is called in the process of a run ---


def write_to(path: str) -> None:
    _write(os.open(path, os.O_WRONLY | os.O_CREAT))


def lose_the_reader() -> None:
    reads, writes = os.pipe()
    os.close(reads)
    _write(writes)


def close_outputs() -> None:
    os.closerange(1, 3)


def speak_ascii() -> None:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="ascii", errors="strict")


def _write(descriptor: int) -> None:
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)


def outputs(work: Workshop, count: int) -> Iterator[Outcome]:
    """The output closed, on a full disk, without its reader, or in ASCII: no change."""
    before = [partial(write_to, "/dev/full"), lose_the_reader, close_outputs]
    for i in range(count):
        out = work.fresh("r\u00e9sum\u00e9")
        if i % 5 == 4:
            with small_disk(work, "8k") as disk:
                run = Run(work, out, before=partial(write_to, str(disk / "log")))
                status = run.end()
        else:
            run = Run(work, out, before=[*before, speak_ascii][i % 5])
            status = run.end()
        yield run.wrong(status, 0) or same(out, work.bits)


def hangups(work: Workshop, count: int) -> Iterator[Outcome]:
    """SIGHUP, twice, as the terminal closes: it saves, and goes on with --resume."""
    for _ in range(count):
        out = work.fresh()
        run = Run(work, out, before=lose_the_reader)
        run.wait_for(work.random.randint(1, STEPS - 10))
        run.signal(signal.SIGHUP)
        run.signal(signal.SIGHUP)
        yield run.wrong(run.end(60), STOPPED) or work.finished(out)


# --- folders ---


def moved_folders(work: Workshop, count: int) -> Iterator[Outcome]:
    """The run's folder moved or removed: it ends with a sentence, and goes on there."""
    for i in range(count):
        out, elsewhere = work.fresh(), work.fresh("elsewhere")
        run = Run(work, out)
        run.wait_for(work.random.randint(SAVE_EVERY + 1, STEPS - 10))
        if i % 3 == 2:
            shutil.rmtree(out, ignore_errors=True)  # it may write just now
        else:
            out.rename(elsewhere)
        problem = run.wrong(run.end(), 1)
        if "steps since its last checkpoint are lost" not in run.log:
            problem = problem or f"without a word\n{run.log}"
        if i % 3 != 2 and problem is None:
            problem = work.finished(elsewhere)
        yield problem


def names_taken(work: Workshop, count: int) -> Iterator[Outcome]:
    """A link or a file under the name of orbax's temporary folder: all is saved."""
    takes: list[Callable[[Path], object]] = [
        lambda path: path.write_text("in the way"),
        lambda path: path.symlink_to(work.text),
        lambda path: path.symlink_to(work.folder),
        lambda path: path.symlink_to("nowhere"),
    ]
    for i in range(count):
        out = work.fresh()
        run = Run(work, out)
        run.wait_for(1)
        (out / "checkpoints").mkdir(exist_ok=True)
        takes[i % 4](out / "checkpoints" / f"{STEPS}.orbax-checkpoint-tmp")
        problem = run.wrong(run.end(), 0) or same(out, work.bits)
        if not work.text.exists():
            problem = problem or "what a link named is gone"
        yield problem
