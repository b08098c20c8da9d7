"""Back: what the residual's factors share, such as its polar factor."""

import math
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.typing import DTypeLike

from lowrank_optax.core.aliases import Tree
from lowrank_optax.core.frame import Frame
from lowrank_optax.core.linalg import column_norms_squared, largest, select
from lowrank_optax.core.resolution import resolution
from lowrank_optax.core.spread import whole_matrices

Factor = Callable[..., tuple[jax.Array, jax.Array]]
"""From R / c and `dtype` to the factor, and ||R / c||_F^2, (*batch, 1, 1)."""


def residual_factors(
    frames: Sequence[Frame],
    factor: Factor,
    dtype: DTypeLike | None,
    due: jax.Array | None = None,
) -> list[tuple[jax.Array, jax.Array]]:
    """A factor of each R = G - S G~, such as its polar factor, where R is no rounding.

    Args:
      frames: below full rank.
      factor: of R / c, whose squares are finite.
      dtype: of the products' factors; a float64 gradient has its products in float64.
      due: () bool, whether the factor is due; where it is not, the columns of R are
        normalized in its place. None where it always is.

    Returns:
      The factor, zero where R is below the `resolution` of G, and whether it is not,
      bool (*batch, 1, 1); of each frame.
    """
    narrow = [None if f.gradient.dtype == jnp.float64 else dtype for f in frames]
    residuals = list(map(_residual, frames))
    factors = [partial(factor, dtype=x) for x in narrow]
    if due is None:
        rows = zip(factors, residuals, narrow, strict=True)
        found = [whole_matrices(f, R, x) for f, R, x in rows]
    else:
        found = _alternate(frames, factors, due, residuals, narrow)
    return [_resolved(frame, *x) for frame, x in zip(frames, found, strict=True)]


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


def _alternate(
    frames: Sequence[Frame],
    factors: Sequence[Factor],
    due: jax.Array,
    residuals: Sequence[jax.Array],
    narrow: Sequence[DTypeLike | None],
) -> list[tuple[jax.Array, jax.Array]]:
    """The factors if `due`, and otherwise residuals with normalized columns.

    One conditional for all matrices, and for all members of a `jax.vmap`, under which
    both branches would run.
    """
    wide = [R.dtype for R in residuals]
    sizes = [math.sqrt(1 - f.rank / f.gradient.shape[-2]) for f in frames]

    @custom_vmap
    def run(
        due: jax.Array, residuals: list[jax.Array]
    ) -> list[tuple[jax.Array, jax.Array]]:
        exact = [R.astype(x) for R, x in zip(residuals, wide, strict=True)]

        def normalized() -> list[tuple[jax.Array, jax.Array]]:
            rows = zip(exact, sizes, narrow, strict=True)
            return [_normalized_columns(R, size, x) for R, size, x in rows]

        def factorized() -> list[tuple[jax.Array, jax.Array]]:
            rows = zip(factors, exact, narrow, strict=True)
            new = [whole_matrices(f, R, x) for f, R, x in rows]
            if not due.ndim:
                return new
            return jax.tree.map(partial(select, due), new, normalized())

        return jax.lax.cond(jnp.any(due), factorized, normalized)

    @run.def_vmap
    def _(size: int, batched: Tree, *args: Tree) -> tuple[Tree, Tree]:
        def spread(x: jax.Array, is_batched: bool) -> jax.Array:
            return x if is_batched else jnp.broadcast_to(x, (size, *x.shape))

        out = run(*jax.tree.map(spread, args, tuple(batched)))
        return out, jax.tree.map(lambda _: True, out)

    rows = zip(residuals, narrow, strict=True)
    return run(due, [R if x is None else R.astype(x) for R, x in rows])


def _normalized_columns(
    R: jax.Array, size: float, dtype: DTypeLike | None
) -> tuple[jax.Array, jax.Array]:
    """R / c with columns of one norm, in all of that of the polar factor.

    That has m - r singular values of one, so that a column has sqrt((m - r) / n), and
    `size` is sqrt((m - r) / m).
    """
    m, n = R.shape[-2:]
    squares = column_norms_squared(R)
    norms = jnp.sqrt(jnp.where(squares > 0, squares, 1))
    columns = size * math.sqrt(m / n) * R / norms[..., None, :]
    squared = jnp.sum(squares, axis=-1)[..., None, None]
    return columns.astype(dtype or R.dtype), squared


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
