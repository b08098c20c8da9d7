"""Commands side by side: one device each, a log each, and all end with this process."""

import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

_ASK = "import jax; print(jax.default_backend(), jax.local_device_count())"


class Command(NamedTuple):
    """A command line, and the file that gets what it prints."""

    name: str
    argv: Sequence[str]
    log: Path


class Ended(NamedTuple):
    """A command's name, and its exit status: minus the number of a signal."""

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
    commands: Sequence[Command], slots: Sequence[Mapping[str, str]]
) -> Iterator[Ended]:
    """Runs the commands, as many at a time as there are slots; yields each as it ends.

    If the caller leaves the loop, or is interrupted, those that run get a SIGTERM and
    are waited for.
    """
    free: queue.SimpleQueue[Mapping[str, str]] = queue.SimpleQueue()
    for slot in slots:
        free.put(slot)
    running: set[subprocess.Popen[bytes]] = set()
    stopping = threading.Event()

    def work(command: Command) -> Ended:
        slot = free.get()
        command.log.parent.mkdir(parents=True, exist_ok=True)
        with command.log.open("ab") as log:
            # In a session of its own: Ctrl-C is for this process, which passes it on.
            process = subprocess.Popen(
                command.argv,
                env={**os.environ, **slot},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            running.add(process)
            if stopping.is_set():
                process.terminate()
            status = process.wait()
            running.discard(process)
        free.put(slot)
        return Ended(command.name, status)

    with ThreadPoolExecutor(max(1, len(slots))) as pool:
        futures = [pool.submit(work, command) for command in commands]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            stopping.set()
            for future in futures:
                future.cancel()
            for process in [*running]:
                process.terminate()
