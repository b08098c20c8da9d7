"""Blocks of neighboring rows: their sums, and one row for each of them repeated."""

import jax
import jax.numpy as jnp
import numpy as np


def block_sizes(m: int, like: jax.Array) -> jax.Array:
    """The number of rows in each of r blocks of m rows, (1..., r, 1).

    The sizes differ by at most one, and the larger blocks come first.

    Args:
      m: the number of rows.
      like: (*batch, r, k), for the number of blocks, of axes, and the dtype.
    """
    r = like.shape[-2]
    size, more = divmod(m, r)
    sizes = np.where(np.arange(r) < more, size + 1, size)[:, None]
    return jnp.asarray(np.expand_dims(sizes, (*range(like.ndim - 2),)), like.dtype)


def block_sums(x: jax.Array, r: int) -> jax.Array:
    """The sums of r blocks of rows: (*batch, m, k) to (*batch, r, k)."""
    *batch, m, k = x.shape
    size, more = divmod(m, r)
    split = more * (size + 1)
    larger = x[..., :split, :].reshape(*batch, more, size + 1, k)
    others = x[..., split:, :].reshape(*batch, r - more, size, k)
    parts = [jnp.sum(part, axis=-2) for part in (larger, others) if part.shape[-3]]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-2)


def repeat_in_blocks(y: jax.Array, m: int) -> jax.Array:
    """Each row as often as its block has rows: (*batch, r, k) to (*batch, m, k)."""
    *batch, r, k = y.shape
    size, more = divmod(m, r)

    def repeated(rows: jax.Array, times: int) -> jax.Array:
        count = rows.shape[-2]
        wide = jnp.broadcast_to(rows[..., None, :], (*batch, count, times, k))
        return wide.reshape(*batch, count * times, k)

    if not more:
        return repeated(y, size)
    parts = repeated(y[..., :more, :], size + 1), repeated(y[..., more:, :], size)
    return jnp.concatenate(parts, axis=-2)
