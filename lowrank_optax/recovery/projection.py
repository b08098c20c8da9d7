"""In and back: the gradient into the subspace, the step out of it."""

import jax.numpy as jnp
import optax

from lowrank_optax.core.aliases import Number
from lowrank_optax.core.frame import Frame, are_coordinates
from lowrank_optax.core.linalg import row_squares, rows_above_by
from lowrank_optax.core.resolution import row_resolution
from lowrank_optax.core.stage import check_first, stateless_stage


def project() -> optax.GradientTransformation:
    """Projects the gradient: G~ = S^T G, (*batch, m, n) to (*batch, r, n).

    (GrassWalk paper, eq. 1.) Reads a Frame's `gradient` and `basis`, sets `low`.

    In an SVD's basis, a gradient of rank below r (few tokens) has rows that are only
    rounding error. Adam would step along them as far as along the others. So a row
    below `row_resolution` times ||G~||_F is set to zero.

    Raises:
      ValueError: at update, if no basis rule stands before it in the chain.

    Example:
      >>> stages = optax.chain(lro.dominant_svd(), lro.project(),
      ...     lro.in_subspace(optax.scale_by_adam()), lro.project_back(scale=0.25))
    """

    def down(frame: Frame) -> Frame:
        low = frame.low  # already summed in the subspace over microbatches
        if low is None:
            low = frame.down(frame.gradient)
        exact = frame.full_rank or frame.folded
        if exact or are_coordinates(frame.need("basis")):
            return frame.replace(low=low)
        squares = row_squares(low)
        low = rows_above_by(squares, low, row_resolution(frame))
        return frame.replace(low=low, low_squares=squares)

    return stateless_stage(down)


def project_back(scale: Number = 1.0) -> optax.GradientTransformation:
    """Projects the step back to full space: step = scale S G~^O (GaLore).

    (SARA paper, section 2: N = alpha P N~.) Reads a Frame's `low_step`, sets `step`.
    Leaves at full rank are not scaled.

    Args:
      scale: alpha.

    Raises:
      ValueError: at update, if no step (`in_subspace`, `rotate_moments`) stands before
        it in the chain.

    Example:
      >>> stages = optax.chain(lro.dominant_svd(), lro.project(),
      ...     lro.in_subspace(optax.scale_by_adam()), lro.project_back(scale=0.25))
    """

    def back(frame: Frame) -> Frame:
        check_first(frame, "step")
        low_step = frame.need("low_step")
        return frame.replace(step=frame.up(jnp.multiply(scale, low_step)))

    return stateless_stage(back)
