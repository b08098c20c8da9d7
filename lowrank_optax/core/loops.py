"""Loops and conditionals that `jax.vmap` leaves whole."""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from lowrank_optax.core.aliases import Tree

T = TypeVar("T")


def per_matrix(f: Callable[..., T], x: jax.Array, *others: jax.Array) -> T:
    """`f` on each matrix of x (*batch, m, n), with its part of `others`, in a loop.

    `jax.vmap` makes the loop longer, and does not batch what is in it.
    """
    batch = x.shape[:-2]
    rows = [y.reshape(-1, *y.shape[len(batch) :]) for y in (x, *others)]
    # What f closes over may be batched, so it is passed by the side of the rows.
    call, closed_over = opened(f, *(y[0] for y in rows))

    @jax.custom_batching.custom_vmap
    def run(rows: list[jax.Array], groups: list[jax.Array]) -> T:
        count = len(rows[0])

        def one(i: jax.Array, *row: jax.Array) -> T:
            return call(*row, [y[i * len(y) // count] for y in groups])

        if count == 1:
            only = one(jnp.int32(0), *(y[0] for y in rows))
            return jax.tree.map(lambda y: y[None], only)
        return jax.lax.map(lambda row: one(*row), (jnp.arange(count), *rows))

    @run.def_vmap
    def _(size: int, batched: Tree, rows: Tree, groups: Tree) -> tuple[Tree, Tree]:
        longer = [merged(y, size, b) for y, b in zip(rows, batched[0], strict=True)]
        own = [in_groups(y, size, b) for y, b in zip(groups, batched[1], strict=True)]
        out = run(longer, own)
        out = jax.tree.map(lambda y: y.reshape(size, -1, *y.shape[1:]), out)
        return out, jax.tree.map(lambda _: True, out)

    out = run(rows, [jnp.asarray(y)[None] for y in closed_over])
    return jax.tree.map(lambda y: y.reshape(*batch, *y.shape[1:]), out)


def cond_any(
    which: jax.Array, then: Callable[[], Tree], otherwise: Callable[[], Tree]
) -> Tree:
    """`then()` if any of `which` is True, else `otherwise()`.

    Under `jax.vmap` all calls decide together, where it would run both branches of a
    `jax.lax.cond`. So a call may take `then` for the sake of another one.
    """
    (yes, yes_args), (no, no_args) = opened(then), opened(otherwise)
    return _decided(yes, no)(which, yes_args, no_args)


def _decided(yes: Callable[..., Tree], no: Callable[..., Tree]) -> Callable[..., Tree]:
    @jax.custom_batching.custom_vmap
    def run(which: jax.Array, yes_args: Tree, no_args: Tree) -> Tree:
        return jax.lax.cond(
            jnp.any(which), lambda a, _: yes(a), lambda _, b: no(b), yes_args, no_args
        )

    @run.def_vmap
    def _(size: int, batched: Tree, *args: Tree) -> tuple[Tree, Tree]:
        both = (
            _mapped(f, size, b) for f, b in zip((yes, no), batched[1:], strict=True)
        )
        out = _decided(*both)(*args)
        return out, jax.tree.map(lambda _: True, out)

    return run


def _mapped(f: Callable[..., Tree], size: int, batched: Tree) -> Callable[..., Tree]:
    """f over the first axis of the arrays that are batched; the others stay."""
    axes = 0, [0 if b else None for b in batched]
    over = jax.vmap(lambda _, arrays: f(arrays), in_axes=axes)
    return lambda arrays: over(jnp.arange(size), arrays)


def opened(f: Callable[..., Tree], *args: Tree) -> tuple[Callable[..., Tree], Tree]:
    """f with the traced arrays that it closes over as further arguments, and these."""
    # jax.closure_convert leaves those that vmap batches, and caches f with its arrays.
    closed, shapes = jax.make_jaxpr(f, return_shape=True)(*args)
    traced = [isinstance(x, Tracer) for x in closed.consts]
    structure = jax.tree.structure(shapes)
    jaxpr, fixed = (
        closed.jaxpr,
        [None if t else x for x, t in zip(closed.consts, traced, strict=True)],
    )

    def call(*args_and_traced: Tree) -> Tree:
        *args, arrays = args_and_traced
        arrays = iter(arrays)
        consts = [
            next(arrays) if is_traced else x
            for x, is_traced in zip(fixed, traced, strict=True)
        ]
        run = jaxpr_as_fun(ClosedJaxpr(jaxpr, consts))
        return structure.unflatten(run(*jax.tree.leaves(args)))

    return call, [x for x in closed.consts if isinstance(x, Tracer)]


def merged(x: jax.Array, size: int, batched: bool) -> jax.Array:
    """(size, L, ...), or (L, ...) for each, to (size * L, ...)."""
    if not batched:
        x = jnp.broadcast_to(x[None], (size, *x.shape))
    return x.reshape(-1, *x.shape[2:])


def in_groups(x: jax.Array, size: int, batched: bool) -> jax.Array:
    """`merged`, but what all members have in common stays one row for all of them."""
    return x if len(x) == 1 and not batched else merged(x, size, batched)
