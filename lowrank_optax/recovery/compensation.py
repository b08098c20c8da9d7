"""Back: the step, plus the residual with normalized columns (Alice)."""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.core.aliases import Number
from lowrank_optax.core.checks import check_limit
from lowrank_optax.core.frame import Frame
from lowrank_optax.core.linalg import column_norms_squared
from lowrank_optax.core.resolution import resolution
from lowrank_optax.core.sharding import zeros_along
from lowrank_optax.core.stage import check_first, frame_stage
from lowrank_optax.recovery.limiter import LARGEST_FALL, limit_growth, no_norm_yet


class CompensationState(NamedTuple):
    """State of `compensate_columns`; False at leaves of full rank.

    Attributes:
      lost: p, (*batch, n), running means of the squared column norms of the residual.
      norm: ||C||_F of the last step that did not fall below a fifth, after the limiter,
        (*batch,); negative before the first step.
    """

    lost: optax.Params
    norm: optax.Params


def compensate_columns(
    limit: Number = 1.01,
    *,
    scale: Number = 1.0,
    residual_scale: Number = 1.0,
    decay: Number = 0.9,
) -> optax.GradientTransformationExtraArgs:
    """Projects the step back and adds the residual, each column over its usual norm.

    With G~ = S^T G, the optimizer's output G~^O and zeta = `limit`:

        p_i <- decay p_i + (1 - decay) (||G_:,i||^2 - ||G~_:,i||^2)
        C = sqrt(m - r) (G - S G~) diag(p)^(-1/2)
        if ||C_t|| > zeta ||C_{t-1}||:   C_t <- C_t zeta ||C_{t-1}|| / ||C_t||
        step = scale (S G~^O + residual_scale C)

    (Gong et al. 2025, "Structured Fisher Approximation", Algorithm 3 and Theorem 5.1.)
    As in the paper p is not corrected for bias: C is larger in the first steps, by up
    to 1 / sqrt(1 - decay).

    Deviations: a column gets no residual where it loses nothing, or less than the
    difference of two squares resolves (`resolution`), since that residual is rounding.
    A C of less than a fifth of the last norm leaves the norm that limits the next step
    unchanged. In the paper one small gradient limits hundreds of steps, each to 1 %
    more than the one before, and the step after a zero one has no limit.

    Args:
      limit: zeta, the largest growth of C's norm from step to step.
      scale: alpha, on step and residual.
      residual_scale: alpha_c, a further factor on C.
      decay: beta, the decay rate of p.

    Raises:
      ValueError: at update, as `recover_residual` does.

    Example:
      >>> stages = optax.chain(lro.bases.switch_basis(key=0), lro.project(),
      ...     lro.in_subspace(optax.scale_by_adam()),
      ...     lro.compensate_columns(scale=0.3, residual_scale=0.4))
    """
    check_limit(limit)

    def one(
        frame: Frame, p: jax.Array, last: jax.Array
    ) -> tuple[Frame, jax.Array, jax.Array]:
        check_first(frame, "step")
        frame.check_residual("compensate_columns()")
        G, (m, r) = frame.gradient, frame.basis_shape[-2:]
        low = frame.need("low")
        low_step = frame.need("low_step")
        # S is orthonormal, so the residual's column norms need no residual.
        squares = column_norms_squared(G)
        lost = squares - column_norms_squared(low)
        # Normalising would make rounding as large as a step.
        resolved = lost > resolution(frame) ** 2 * squares
        lost = jnp.where(resolved, lost, 0)
        p = decay * p + (1 - decay) * lost
        root = jnp.sqrt(jnp.where(resolved, p, 1))
        phi = jnp.where(resolved, math.sqrt(m - r) / root, 0)
        norm = jnp.sqrt(jnp.sum(phi**2 * lost, axis=-1))
        phi, norm = limit_growth(phi, norm, last, limit, fall=LARGEST_FALL)
        phi = scale * residual_scale * phi[..., None, :]
        # Two products: S (scale G~^O - G~ diag(phi)) + G diag(phi).
        inside = frame.up(jnp.multiply(scale, low_step) - low * phi)
        inside, G, phi = map(frame.as_stored, (inside, G, phi))
        return frame.replace(step=frame.as_stored(inside + G * phi)), p, norm

    lost_before = partial(zeros_along, axis=-1)
    return frame_stage(CompensationState, one, lost_before, no_norm_yet)
