"""In and back: the gradient into the subspace, the step out of it."""

import jax.numpy as jnp
import optax

from lowrank_optax.core.aliases import Number
from lowrank_optax.core.frame import Frame
from lowrank_optax.core.trees import map_frames


def project() -> optax.GradientTransformation:
    """Projects the gradient: G~ = S^T G, (*batch, m, n) to (*batch, r, n).

    (GrassWalk paper, eq. 1.) Reads a Frame's `gradient` and `basis`, sets `low`.

    Raises:
      ValueError: at update, if no basis rule stands before it in the chain.

    Example:
      >>> stages = optax.chain(lro.dominant_svd(), lro.project(),
      ...     lro.in_subspace(optax.scale_by_adam()), lro.project_back(scale=0.25))
    """

    def down(frame: Frame) -> Frame:
        if frame.low is not None:  # already summed in the subspace over micro-batches
            return frame
        return frame.replace(low=frame.down(frame.gradient))

    return optax.stateless(lambda frames, _: map_frames(down, frames))


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
        low_step = frame.need("low_step")
        return frame.replace(step=frame.up(jnp.multiply(scale, low_step)))

    return optax.stateless(lambda frames, _: map_frames(back, frames))
