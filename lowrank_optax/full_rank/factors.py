"""How the low-rank factors of a moment begin: L = 0, R at random."""

import jax
import jax.numpy as jnp

from lowrank_optax.core.aliases import Key
from lowrank_optax.core.frame import Frame
from lowrank_optax.core.keys import canonical_key
from lowrank_optax.core.sharding import low_zeros, shard_along, shard_basis, spec_of


def left_zeros(frame: Frame) -> jax.Array:
    """L = 0, (*batch, m, r), sharded as a basis is."""
    return shard_basis(frame, jnp.zeros(frame.basis_shape, frame.gradient.dtype))


def random_right(frame: Frame, key: Key, moment: int = 0) -> jax.Array:
    """R (*batch, r, n), its entries normal with variance 1 / n, sharded as S^T G is.

    Drawn from the path. The layers of a stack share the draw, so that it is the same
    for all of them together and for one at a time.
    """
    own = jax.random.fold_in(canonical_key(key), frame.number)
    shape, n = frame.low_shape, frame.low_shape[-1]
    like = low_zeros(frame)
    drawn = jax.random.normal(jax.random.fold_in(own, moment), shape[-2:], like.dtype)
    drawn = jnp.broadcast_to(drawn / jnp.sqrt(max(n, 1)).astype(like.dtype), shape)
    return shard_along(drawn, spec_of(like), of=frame.gradient)
