"""Where and back at once: adds what the projection loses to the next gradient."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.core.aliases import Number
from lowrank_optax.core.frame import Frame
from lowrank_optax.core.stage import around, check_wrapped


class ErrorFeedbackState(NamedTuple):
    """State of `error_feedback`.

    Attributes:
      error: E, (*batch, m, n), the size of the gradient; False at leaves of full rank.
      inner_state: the state of the basis rule and the projection.
    """

    error: optax.Params
    inner_state: optax.OptState


def error_feedback(
    stages: optax.GradientTransformation, *, b1: Number = 0.908
) -> optax.GradientTransformationExtraArgs:
    """Adds to each gradient what the last step's projection lost (LDAdam).

    Wraps a basis rule and `project`. With C = S_t^T S_{t-1}:

        G_t <- G_t + E_{t-1}
        S_t, G~_t from the stages
        E_t = G_t - S_t G~_t + b1 / (1 - b1) (S_{t-1} M_{t-1} - S_t C M_{t-1})

    The last term is what the first moment loses when it is rotated (Robert et al. 2025,
    "LDAdam", section 3). It is right for a step that rotates its first moment and
    averages like Adam, such as `rotate_moments(optax.scale_by_adam())`. E has the
    gradient's size, so this saves no memory against a momentum of full rank;
    `memory_report` shows it.

    Args:
      stages: a basis rule, then `project()`, chained.
      b1: the decay rate of M.

    Raises:
      ValueError: at update, if the basis is not orthonormal, if the stages lack a basis
        rule or `project`, if the step accumulates gradients, or if a later stage
        recovers the residual too.

    Example:
      >>> where = optax.chain(lro.bases.power_iterate(), lro.project())
      >>> stages = optax.chain(lro.error_feedback(where),
      ...     lro.rotate_moments(optax.scale_by_adam(0.908, 0.99)), lro.project_back())
    """

    def add(frame: Frame, e: jax.Array) -> Frame:
        return frame.replace(gradient=frame.gradient + e)

    def lost(frame: Frame, e: jax.Array) -> tuple[Frame, jax.Array]:
        check_wrapped(frame, "error_feedback()")
        if not frame.full_rank:
            e = _lost(frame, b1)
        reason = "error_feedback() adds the residual to the next gradient already"
        return frame.replace(no_residual=reason), e

    def zero(frame: Frame) -> jax.Array:
        return jnp.zeros_like(frame.gradient)

    return around(stages, ErrorFeedbackState, zero, add, lost)


def _lost(frame: Frame, b1: Number) -> jax.Array:
    """E_t, from the gradient with the last error in it."""
    frame.check_residual("error_feedback()")
    # Both parts in one product each: E = (G + S_old M') - S (G~ + C M').
    low, full = frame.need("low"), frame.gradient
    if frame.momentum is not None:
        momentum = (b1 / (1 - b1)) * frame.momentum
        rotation = frame.need("rotation")
        low = low + jnp.matmul(rotation, momentum, precision="highest")
        old = frame.replace(basis=frame.need("previous"))
        full = full + old.up(momentum)
    return full - frame.up(low)
