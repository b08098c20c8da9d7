"""Errors of a run in progress that end it with a message."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import jax

from train.host.agreement import LostProcessError
from train.host.errors import message_of, other_processes_missed
from train.run.checkpoint import CheckpointError
from train.run.loop import DataError
from train.run.place import MovedError

ENDS = (CheckpointError, DataError, MovedError)  # of a run's own
ENDS += (FloatingPointError, OSError, LostProcessError)


@contextmanager
def run_errors() -> Iterator[None]:
    """Ends the program with the message of an error of a run in progress."""
    try:
        yield
    except ENDS as error:
        sys.exit(f"error: {message_of(error)}")
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            with other_processes_missed():
                raise
        sys.exit(
            f"error: the device's memory does not suffice ({str(error).splitlines()[0]}"
            "); lower --batch-size or --seq-len, or spend less on a step: "
            "--microbatches 4, --layerwise on, --remat full, --weight-dtype bfloat16"
        )
