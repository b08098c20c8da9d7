"""Faults done to one of two processes of a run: both end, or both go on."""

import itertools
import random
import resource
import shutil
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from tests.helpers.workshop import (
    SAVE_EVERY,
    Outcome,
    Run,
    Workshop,
    same,
    two,
    without_times,
)

MINUTE = 60

ENDED = ("detected fatal errors", "another process has ended", "error: ")
"""What a process says that ends because another did: JAX's words, or ours."""


def first(*problems: Outcome) -> Outcome:
    return next(filter(None, problems), None)


def deaths_of_one_of_two(work: Workshop, count: int) -> Iterator[Outcome]:
    """SIGKILL to one of two processes ends the other within a minute."""
    yield from one_without_other(work, count, signal.SIGKILL)


def freezes_of_one_of_two(work: Workshop, count: int) -> Iterator[Outcome]:
    """SIGSTOP to one of two processes ends the other within a minute."""
    yield from one_without_other(work, count, signal.SIGSTOP)


def one_without_other(work: Workshop, count: int, number: int) -> Iterator[Outcome]:
    for i in range(count):
        out = work.fresh()
        pair = two(work, out)
        pair[0].wait_for(SAVE_EVERY + 1)
        victim, other = pair[i % 2], pair[1 - i % 2]
        victim.signal(number)
        status = other.end(MINUTE)
        victim.signal(signal.SIGKILL)
        victim.end()
        problem = "the other went on for a minute" if status is None else None
        if not any(words in other.log for words in ENDED):
            problem = problem or f"without a word\n{other.log}"
        pair = two(work, out, "--resume")
        problems = [run.wrong(run.end(), 0) for run in pair]
        yield first(problem, *problems) or same(out, work.bits_of_two)


def errors_of_one_of_two(work: Workshop, count: int) -> Iterator[Outcome]:
    """An error of one of two processes alone ends the other within a minute."""
    for i in range(count):
        out = work.fresh()
        before = (lose_data, bool) if i % 2 else (bool, lose_data)
        pair = two(work, out, before=before)
        pair[0].wait_for(4)
        statuses = [run.end(MINUTE + 5) for run in pair]
        logs = pair[1 - i % 2].log, pair[i % 2].log
        problem = None if all(statuses) else f"statuses {statuses}\n{logs}"
        if "error: the data is gone" not in logs[0]:
            problem = problem or f"without a word\n{logs[0]}"
        if not any(words in logs[1] for words in ENDED):
            problem = problem or f"without a word\n{logs[1]}"
        pair = two(work, out, "--resume")
        problems = [run.wrong(run.end(), 0) for run in pair]
        yield first(problem, *problems) or same(out, work.bits_of_two)


def lose_data() -> None:
    """In a process: its seventh batch cannot be read."""
    from train.run import loop

    given, count = loop.put_next, itertools.count(1)

    def put_next(program: Any, batches: Any) -> Any:
        if next(count) == 7:
            raise loop.DataError("the data is gone")
        return given(program, batches)

    loop.put_next = put_next


def checkpoints_of_one_of_two(work: Workshop, count: int) -> Iterator[Outcome]:
    """The newest checkpoint damaged or missing for one of two: both take the older."""
    expected = work.bits_of_two
    for i in range(count):
        outs = work.fresh("own0"), work.fresh("own1")
        for out in outs:
            shutil.copytree(work.folder / "two", out)
        newest = outs[i % 2] / "checkpoints" / "20"
        if i // 2 % 2:
            shutil.rmtree(newest)
        else:
            spoil(newest, work.random)
        # Two folders can be read, but orbax can save into one alone.
        pair = two(work, outs, "--resume", "--checkpoint-every", "0")
        problems = [run.wrong(run.end(), 0) for run in pair]
        said = ["the checkpoint of step 20" in run.log for run in pair]
        told = any(said) if i // 2 % 2 else all(said)  # one alone sees it, or both
        problem = None if told else "an older checkpoint without a word"
        if without_times(outs[0]) != expected.records:
            problem = problem or "other metrics than the run that was left alone"
        yield first(*problems, problem)


def spoil(checkpoint: Path, draw: random.Random) -> None:
    """Zeros in place of the arrays, or of all JSON."""
    where = "state/d" if draw.random() < 0.5 else "checksums"
    for path in (checkpoint / where).rglob("*"):
        if path.is_file():
            path.write_bytes(bytes(path.stat().st_size))


def no_checkpoint_in_common(work: Workshop, count: int) -> Iterator[Outcome]:
    """Two processes without a checkpoint in common: both end with a sentence."""
    for i in range(count):
        work.bits_of_two  # noqa: B018 (its folder is copied)
        outs = work.fresh("own0"), work.fresh("own1")
        for out in outs:
            shutil.copytree(work.folder / "two", out)
        shutil.rmtree(outs[i % 2] / "checkpoints")
        yield both_say(two(work, outs, "--resume"), "seen by all processes")


def both_say(pair: list[Run], words: str) -> Outcome:
    begun = time.monotonic()
    problems = [run.wrong(run.end(2 * MINUTE), 1) for run in pair]
    silent = [run.log for run in pair if words not in run.log]
    late = time.monotonic() - begun > 2 * MINUTE
    problem = f"without a word\n{silent[0]}" if silent else None
    return first(*problems, problem, "took too long" if late else None)


def disks_of_one_of_two(work: Workshop, count: int) -> Iterator[Outcome]:
    """No room for a checkpoint for one of two: none is saved, both go on and say so."""
    expected = work.bits_of_two
    for i in range(count):
        out = work.fresh()
        limits = (no_room, bool) if i % 2 else (bool, no_room)
        problem = both_say(two(work, out, before=limits), "could not be saved")
        if problem is None and list((out / "checkpoints").iterdir()):
            problem = "something was left of checkpoints that were not saved"
        if without_times(out) != expected.records:
            problem = problem or "other metrics than the run that was left alone"
        pair = two(work, out, "--resume")
        problems = [run.wrong(run.end(), 0) for run in pair]
        yield first(problem, *problems) or same(out, expected)


no_room = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (100_000, 100_000))
"""No file of more bytes, in this process alone."""
