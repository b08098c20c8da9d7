"""Back: Fira's norm-growth limiter, which the residual and APOLLO share."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.core.frame import Frame
from lowrank_optax.core.sharding import shard_batch
from lowrank_optax.core.stage import simple_stage
from lowrank_optax.core.trees import map_frames, nothing, update_frames
from lowrank_optax.recovery.published import Arithmetic, arithmetic_of


class LimiterState(NamedTuple):
    """State of the stages with a limiter, `recover_residual` for example.

    Attributes:
      norm: ||Lambda_{t-1}||_F per matrix, (*batch,); negative before the first step;
        False at leaves of full rank.
    """

    norm: Any


def limited_stage(
    one: Callable[[Frame, jax.Array], tuple[Frame, jax.Array]],
) -> optax.GradientTransformationExtraArgs:
    """A stage from `one(frame, last norm) -> (frame, norm)`, with a `LimiterState`."""

    def init(params: optax.Params) -> LimiterState:
        def before(frame: Frame) -> jax.Array:
            none = jnp.full(frame.batch, -1.0, frame.gradient.dtype)
            return shard_batch(frame, none)

        return LimiterState(map_frames(before, params, plain=nothing))

    def update(
        frames: optax.Updates, state: LimiterState
    ) -> tuple[optax.Updates, LimiterState]:
        frames, norm = update_frames(one, frames, state.norm)
        return frames, LimiterState(norm)

    return simple_stage(init, update)


def clip_step_growth(
    limit: float | jax.Array = 1.1,
) -> optax.GradientTransformationExtraArgs:
    """The step in the subspace, its norm limited to grow by `limit` a step.

    With G~^O and zeta = `limit`, as Fira limits the residual:

        if ||G~^O_t|| > zeta ||G~^O_{t-1}||:
            G~^O_t <- G~^O_t zeta ||G~^O_{t-1}|| / ||G~^O_t||

    (Refael et al. 2025, "SUMO", Algorithm 1, block 3.) The first step is free, and a
    zero one leaves the norm that the next one is limited against. State of a matrix:
    one number.

    Args:
      limit: zeta, the largest growth of the step's norm from step to step.

    Raises:
      ValueError: at update, when no step stands before it.

    Example:
      >>> import lowrank_optax as lro, optax
      >>> stages = optax.chain(lro.dominant_svd(), lro.project(),
      ...     lro.in_subspace(optax.trace(0.9)), lro.recovery.clip_step_growth(),
      ...     lro.project_back())
    """

    def one(frame: Frame, last: jax.Array) -> tuple[Frame, jax.Array]:
        low_step = frame.need("low_step", "in_subspace() or rotate_moments()")
        norm = jnp.sqrt(jnp.sum(jnp.square(low_step), axis=(-2, -1)))
        factor = jnp.ones_like(norm)[..., None]
        factor, norm = limit_growth(factor, norm, last, limit, arithmetic_of("paper"))
        return frame.replace(low_step=factor[..., None] * low_step), norm

    return limited_stage(one)


def limit_growth(
    phi: jax.Array,
    norm: jax.Array,
    last: jax.Array,
    limit: float | jax.Array,
    arithmetic: Arithmetic,
    floor: float | jax.Array = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """phi after the limiter, and the norm that the next step is limited against.

    phi times zeta ||Lambda_{t-1}|| / ||Lambda_t|| where that is below 1; 0 where
    ||Lambda_t|| overflowed.

    Args:
      phi: (*batch, n), or (*batch, 1), the factors on the columns.
      norm: (*batch,), ||Lambda_t||.
      last: (*batch,), ||Lambda_{t-1}||; negative for no norm yet.
      limit: zeta.
      arithmetic: of the variant.
      floor: a norm up to this is rounding, and does not become the next one's bound.
    """
    bound = limit * (last + arithmetic.norm_eps)
    grown = (last >= 0) & (norm > bound)
    factor = jnp.where(grown, bound / jnp.where(grown, norm, 1), 1)
    usable = jnp.isfinite(norm)
    factor = jnp.where(usable, factor, 0)
    after = jnp.where(usable, norm * factor, last)
    # A zero gradient would bind every later step to a residual of nothing.
    if not arithmetic.keeps_zero:
        after = jnp.where(norm > floor, after, last)
    # Even where phi overflowed.
    phi = jnp.where(factor[..., None] > 0, phi * factor[..., None], 0)
    return phi, after
