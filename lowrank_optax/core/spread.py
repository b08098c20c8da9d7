"""Work on many matrices, spread over the devices of a mesh."""

from collections.abc import Callable
from contextvars import ContextVar

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from lowrank_optax.core.aliases import Tree
from lowrank_optax.core.linalg import fence

_sharing: ContextVar[bool] = ContextVar("sharing", default=False)


def sharing() -> bool:
    """Whether one device's share of `over_devices` is being traced."""
    return _sharing.get()


def spreads() -> bool:
    """Whether the mesh in context has several devices and only Auto axes."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.size > 1 and set(mesh.axis_types) == {AxisType.Auto}


def over_devices(f: Callable[..., Tree], each: Tree, common: Tree = ()) -> Tree:
    """f(each, common), with the L matrices distributed over the devices.

    Without this every device would factorize every matrix, since XLA has no sharded
    factorizations. The matrices arrive sharded along their columns. One all-to-all
    gives each device some complete matrices, and the results return sharded along
    their rows. The bits are those of one device that does all the work.

    Args:
      f: to a tree of arrays (L, m, r); it treats each matrix by itself.
      each: a tree of arrays (L, ...); f gets a share of L. The first matrices are
        repeated so that the number of devices divides L.
      common: a tree of arrays that every call of f gets.
    """
    count = len(jax.tree.leaves(each)[0])
    if not spreads() or count == 1:
        return f(*jax.tree.map(replicated, (each, common)))
    mesh = jax.sharding.get_abstract_mesh()
    devices, share = mesh.size, P(mesh.axis_names)
    index = jnp.arange(-(-count // devices) * devices) % count

    def move(x: jax.Array) -> jax.Array:
        # Fenced, or other users of x would be computed in this sharding too.
        return jax.lax.with_sharding_constraint(fence(jnp.take(x, index, 0)), share)

    def on_each(each: Tree, common: Tree) -> Tree:
        token = _sharing.set(True)
        try:
            return f(each, common)
        finally:
            _sharing.reset(token)

    specs = {"in_specs": (share, P()), "out_specs": share}
    work = jax.shard_map(on_each, **specs, check_vma=False)

    def back(x: jax.Array) -> jax.Array:
        fits = [i for i in range(1, x.ndim) if x.shape[i] % devices == 0]
        spec = P(*(None,) * fits[0], mesh.axis_names) if fits else P()
        return jax.lax.with_sharding_constraint(x, spec)[:count]

    return jax.tree.map(back, work(jax.tree.map(move, each), common))


def on_every_device(f: Callable[[Tree], Tree], each: Tree) -> Tree:
    """f(each), computed completely by every device, with the bits of one device."""
    if not spreads():
        return f(each)
    work = jax.shard_map(f, in_specs=P(), out_specs=P(), check_vma=False)
    return work(jax.tree.map(replicated, each))


def replicated(x: jax.Array) -> jax.Array:
    """x on every device of the mesh in context, or x itself outside a mesh context.

    Sums over a replicated array round the same way whatever its sharding was.
    """
    if not spreads():
        return x
    # Fenced, or the compiler would replicate what x is computed from as well, and with
    # it the moments and the update of every step.
    return jax.lax.with_sharding_constraint(fence(x), P())
