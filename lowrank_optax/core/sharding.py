"""How a stage's `init` says that its arrays are cut over a mesh: in their types.

Where types say nothing (one device, Auto axes) nothing is cut, and this does nothing.
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
"""One entry for each axis of an array: the mesh axes that cut it, or None."""


def low_zeros(frame: Frame) -> jax.Array:
    """Zeros like S^T G (*batch, r, n), r cut as m is, and n as n."""
    zeros = jnp.zeros(frame.low_shape, frame.gradient.dtype)
    return shard_along(zeros, spec_of(frame.gradient), of=frame.gradient)


def shard_batch(frame: Frame, x: jax.Array) -> jax.Array:
    """x (*batch, ...), a few numbers for each matrix, with its batch axes cut."""
    return shard_along(
        x, spec_of(frame.gradient)[: len(frame.batch)], of=frame.gradient
    )


def shard_basis(frame: Frame, x: jax.Array) -> jax.Array:
    """What is kept of a basis, (*batch, m, r) or packed (*batch, numbers).

    All axes that cut the gradient cut it too: along m, or r if m does not divide.
    """
    cut, first = spec_of(frame.gradient), len(frame.batch)
    names = tuple(name for entry in cut[first:] for name in mesh_axes_of(entry))
    for axis in range(first, x.ndim):
        if x.shape[axis] % shards_of(names, jax.typeof(frame.gradient).sharding.mesh):
            continue
        rest: list[Any] = [None] * (x.ndim - first)
        rest[axis - first] = names or None
        return shard_along(x, (*cut[:first], *rest), of=frame.gradient)
    return shard_batch(frame, x)


def spec_of(x: Any) -> Spec:
    """How the type of x says that it is cut; a gradient that is away says nothing."""
    if isinstance(x, ProjectedAway):
        return (None,) * len(x.shape)
    return padded_spec(jax.typeof(x).sharding.spec, jnp.ndim(x))


def shard_along(x: jax.Array, cut: Spec, *, of: Any) -> jax.Array:
    """x, cut along its first axes as `cut` says, where that goes without a rest.

    `of` is an array on the mesh that `cut` speaks of.
    """
    if not any(cut):
        return x
    mesh = jax.typeof(of).sharding.mesh
    fits = [
        entry if size % shards_of(entry, mesh) == 0 else None
        for size, entry in zip(x.shape, cut, strict=False)
    ]
    return jax.sharding.reshard(x, P(*fits)) if any(fits) else x


def on_auto_axes(f: Callable[..., Any], *args: Any, like: Tree, **extra: Any) -> Any:
    """f(*args, **extra); its result has the structure and the shardings of `like`.

    On a mesh of Explicit axes f works as on one of Auto axes: the compiler decides what
    is where between inputs and outputs, and every operation will do.
    """
    if not has_explicit_axes():
        return f(*args, **extra)
    arrays = {k: x for k, x in extra.items() if _has_arrays(x)}
    static = {k: x for k, x in extra.items() if k not in arrays}
    outputs = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, like)

    def run(*parts: Any) -> Any:
        return f(*parts[:-1], **parts[-1], **static)

    run_on_auto: Any = jax.sharding.auto_axes(run, out_sharding=outputs)
    return run_on_auto(*args, arrays)


def has_explicit_axes() -> bool:
    return AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types


def _has_arrays(x: Any) -> bool:
    return any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(x))


def merged_spec(x: jax.Array, shape: tuple[int, ...]) -> Spec:
    """The spec of x once neighbouring axes are merged into `shape`."""
    entries, sizes = list(spec_of(x)), list(x.shape)
    cut = []
    for size in shape:
        first, have = entries.pop(0), sizes.pop(0)
        while have < size:
            have *= sizes.pop(0)
            # Parts of a later axis are no parts of the whole that lie together.
            first = None if entries.pop(0) is not None else first
        cut.append(first)
    return tuple(cut)


def padded_spec(spec: P, ndim: int) -> Spec:
    """A spec with an entry for each axis."""
    return (*spec, *(None,) * (ndim - len(spec)))


def mesh_axes_of(entry: Any) -> tuple[str, ...]:
    """The mesh axes of an entry."""
    return entry if isinstance(entry, tuple) else () if entry is None else (entry,)


def shards_of(entry: Any, mesh: Any) -> int:
    """How many parts an entry makes."""
    return math.prod(mesh.shape[name] for name in mesh_axes_of(entry))
