"""Data parallelism: one mesh axis, weights everywhere, the batch cut into rows."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from train.config import Config


def make_mesh(config: Config, devices: Sequence[Any] | None = None) -> Mesh:
    """All devices, by default those of all processes, on the axis "data".

    The axis is Auto (the compiler places what is between inputs and outputs):
    `jax.make_mesh` alone makes Explicit axes, under which a product contracted over
    a sharded axis is an error.

    Raises:
      ValueError: if the batch cannot be cut evenly over devices and microbatches.
    """
    count = jax.device_count() if devices is None else len(devices)
    if config.batch_size % (count * config.microbatches):
        raise ValueError(
            f"batch_size={config.batch_size} is not a multiple of {count} devices x "
            f"{config.microbatches} microbatches; make it one"
        )
    return jax.make_mesh(
        (count,), ("data",), axis_types=(AxisType.Auto,), devices=devices
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """The same values on every device."""
    return NamedSharding(mesh, P())


def by_row(mesh: Mesh) -> NamedSharding:
    """Each device has its rows of the batch."""
    return NamedSharding(mesh, P("data"))


def to_devices(mesh: Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """This process' rows of a batch as part of the global batch; does not wait."""
    rows = by_row(mesh)
    return {
        name: jax.make_array_from_process_local_data(rows, array)
        for name, array in batch.items()
    }
