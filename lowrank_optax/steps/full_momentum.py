"""Step: Adam in the subspace, its first moment kept in full space (COSMOS)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.core.aliases import Number
from lowrank_optax.core.frame import Frame
from lowrank_optax.core.linalg import average_weight, row_squares, rows_above_by
from lowrank_optax.core.resolution import row_resolution
from lowrank_optax.core.sharding import low_zeros
from lowrank_optax.core.stage import Clock, check_first, timed_frame_stage


class FullMomentumState(NamedTuple):
    """State of `scale_by_full_momentum`; False at leaves of full rank.

    Attributes:
      momentum: M, (*batch, m, n).
      second: V, (*batch, r, n).
    """

    momentum: optax.Params
    second: optax.Params


def scale_by_full_momentum(
    b1: Number = 0.9, b2: Number = 0.95, eps: Number = 1e-8
) -> optax.GradientTransformationExtraArgs:
    """Adam in the subspace, with a first moment of the full gradient (COSMOS).

        M <- b1 M + (1 - b1) G                      (m, n)
        V <- b2 V + (1 - b2) (S^T G)^2              (r, n), squares entry by entry
        G~^O = (S^T M / (1 - b1^t)) / (sqrt(V / (1 - b2^t)) + eps)
        G <- M,   G~ <- S^T M                       for the way back

    so that a residual after it is M - S S^T M (Liu et al. 2025, "COSMOS", arXiv
    2502.17410, Algorithm 1). M needs no rotation. V is not rotated, as in the source.
    It stands after `project`, in place of `in_subspace`. State of a matrix: mn + nr
    numbers.

    Deviations: eps is added to the root, as in Adam and in the released code; the paper
    adds it to V. Entries whose V is zero do not move. Rows of S^T M below
    `row_resolution`, which are rounding, are set to zero.

    Args:
      b1: decay rate of M.
      b2: decay rate of V.
      eps: added to the root of V.

    Raises:
      ValueError: at update, without `project` before it, after another step, outside
        `low_rank`, or where only S^T G exists.

    Example:
      >>> stages = optax.chain(lro.dominant_svd(), lro.project(),
      ...     lro.steps.scale_by_full_momentum(), lro.spectral_residual(0.5))
    """

    def one(
        frame: Frame, m: jax.Array, v: jax.Array, now: Clock
    ) -> tuple[Frame, jax.Array, jax.Array]:
        check_first(frame, "low_step")
        low = frame.need("low")
        weight1, weight2 = (
            average_weight(1 - jnp.asarray(b, v.dtype), now.step + 1) for b in (b1, b2)
        )
        m = b1 * m + (1 - b1) * frame.gradient
        v = b2 * v + (1 - b2) * jnp.square(low)
        seen = frame.down(m)
        squares = row_squares(seen)
        if not frame.full_rank:
            seen = rows_above_by(squares, seen, row_resolution(frame))
        root = jnp.sqrt(v / weight2) + eps
        step = jnp.where(v > 0, seen / weight1 / root, 0)
        frame = frame.replace(gradient=m, low=seen, low_squares=squares)
        return frame.replace(low_step=step), m, v

    def zeros(frame: Frame) -> jax.Array:
        return jnp.zeros_like(frame.gradient)

    return timed_frame_stage(FullMomentumState, one, zeros, low_zeros)
