"""Distributes work over processes, which end with the one that starts them."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")

OnAmount = Callable[[float], object]

_LOOK_S = 0.2


def each_done(
    work: Callable[[T, OnAmount], R],
    items: Sequence[T],
    workers: int,
    on_amount: OnAmount,
) -> Generator[tuple[T, R], None, None]:
    """Yields each item and what `work` makes of it, as they come.

    With one worker the work is done here. More are processes of their own, spawned and
    not forked: threads of this one may hold locks. If this generator is closed, or
    raises, they stop; if this process is killed, they end too. They ignore Ctrl-C.

    Args:
      work: of a module, so that a process can import it. It reports amounts done to its
        second argument, which may raise to interrupt it.
      items: what can be pickled.
      workers: how many processes.
      on_amount: is called here with what all workers have done since.

    Raises:
      ChildProcessError: a worker was ended from outside.
      Exception: what `work` raises.
    """
    if workers == 1:
        for item in items:
            yield item, work(item, on_amount)
        return
    context = multiprocessing.get_context("spawn")
    done, stop = context.Value("d", 0.0), context.Event()
    pool = ProcessPoolExecutor(workers, context, _begin, (done, stop))
    left, running, seen = iter(items), dict[Future[R], T](), 0.0
    try:
        while True:
            with _interrupts_held():  # for a process that begins now
                for item in islice(left, 2 * workers - len(running)):
                    running[pool.submit(_call, work, item)] = item
            if not running:
                return
            ready, _ = wait(running, _LOOK_S, FIRST_COMPLETED)
            now = done.value
            on_amount(now - seen)
            seen = now
            for future in ready:
                yield running.pop(future), future.result()
    except BrokenProcessPool as error:
        raise ChildProcessError(
            "a worker was ended from outside, perhaps for want of memory; lower "
            "--workers, or run it again"
        ) from error
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Delays Ctrl-C to the end of the block; processes started in it ignore it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_shared: list[Any] = []
"""In a worker: how much was done by all, and whether to leave off."""


def _begin(done: Any, stop: Any) -> None:
    _shared[:] = done, stop
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread a process
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _call(work: Callable[[T, OnAmount], R], item: T) -> R:
    return work(item, _report)


def _report(amount: float) -> None:
    done, stop = _shared
    if stop.is_set():
        raise KeyboardInterrupt  # which nothing takes for an error of the work
    with done.get_lock():
        done.value += amount
