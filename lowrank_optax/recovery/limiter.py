"""Back: Fira's norm-growth limiter, which the residual, APOLLO and others share."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.core.aliases import Number
from lowrank_optax.core.checks import check_limit
from lowrank_optax.core.frame import Frame
from lowrank_optax.core.sharding import shard_batch
from lowrank_optax.core.stage import frame_stage
from lowrank_optax.recovery.published import PAPER, Arithmetic


class LimiterState(NamedTuple):
    """State of stages with a limiter, such as `recover_residual`.

    Attributes:
      norm: ||Lambda_{t-1}||_F per matrix, (*batch,); negative before the first step;
        False at leaves of full rank.
    """

    norm: optax.Params


def no_norm_yet(frame: Frame) -> jax.Array:
    """-1 for each matrix, (*batch,): the limiter's norm before the first step."""
    none = jnp.full(frame.batch, -1.0, frame.gradient.dtype)
    return shard_batch(frame, none)


def clip_step_growth(limit: Number = 1.1) -> optax.GradientTransformationExtraArgs:
    """Limits how fast the norm of the step in the subspace grows.

    With the optimizer's output G~^O and zeta = `limit`:

        if ||G~^O_t|| > zeta ||G~^O_{t-1}||:
            G~^O_t <- G~^O_t zeta ||G~^O_{t-1}|| / ||G~^O_t||

    (Refael et al. 2025, "SUMO", Algorithm 1, block 3.) The first step has no limit. A
    zero step leaves the norm that limits the next step unchanged. The state is one
    number per matrix.

    Args:
      limit: zeta, the largest growth of the step's norm from step to step.

    Raises:
      ValueError: at update, if no step stands before it in the chain.

    Example:
      >>> stages = optax.chain(lro.dominant_svd(), lro.project(),
      ...     lro.in_subspace(optax.trace(0.9)), lro.recovery.clip_step_growth(),
      ...     lro.project_back())
    """
    check_limit(limit)

    def one(frame: Frame, last: jax.Array) -> tuple[Frame, jax.Array]:
        low_step = frame.need("low_step")
        norm = jnp.sqrt(jnp.sum(jnp.square(low_step), axis=(-2, -1)))
        factor = jnp.ones_like(norm)[..., None]
        factor, norm = limit_growth(factor, norm, last, limit)
        return frame.replace(low_step=factor[..., None] * low_step), norm

    return frame_stage(LimiterState, one, no_norm_yet)


# A step divided by the root of a running mean falls by more than this only
# for a small gradient: the mean's bias halves it in the first steps.
LARGEST_FALL = 0.2


def limit_growth(
    phi: jax.Array,
    norm: jax.Array,
    last: jax.Array,
    limit: Number,
    arithmetic: Arithmetic = PAPER,
    floor: Number = 0.0,
    fall: Number = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """Returns phi after the limiter, and the norm that limits the next step.

    phi is multiplied by zeta ||Lambda_{t-1}|| / ||Lambda_t|| where that is below 1, and
    by 0 where ||Lambda_t|| overflowed.

    Args:
      phi: (*batch, n) or (*batch, 1), the factors on the columns.
      norm: (*batch,), ||Lambda_t||.
      last: (*batch,), ||Lambda_{t-1}||; negative for no norm yet.
      limit: zeta.
      arithmetic: the variant's arithmetic.
      floor: the largest norm that counts as rounding; such a norm limits no later step.
      fall: a norm below this fraction of the last limits no later step either.
    """
    bound = limit * (last + arithmetic.norm_eps)
    grown = (last >= 0) & (norm > bound)
    factor = jnp.where(grown, bound / jnp.where(grown, norm, 1), 1)
    finite = jnp.isfinite(norm)
    factor = jnp.where(finite, factor, 0)
    after = jnp.where(finite, norm * factor, last)
    # A stored norm of zero would limit every later step to zero: one zero gradient
    # (an unused embedding row, a first step) would switch the stage off for good.
    if not arithmetic.stores_zero_norm:
        after = jnp.where(norm > jnp.maximum(floor, fall * last), after, last)
    # Where phi itself overflowed, 0 * phi is NaN; so a factor of 0 selects 0.
    phi = jnp.where(factor[..., None] > 0, phi * factor[..., None], 0)
    return phi, after
