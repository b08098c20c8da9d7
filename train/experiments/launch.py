"""Commands side by side: one device each, a log each, and all end with this process."""

import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

_ASK = "import jax; print(jax.default_backend(), jax.local_device_count())"


class Command(NamedTuple):
    """What is run.

    Attributes:
      name: what it is called.
      argv: its words.
      log: the file of what it prints.
    """

    name: str
    argv: Sequence[str]
    log: Path


class Ended(NamedTuple):
    """A command that has ended.

    Attributes:
      name: of the command.
      status: its exit status; of a signal, minus its number.
    """

    name: str
    status: int


def slots(at_once: int) -> list[Mapping[str, str]]:
    """The environment of each place where a command can run: GPUs apart, all else one.

    What a GPU's memory, or a CPU's cores, several would take at once is shared out.

    A process of its own looks for devices, so that none is held here.

    Raises:
      OSError: JAX finds no device.
    """
    asked = subprocess.run(
        [sys.executable, "-c", _ASK], capture_output=True, text=True, check=False
    )
    if asked.returncode:
        raise OSError(f"JAX finds no device: {asked.stderr.strip().splitlines()[-1]}")
    backend, count = asked.stdout.split()[-2:]
    if backend != "gpu":
        return [{} if at_once == 1 else thread_share(at_once)] * at_once
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(i) for i in range(int(count))]
    share = {} if at_once == 1 else memory_share(at_once)
    return [{"CUDA_VISIBLE_DEVICES": n, **share} for _ in range(at_once) for n in names]


def memory_share(at_once: int) -> dict[str, str]:
    """What a process may take of a GPU's memory that several share."""
    return {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{0.9 / at_once:.3f}"}


def thread_share(at_once: int) -> dict[str, str]:
    """How many threads a process may have of a CPU that several share.

    Of XLA's and of the factorisations': two runs with an SVD at every tenth step took
    three times as long on two cores without it. What the environment has already stays.
    """
    share = str(max(1, (os.cpu_count() or 1) // at_once))
    names = ("NPROC", "OPENBLAS_NUM_THREADS")
    return {name: os.environ.get(name, share) for name in names}


def run_all(
    commands: Sequence[Command], places: Sequence[Mapping[str, str]]
) -> Iterator[Ended]:
    """Runs the commands, as many at a time as there are places; yields each as it ends.

    If the caller leaves the loop, or is interrupted, those that run get a SIGTERM and
    are waited for.
    """
    waiting: queue.SimpleQueue[Command] = queue.SimpleQueue()
    ended: queue.SimpleQueue[Ended] = queue.SimpleQueue()
    running: set[subprocess.Popen[bytes]] = set()
    stopping = threading.Event()
    for command in commands:
        waiting.put(command)

    def work(place: Mapping[str, str]) -> None:
        while not stopping.is_set():
            try:
                command = waiting.get_nowait()
            except queue.Empty:
                return
            command.log.parent.mkdir(parents=True, exist_ok=True)
            with command.log.open("ab") as log:
                # In a session of its own: Ctrl-C is for this process, which tells it.
                process = subprocess.Popen(
                    command.argv,
                    env={**os.environ, **place},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
                running.add(process)
                status = process.wait()
                running.discard(process)
            ended.put(Ended(command.name, status))

    threads = [threading.Thread(target=work, args=(place,)) for place in places]
    for thread in threads:
        thread.start()
    try:
        for _ in commands:
            yield ended.get()
    finally:
        stopping.set()
        for process in [*running]:
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join()
