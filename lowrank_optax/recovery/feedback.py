"""Where and back at once: what the projection loses enters the next gradient."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.core.frame import BASIS_RULE, Frame
from lowrank_optax.core.stage import stage
from lowrank_optax.core.trees import map_frames, nothing, update_frames


class ErrorFeedbackState(NamedTuple):
    """State of `error_feedback`.

    Attributes:
      error: E, (*batch, m, n), the size of the gradient; False at leaves of full rank.
      inner_state: of the basis rule and the projection.
    """

    error: Any
    inner_state: Any


def error_feedback(
    stages: optax.GradientTransformation, *, b1: float | jax.Array = 0.908
) -> optax.GradientTransformationExtraArgs:
    """Adds to each gradient what the last step's projection lost (LDAdam).

    Around a basis rule and `project`, with C = S_t^T S_{t-1}:

        G_t <- G_t + E_{t-1}
        S_t, G~_t from the stages
        E_t = G_t - S_t G~_t + b1 / (1 - b1) (S_{t-1} M_{t-1} - S_t C M_{t-1})

    The last term is what the first moment lost when it was turned (Robert et al. 2025,
    "LDAdam", section 3). It supposes a step that turns it, and an average such as
    Adam's: `rotate_moments(optax.scale_by_adam())`; with others E is off by that term.
    E has the gradient's size: this saves no memory against a momentum of full rank,
    which `memory_report` shows.

    Args:
      stages: a basis rule, then `project()`, chained.
      b1: the decay rate of M.

    Raises:
      ValueError: for a basis that is not orthonormal, or stages without a basis rule
        and `project`. Stages that give the residual back refuse it, and so does a
        step that accumulates gradients.

    Example:
      >>> import lowrank_optax as lro
      >>> stages = optax.chain(
      ...     lro.error_feedback(optax.chain(lro.bases.power_iterate(), lro.project())),
      ...     lro.rotate_moments(optax.scale_by_adam(0.908, 0.99)), lro.project_back())
    """
    stages = optax.with_extra_args_support(stages)

    def init(params: optax.Params) -> ErrorFeedbackState:
        def zero(frame: Frame) -> jax.Array:
            return nothing() if frame.full_rank else jnp.zeros_like(frame.gradient)

        errors = map_frames(zero, params, plain=nothing)
        return ErrorFeedbackState(errors, stages.init(params))

    def update(
        updates: optax.Updates,
        state: ErrorFeedbackState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ErrorFeedbackState]:
        def add(frame: Frame, e: jax.Array) -> Frame:
            return (
                frame if frame.full_rank else frame.replace(gradient=frame.gradient + e)
            )

        def lost(frame: Frame, e: jax.Array) -> tuple[Frame, jax.Array]:
            if not frame.full_rank:
                e = _lost(frame, b1)
            reason = "error_feedback() gives the residual back already"
            return frame.replace(no_residual=reason), e

        frames, inner_state = stages.update(
            map_frames(add, updates, state.error),
            state.inner_state,
            params,
            **extra_args,
        )
        frames, errors = update_frames(lost, frames, state.error)
        return frames, ErrorFeedbackState(errors, inner_state)

    return stage(init, update)


def _lost(frame: Frame, b1: float | jax.Array) -> jax.Array:
    """E_t, of the gradient with the last error in it."""
    frame.check_residual("error_feedback()")
    inside, outside = frame.need("low", "project()"), frame.gradient
    if frame.momentum is not None:
        kept = (b1 / (1 - b1)) * frame.momentum
        rotation = frame.need("rotation", BASIS_RULE)
        inside = inside + jnp.matmul(rotation, kept, precision="highest")
        old = frame.replace(basis=frame.need("previous", BASIS_RULE))
        outside = outside + old.up(kept)
    return outside - frame.up(inside)
