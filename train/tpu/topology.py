"""Descriptions of TPUs that are not here, for libtpu, the TPU compiler."""

import os
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

EXAMPLES = "v5e:2x2, v5e:16x16, v5p:4x8x8 or v6e:16x16"

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}

# Without these libtpu looks for a TPU on this machine, and says at length that there is
# none; and a second process that loads it is ended at once.
ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # of no consequence for a topology
}


def stay_on_cpu() -> None:
    """Makes this process compute on the CPU; call it before JAX starts."""
    jax.config.update("jax_platforms", "cpu")


def chips_of(topology: str) -> list[Any]:
    """The chips of a topology, to compile for.

    Raises:
      ImportError: libtpu is not installed.
      ValueError: it knows no such topology.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(
            f"topology={topology!r} is none that the TPU compiler knows "
            f"({error}); give one such as {EXAMPLES}"
        ) from error
    except RuntimeError as error:
        raise ImportError(
            "the TPU compiler, libtpu, is not installed: pip install '.[tpu]' (on "
            "Linux, x86-64; it needs no TPU)"
        ) from error
    return [*found.devices]


def memory_of(chip: Any) -> float:
    """Bytes that a program can use on a chip, as the compiler says when it refuses one.

    Raises:
      ValueError: it did not.
    """
    alone = NamedSharding(Mesh(np.array([chip]), ("chip",)), P())
    far_too_large = jax.ShapeDtypeStruct((10 * 2**40,), jnp.uint8, sharding=alone)
    try:
        jax.jit(lambda x: x + 1).lower(far_too_large).compile()
    except jax.errors.JaxRuntimeError as error:
        if refused := refusal(error):
            return refused.available
    raise ValueError(f"the memory of a {chip.device_kind} is not known")


class Refusal(NamedTuple):
    """The bytes that a program needs on a chip, and those available."""

    needed: float
    available: float


def refusal(error: Exception) -> Refusal | None:
    """Parses the error for a program that is too large; None: another error."""
    number = r"\(([\d.]+)([KMGT]?)\)"
    found = re.search(rf"{number} exceeds available HBM {number}", str(error))
    if found is None:
        return None
    needed, unit, available, its_unit = found.groups()
    return Refusal(float(needed) * UNITS[unit], float(available) * UNITS[its_unit])
