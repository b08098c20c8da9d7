"""Back: what the residual's factors share, such as its polar factor."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lowrank_optax.core.frame import Frame
from lowrank_optax.core.linalg import largest
from lowrank_optax.core.resolution import resolution
from lowrank_optax.core.spread import whole_matrices

Factor = Callable[..., tuple[jax.Array, jax.Array]]
"""From R / c and `dtype` to the factor, and ||R / c||_F^2, (*batch, 1, 1)."""


def residual_factor(
    frame: Frame, factor: Factor, dtype: DTypeLike | None
) -> tuple[jax.Array, jax.Array]:
    """A factor of R = G - S G~, such as its polar factor, where R is no rounding.

    Args:
      frame: below full rank.
      factor: of R / c, whose squares are finite.
      dtype: of the products' factors; a float64 gradient has its products in float64.

    Returns:
      The factor, zero where R is below the `resolution` of G, and whether it is not,
      bool (*batch, 1, 1).
    """
    narrow = None if frame.gradient.dtype == jnp.float64 else dtype
    found = whole_matrices(partial(factor, dtype=narrow), _residual(frame), narrow)
    return _resolved(frame, *found)


def _residual(frame: Frame) -> jax.Array:
    """R / c, with c the size of G~; only that of R itself would need a pass."""
    low = frame.need("low")
    return (frame.gradient - frame.up(low)) / largest(low)


def _resolved(
    frame: Frame, outside: jax.Array, squared: jax.Array
) -> tuple[jax.Array, jax.Array]:
    low = frame.need("low")
    low = low / largest(low)
    # S is orthonormal: ||G||^2 = ||R||^2 + ||G~||^2.
    total = squared + jnp.sum(jnp.square(low), axis=(-2, -1), keepdims=True)
    resolved = squared > resolution(frame) ** 2 * total
    # Where squares overflow, the factor may be NaN: there is no step either.
    return jnp.where(resolved, outside, 0), resolved


def add_outside(
    frame: Frame, low_step: jax.Array, size: jax.Array, outside: jax.Array
) -> jax.Array:
    """S G~^O + size (I - S S^T) O, with size (*batch, 1, 1)."""
    # Rounding in the subspace, where R has nothing, grows with each Newton-Schulz step.
    inside = low_step - size * _down(frame, outside)
    return frame.up(inside) + size * outside.astype(low_step.dtype)


def _down(frame: Frame, outside: jax.Array) -> jax.Array:
    """S^T O in the dtype of the gradient.

    S^T O is small. On an accelerator that rounds products anyway, the factors keep the
    narrow dtype of O: half of the traffic, and an error of 6e-4 of O.
    """
    wide = frame.gradient.dtype

    def exact(o: jax.Array) -> jax.Array:
        return frame.down(o.astype(wide))

    def narrow(o: jax.Array) -> jax.Array:
        return frame.down(o).astype(wide)

    if frame.precision is not None or outside.dtype == wide:
        return exact(outside)
    return jax.lax.platform_dependent(outside, cpu=exact, default=narrow)


def check_dtype(dtype: DTypeLike | None) -> None:
    """ValueError for float16."""
    if dtype is not None and jnp.dtype(dtype) == jnp.float16:
        raise ValueError(
            "dtype=float16: squares over- and underflow in it; choose bfloat16, "
            "float32 or None"
        )
