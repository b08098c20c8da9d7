"""Work on many matrices at once, spread over the devices of a mesh."""

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from lowrank_optax.core.linalg import fence

_sharing: ContextVar[bool] = ContextVar("sharing", default=False)


def sharing() -> bool:
    """Whether what is traced is one device's share of `over_devices`."""
    return _sharing.get()


def spreads() -> bool:
    """Whether there is a mesh in context over whose devices matrices can be spread."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.size > 1 and set(mesh.axis_types) == {AxisType.Auto}


def over_devices(f: Callable[..., Any], each: Any, whole: Any = ()) -> Any:
    """f(each, whole), every device with its share of the matrices.

    The matrices, cut along their columns, change places: a device gets some of them
    whole (one all-to-all, no gather), works on those, and what it made of them is put
    back cut along the rows. The bits are those of one device, which does all.

    Args:
      f: to arrays (L, m, r); it treats each matrix by itself.
      each: a tree of arrays (L, ...), of which f gets some, a whole number of times L
        over all devices (the first ones are there twice to make it so).
      whole: a tree of arrays that f gets as they are.
    """
    count = len(jax.tree.leaves(each)[0])
    if not spreads() or count == 1:
        return f(*jax.tree.map(replicated, (each, whole)))
    mesh = jax.sharding.get_abstract_mesh()
    devices, share = mesh.size, P(mesh.axis_names)
    index = jnp.arange(-(-count // devices) * devices) % count

    def move(x: jax.Array) -> jax.Array:
        # Fenced: no one else is to have it so.
        return jax.lax.with_sharding_constraint(fence(jnp.take(x, index, 0)), share)

    def on_each(each: Any, whole: Any) -> Any:
        token = _sharing.set(True)
        try:
            return f(each, whole)
        finally:
            _sharing.reset(token)

    specs = {"in_specs": (share, P()), "out_specs": share}
    work = jax.shard_map(on_each, **specs, check_vma=False)

    def back(x: jax.Array) -> jax.Array:
        fits = [i for i in range(1, x.ndim) if x.shape[i] % devices == 0]
        spec = P(*(None,) * fits[0], mesh.axis_names) if fits else P()
        return jax.lax.with_sharding_constraint(x, spec)[:count]

    return jax.tree.map(back, work(jax.tree.map(move, each), whole))


def replicated(x: jax.Array) -> jax.Array:
    """`x`, whole on every device of the mesh in context, so that sums over it round
    the same way whatever its sharding; unchanged outside a mesh context.
    """
    if not spreads():
        return x
    # Fenced, or the compiler would keep what `x` is made of whole as well, and with it
    # the moments and the update of every step.
    return jax.lax.with_sharding_constraint(fence(x), P())
