"""The processes of a run find each other, or report why not."""

import dataclasses
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Timer

import jax

from train.host.console import say

HEARTBEAT_S = 30
"""Seconds without a sign of life after which a process is taken for dead."""

PARTING_S = 30
"""Seconds that a process which ends waits for the others to end, and then ends them."""

WAIT_S = 20
"""Seconds without the others after which a line says so."""


@dataclasses.dataclass(frozen=True)
class ProcessConfig:
    """Several processes, each started with the same command, `out` where all see it.

    Attributes:
      distributed: join the other processes before anything else. Under Slurm, Open MPI
        and Kubernetes, and on Cloud TPU, JAX finds the next three by itself. On GPUs it
        takes a process for each under Slurm and Open MPI; for one process with all of
        a host's, set JAX_LOCAL_DEVICE_IDS=0,1,... in the environment.
      coordinator: HOST:PORT of process 0, a port that is free there.
      process_count: how many processes there are.
      process_id: which of them this one is, from 0.
    """

    distributed: bool = False
    coordinator: str | None = None
    process_count: int | None = None
    process_id: int | None = None

    def __post_init__(self) -> None:
        named = ("coordinator", "process_count", "process_id")
        given = [field for field in named if getattr(self, field) is not None]
        if given and not self.distributed:
            raise ValueError(f"{', '.join(given)}: means nothing without --distributed")
        host, _, port = (self.coordinator or "HOST:0").rpartition(":")
        if not host or not port.isdigit():
            raise ValueError(f"coordinator={self.coordinator} must be HOST:PORT")
        count, own = self.process_count, self.process_id
        if count is not None and count < 1:
            raise ValueError(f"process_count={count} must be above 0")
        if own is not None and not 0 <= own < (count or sys.maxsize):
            raise ValueError(
                f"process_id={own} must be below process_count={count}, not negative"
            )


def join_processes(config: ProcessConfig) -> None:
    """Joins the other processes, if any, before anything is asked of the devices.

    Raises:
      ValueError: they are not found.
    """
    if not config.distributed:
        return
    try:
        with _told_to_wait():
            jax.distributed.initialize(
                config.coordinator,
                config.process_count,
                config.process_id,
                cluster_detection_method=_detection(config),
                heartbeat_timeout_seconds=HEARTBEAT_S,
                shutdown_timeout_seconds=PARTING_S,
            )
    except Exception as error:  # a cluster's own client raises errors of every class
        hint = "; JAX knows Open MPI 5 by mpi4py: pip install mpi4py"
        raise ValueError(
            f"distributed: the processes did not find each other "
            f"({' '.join(str(error).split())}); give each the same --coordinator "
            f"HOST:PORT and --process-count, and its --process-id"
            + (hint if _open_mpi_5() else "")
        ) from error
    say(f"{jax.process_count()} processes, {jax.device_count()} devices")


@contextmanager
def _told_to_wait() -> Iterator[None]:
    """JAX waits for five minutes, and aborts: say what for before."""
    line = "distributed: waiting for the others, which must all run and reach process 0"
    timer = Timer(WAIT_S, print, [line], {"file": sys.stderr, "flush": True})
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _detection(config: ProcessConfig) -> str | None:
    """mpi4py for Open MPI 5, which JAX 0.10 does not recognise by itself."""
    by_hand = config.coordinator is not None
    there = importlib.util.find_spec("mpi4py") is not None
    return "mpi4py" if _open_mpi_5() and there and not by_hand else None


def _open_mpi_5() -> bool:
    return "PRTE_LAUNCHED" in os.environ and "OMPI_COMM_WORLD_SIZE" in os.environ
