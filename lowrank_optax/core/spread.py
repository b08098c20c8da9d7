"""Work on many matrices, spread over the devices of a mesh."""

from collections.abc import Callable
from contextvars import ContextVar
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

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


def over_devices(
    f: Callable[..., Tree], each: Tree, common: Tree = (), *, columns: bool = False
) -> Tree:
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
      columns: whether the results return sharded along their columns, as the matrices
        arrive, if these divide.
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
        axes = range(1, x.ndim)
        fits = [i for i in axes[:: -1 if columns else 1] if x.shape[i] % devices == 0]
        spec = P(*(None,) * fits[0], mesh.axis_names) if fits else P()
        return jax.lax.with_sharding_constraint(x, spec)[:count]

    return jax.tree.map(back, work(jax.tree.map(move, each), common))


def on_every_device(f: Callable[[Tree], Tree], each: Tree) -> Tree:
    """f(each), computed completely by every device, with the bits of one device."""
    if not spreads():
        return f(each)
    work = jax.shard_map(f, in_specs=P(), out_specs=P(), check_vma=False)
    return work(jax.tree.map(replicated, each))


def whole_matrices(
    f: Callable[[jax.Array], Tree], x: jax.Array, dtype: DTypeLike | None = None
) -> Tree:
    """f(x), with whole matrices of x (*batch, m, n) distributed over the devices.

    Without this every product of a matrix with itself sums over all devices. Under
    `jax.vmap` the matrices of all its calls are distributed, so that the layers of a
    stack may be updated one by one. The bits are those of one device. A single matrix
    stays as it is sharded.

    Args:
      f: to a tree of arrays (*batch, ...); it treats each matrix by itself.
      x: the matrices.
      dtype: what f rounds x to before anything else; they move in it. None for that of
        x.
    """
    if not spreads():
        return f(x)
    every = jax.custom_batching.custom_vmap(partial(_on_whole, f, dtype))

    @every.def_vmap
    def _(count: int, batched: list[bool], x: jax.Array) -> tuple[Tree, Tree]:
        del count, batched  # the only argument: it has the axis
        out = whole_matrices(f, x, dtype)
        return out, jax.tree.map(lambda _: True, out)

    return every(x)


def _on_whole(
    f: Callable[[jax.Array], Tree], dtype: DTypeLike | None, x: jax.Array
) -> Tree:
    batch, flat = x.shape[:-2], x.reshape(-1, *x.shape[-2:])
    if len(flat) == 1:
        return f(x)

    def on_each(part: jax.Array, _: Tree) -> Tree:
        return f(part.astype(x.dtype))

    moved = flat if dtype is None else flat.astype(dtype)
    out = over_devices(on_each, moved, columns=True)
    return jax.tree.map(lambda y: y.reshape(*batch, *y.shape[1:]), out)


def replicated(x: jax.Array) -> jax.Array:
    """x on every device of the mesh in context, or x itself outside a mesh context.

    Sums over a replicated array round the same way whatever its sharding was.
    """
    if not spreads():
        return x
    # Fenced, or the compiler would replicate what x is computed from as well, and with
    # it the moments and the update of every step.
    return jax.lax.with_sharding_constraint(fence(x), P())
