"""Shardings of a stage's state, taken from the type of the gradient.

On a mesh of Explicit axes an array's type names its sharding, and a stage's `init`
shards its arrays like the gradient. On one device or on Auto axes the types name none,
and these functions do nothing.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from lowrank_optax.core.aliases import Tree
from lowrank_optax.core.frame import Frame, ProjectedAway

Spec = tuple[Any, ...]
"""One entry for each axis of an array: the mesh axes that shard it, or None."""


def low_zeros(frame: Frame) -> jax.Array:
    """Zeros like S^T G (*batch, r, n), with r sharded as m is and n as n is."""
    zeros = jnp.zeros(frame.low_shape, frame.gradient.dtype)
    return shard_along(zeros, spec_of(frame.gradient), of=frame.gradient)


def zeros_along(frame: Frame, axis: int) -> jax.Array:
    """Zeros (*batch, m) for axis -2 and (*batch, n) for -1, sharded as the gradient."""
    (*batch, m, n), (*first, of_m, of_n) = frame.gradient.shape, spec_of(frame.gradient)
    size, entry = (m, of_m) if axis == -2 else (n, of_n)
    zeros = jnp.zeros((*batch, size), frame.gradient.dtype)
    return shard_along(zeros, (*first, entry), of=frame.gradient)


def shard_batch(frame: Frame, x: jax.Array) -> jax.Array:
    """x (*batch, ...), a few numbers for each matrix, with its batch axes sharded."""
    return shard_along(
        x, spec_of(frame.gradient)[: len(frame.batch)], of=frame.gradient
    )


def shard_basis(frame: Frame, x: jax.Array) -> jax.Array:
    """A stored basis, (*batch, m, r) or packed (*batch, numbers), sharded.

    All mesh axes that shard the gradient shard it: along m, or along r where the number
    of shards does not divide m.
    """
    spec, first = spec_of(frame.gradient), len(frame.batch)
    names = tuple(name for entry in spec[first:] for name in mesh_axes_of(entry))
    for axis in range(first, x.ndim):
        if x.shape[axis] % shards_of(names, jax.typeof(frame.gradient).sharding.mesh):
            continue
        rest: list[Any] = [None] * (x.ndim - first)
        rest[axis - first] = names or None
        return shard_along(x, (*spec[:first], *rest), of=frame.gradient)
    return shard_batch(frame, x)


def spec_of(x: jax.Array | ProjectedAway) -> Spec:
    """The sharding in the type of x; none for a `ProjectedAway`."""
    if isinstance(x, ProjectedAway):
        return (None,) * len(x.shape)
    return padded_spec(jax.typeof(x).sharding.spec, jnp.ndim(x))


def shard_along(x: jax.Array, spec: Spec, *, of: jax.Array) -> jax.Array:
    """x, its first axes sharded by `spec` where the number of shards divides them.

    `of` is an array on the mesh of `spec`.
    """
    if not any(spec):
        return x
    mesh = jax.typeof(of).sharding.mesh
    fits = [
        entry if size % shards_of(entry, mesh) == 0 else None
        for size, entry in zip(x.shape, spec, strict=False)
    ]
    return jax.sharding.reshard(x, P(*fits)) if any(fits) else x


def on_auto_axes(f: Callable[..., Any], *args: Any, like: Tree, **extra: Any) -> Any:
    """f(*args, **extra); its result has the structure and the shardings of `like`.

    On a mesh of Explicit axes f runs as on one of Auto axes: between inputs and outputs
    the compiler chooses the shardings, so f may use any operation.
    """
    if not has_explicit_axes():
        return f(*args, **extra)
    arrays = {k: x for k, x in extra.items() if _has_arrays(x)}
    static = {k: x for k, x in extra.items() if k not in arrays}
    outputs = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, like)

    def run(*parts: Tree) -> Tree:
        return f(*parts[:-1], **parts[-1], **static)

    run_on_auto: Any = jax.sharding.auto_axes(run, out_sharding=outputs)
    return run_on_auto(*args, arrays)


def has_explicit_axes() -> bool:
    return AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types


def _has_arrays(x: Tree) -> bool:
    return any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(x))


def merged_spec(x: jax.Array, shape: tuple[int, ...]) -> Spec:
    """The spec of x after a reshape to `shape` that merges neighbouring axes."""
    entries, sizes = list(spec_of(x)), list(x.shape)
    merged = []
    for size in shape:
        first, have = entries.pop(0), sizes.pop(0)
        while have < size:
            have *= sizes.pop(0)
            # Shards of a later axis are strided in the merged axis, and a spec can only
            # name contiguous shards. So the merged axis is sharded by its first axis,
            # and not at all where a later one is sharded.
            first = None if entries.pop(0) is not None else first
        merged.append(first)
    return tuple(merged)


def padded_spec(spec: P, ndim: int) -> Spec:
    """The spec with an entry for each axis."""
    return (*spec, *(None,) * (ndim - len(spec)))


def mesh_axes_of(entry: Any) -> tuple[str, ...]:
    """The mesh axes that an entry names."""
    return entry if isinstance(entry, tuple) else () if entry is None else (entry,)


def shards_of(entry: Any, mesh: Any) -> int:
    """The number of shards of an entry."""
    return math.prod(mesh.shape[name] for name in mesh_axes_of(entry))
