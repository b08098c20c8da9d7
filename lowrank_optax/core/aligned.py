"""Zeros at the end of a matrix, up to a size that products run fastest with."""

import jax
import jax.numpy as jnp

UNIT = 8
"""On an H200, S o with 5461 columns takes 1.8 times as long as with 5464 (`up, add` in
docs/results/step_time.md): rows have to begin at multiples of 16 bytes."""

SMALL = 512
"""Sizes below this gain nothing."""


def aligned(size: int) -> int:
    """`size`, or the next multiple of `UNIT` for a large one.

    Example:
      >>> aligned(5461), aligned(2048), aligned(61)
      (5464, 2048, 61)
    """
    return size if size < SMALL else -(-size // UNIT) * UNIT


def pad_columns(x: jax.Array) -> jax.Array:
    """(*batch, m, n) with zero columns, up to `aligned(n)`."""
    return _pad(x, x.shape[-2], aligned(x.shape[-1]))


def pad_matrix(x: jax.Array) -> jax.Array:
    """(*batch, m, n) with zero rows and columns, up to `aligned` of both."""
    return _pad(x, aligned(x.shape[-2]), aligned(x.shape[-1]))


def _pad(x: jax.Array, m: int, n: int) -> jax.Array:
    if (m, n) == x.shape[-2:]:
        return x
    around = [(0, 0)] * (x.ndim - 2)
    return jnp.pad(x, [*around, (0, m - x.shape[-2]), (0, n - x.shape[-1])])
