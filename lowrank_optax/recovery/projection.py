"""In and back: the gradient into the subspace, the step out of it."""

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.core.frame import Frame
from lowrank_optax.core.trees import map_frames


def project() -> optax.GradientTransformation:
    """G~ = S^T G: (*batch, m, n) to (*batch, r, n) (GrassWalk paper, eq. 1).

    Reads a Frame's `gradient` and `basis`, sets `low`.

    Raises:
      ValueError: when no basis rule stands before it.

    Example:
      >>> import lowrank_optax as lro
      >>> stages = optax.chain(lro.dominant_svd(), lro.project(),
      ...     lro.in_subspace(optax.scale_by_adam()), lro.project_back(scale=0.25))
    """

    def into(frame: Frame) -> Frame:
        if frame.low is not None:  # summed over micro-batches
            return frame
        return frame.replace(low=frame.down(frame.gradient))

    return optax.stateless(lambda frames, _: map_frames(into, frames))


def project_back(
    scale: float | jax.Array = 1.0,
) -> optax.GradientTransformation:
    """The step back in full space, scale * S G~^O, and nothing else (GaLore).

    N = alpha P N~ (SARA paper, section 2). Reads a Frame's `low_step`, sets `step`.
    Leaves at full rank are not scaled.

    Args:
      scale: alpha.

    Raises:
      ValueError: when no step (`in_subspace`, `rotate_moments`) stands before it.

    Example:
      >>> import lowrank_optax as lro
      >>> stages = optax.chain(lro.dominant_svd(), lro.project(),
      ...     lro.in_subspace(optax.scale_by_adam()), lro.project_back(scale=0.25))
    """

    def back(frame: Frame) -> Frame:
        low_step = frame.need("low_step", "in_subspace() or rotate_moments()")
        return frame.replace(step=frame.up(jnp.multiply(scale, low_step)))

    return optax.stateless(lambda frames, _: map_frames(back, frames))
