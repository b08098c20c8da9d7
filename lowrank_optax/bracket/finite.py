"""Finite gradients, and steps that are skipped."""

import functools
import operator
from typing import TypeVar

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.core.frame import Frame, are_coordinates, is_frame
from lowrank_optax.core.trees import squared_norm

T = TypeVar("T")


def is_finite(gradient: optax.Updates) -> jax.Array:
    """() bool: whether every entry, and the sum of their squares, is finite."""
    return jnp.isfinite(squared_norm(gradient))


def finite_in_subspace(
    updates: optax.Updates, frames: optax.Updates, out: optax.Updates
) -> jax.Array:
    """`is_finite` of each leaf, from G~ in place of G where that says as much.

    Each entry of G enters every entry of its column of G~ = S^T G, and a NaN or an Inf
    survives any product, even with zero. So the r rows of G~ tell as much as the m rows
    of G, for a fraction of the reads. Not where S is coordinates; and where a stage has
    replaced G, both are read.

    Args:
      updates: the gradients as `low_rank` got them.
      frames: the Frames before the stages.
      out: the Frames after them.
    """

    def square(x: jax.Array, f: Frame | jax.Array, o: Frame | jax.Array) -> jax.Array:
        seen = [x]
        if is_frame(o) and is_frame(f) and o.gradient is not f.gradient:
            seen = [x, o.gradient]
        elif is_frame(o) and o.low is not None and not o.full_rank:
            seen = [x if are_coordinates(o.need("basis")) else o.low]
        squares = (jnp.sum(jnp.square(at_least_f32(x))) for x in seen)
        return functools.reduce(operator.add, squares)

    return _all_finite(jax.tree.leaves(jax.tree.map(square, updates, frames, out)))


def _all_finite(squares: list[jax.Array]) -> jax.Array:
    """() bool: whether none of these scalars, all from zero up, is NaN or Inf.

    A sort has either last, and XLA fuses no sort. It would copy any other sum of all
    scalars into every output that the flag decides on: galore's program for 84
    matrices was six times as large.
    """
    if not squares:
        return jnp.array(True)
    return jnp.isfinite(jnp.sort(jnp.stack(squares))[-1])


def if_accepted(accept: bool | jax.Array, new: T, otherwise: T | None = None) -> T:
    """`new` if `accept`, else `otherwise`, or zeros; just `new` for True itself."""
    if accept is True:
        return new
    if otherwise is None:
        otherwise = jax.tree.map(jnp.zeros_like, new)
    return jax.tree.map(functools.partial(jnp.where, accept), new, otherwise)


def at_least_f32(x: jax.Array) -> jax.Array:
    """x in float32 where it is narrower; integers stay."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
