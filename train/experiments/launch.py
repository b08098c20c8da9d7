"""Runs commands side by side: a device and a log each; all end with this process."""

import os
import queue
import subprocess
import sys
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
    """The environment of each slot for a command: `at_once` a GPU, or for the CPU.

    Commands at once share a GPU's memory, or the CPU's cores. Another process looks for
    devices, so that this one holds none.

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
    """The share of a GPU's memory for each of several processes."""
    return {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{0.9 / at_once:.3f}"}


def thread_share(at_once: int) -> dict[str, str]:
    """The share of a CPU's threads for each of several processes.

    It limits XLA's threads and the factorisations': two runs with an SVD at every tenth
    step took three times as long on two cores without it. Set variables stay.
    """
    share = str(max(1, (os.cpu_count() or 1) // at_once))
    names = ("NPROC", "OPENBLAS_NUM_THREADS")
    return {name: os.environ.get(name, share) for name in names}


class _Running:
    """The processes that run, which a thread starts and another ends."""

    def __init__(self, slots: Sequence[Mapping[str, str]]) -> None:
        self._free: queue.SimpleQueue[Mapping[str, str]] = queue.SimpleQueue()
        for slot in slots:
            self._free.put(slot)
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._stopping = False

    def run(self, command: Command) -> Ended:
        slot = self._free.get()
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
            self._processes.add(process)
            if self._stopping:
                process.terminate()
            status = process.wait()
            self._processes.discard(process)
        self._free.put(slot)
        return Ended(command.name, status)

    def stop(self) -> None:
        """Sends a SIGTERM to all, and to those that start meanwhile."""
        self._stopping = True
        for process in [*self._processes]:
            process.terminate()


def run_all(
    commands: Sequence[Command], slots: Sequence[Mapping[str, str]]
) -> Iterator[Ended]:
    """Runs the commands, one at a time in each slot; yields each as it ends.

    If the caller leaves the loop, or is interrupted, those that run get a SIGTERM and
    are waited for.
    """
    running = _Running(slots)
    with ThreadPoolExecutor(max(1, len(slots))) as pool:
        futures = [pool.submit(running.run, command) for command in commands]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            for future in futures:
                future.cancel()
            running.stop()
