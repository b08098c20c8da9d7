"""The devices as data x fsdp x tensor, and a batch's rows on them."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from train.config.config import Config

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")
"""The axes that shard a batch: devices along "tensor" have the same rows."""


def make_mesh(config: Config, devices: Sequence[Any] | None = None) -> Mesh:
    """Arranges the devices by `--fsdp` and `--tensor`; the rest is the axis "data".

    The axes are Auto (the compiler shards what is between inputs and outputs):
    `jax.make_mesh` alone makes Explicit axes, under which a product contracted over a
    sharded axis is an error. `devices` is None for those of all processes.

    Raises:
      ValueError: the devices are not a multiple of fsdp x tensor; the batch does not
        divide over devices and microbatches, or the heads over tensor; or devices along
        tensor belong to several processes.
    """
    devices = jax.devices() if devices is None else devices
    fsdp, tensor = config.mesh.fsdp, config.mesh.tensor
    if len(devices) % (fsdp * tensor):
        raise ValueError(
            f"fsdp={fsdp} x tensor={tensor} does not divide the {len(devices)} devices "
            "that there are; change either (--fsdp, --tensor)"
        )
    model = config.model.base
    for heads in (model.num_heads, model.kv_heads):
        if heads % tensor:
            raise ValueError(
                f"tensor={tensor} does not divide the {heads} attention heads of "
                f"{config.model.name}; give a divisor, and shard more by fsdp"
            )
    shares = len(devices) // tensor
    if config.batch_size % (shares * config.microbatches):
        of_tensor = "" if tensor == 1 else f" / {tensor} of tensor"
        raise ValueError(
            f"batch_size={config.batch_size} is not a multiple of {len(devices)} "
            f"devices{of_tensor} x {config.microbatches} microbatches; make it one"
        )
    return _mesh((shares // fsdp, fsdp, tensor), devices)


def _mesh(shape: tuple[int, ...], devices: Sequence[Any]) -> Mesh:
    types = (AxisType.Auto,) * len(AXES)
    try:
        mesh = jax.make_mesh(shape, AXES, types, devices=devices)
    except NotImplementedError:  # no axis of the hardware is as long as one of these
        grid = mesh_utils.create_device_mesh(
            shape, devices, allow_split_physical_axes=True
        )
        mesh = Mesh(grid, AXES, types)
    # Each process makes its own rows of a batch: they are not another's too.
    orders = (mesh, Mesh(np.reshape(devices, shape), AXES, types))
    for mesh in orders:
        groups = mesh.devices.reshape(-1, shape[-1])
        if all(len({d.process_index for d in group}) == 1 for group in groups):
            return mesh
    raise ValueError(
        f"tensor={shape[-1]}: so many devices are not of one process; lower it to a "
        "divisor of the devices that a process has, and shard more by fsdp"
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """The same values on every device."""
    return NamedSharding(mesh, P())


def by_row(mesh: Mesh) -> NamedSharding:
    """Shards the rows of a batch; devices along tensor have the same rows."""
    return NamedSharding(mesh, P(BATCH_AXES))


def to_devices(mesh: Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """Sends this process' rows of a batch to the global batch; does not wait."""
    rows = by_row(mesh)
    return {
        name: jax.make_array_from_process_local_data(rows, array)
        for name, array in batch.items()
    }


def like_batch(config: Config) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of the global batch that a run trains on."""
    shape = config.batch_size, config.seq_len
    like = {"tokens": jax.ShapeDtypeStruct(shape, np.int32)}
    if config.data.windows != "packed":
        like["weights"] = jax.ShapeDtypeStruct(shape, np.float32)
    if config.data.windows == "examples":
        like["segment_ids"] = like["positions"] = like["tokens"]
    return like


def on_mesh(shardings: Any, arrays: Any) -> Any:
    """Shards arrays that every host has in memory."""

    def put(sharding: NamedSharding, x: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(x.shape, sharding, lambda part: x[part])

    return jax.tree.map(put, shardings, arrays)
