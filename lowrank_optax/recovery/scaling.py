"""Back: the gradient itself, scaled as the step scales it in the subspace (APOLLO)."""

import math
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.core.aliases import Number
from lowrank_optax.core.checks import check_limit
from lowrank_optax.core.frame import Frame
from lowrank_optax.core.linalg import column_norms_squared, ratio
from lowrank_optax.core.stage import check_first, frame_stage, stateless_stage
from lowrank_optax.recovery.limiter import LimiterState, limit_growth, no_norm_yet
from lowrank_optax.recovery.published import Variant, arithmetic_of


def scale_gradient(
    limit: Number = 1.01,
    *,
    per: Literal["column", "matrix"] = "column",
    scale: Number = 1.0,
    variant: Variant = "paper",
) -> optax.GradientTransformationExtraArgs:
    """Scales the gradient as the optimizer scales its projection (APOLLO).

    With G~ = S^T G, the optimizer's output G~^O and zeta = `limit`:

        phi_i = ||G~^O_:,i|| / ||G~_:,i||        per="column" (channel)
        phi = ||G~^O||_F / ||G~||_F              per="matrix" (APOLLO-Mini)
        Lambda_t = G diag(phi),  its norm limited to zeta ||Lambda_{t-1}||
        step = sqrt(scale) Lambda_t

    (Zhu et al. 2025, "APOLLO", section 4; the limiter is Fira's.) The step has the
    gradient's directions: the basis need not be orthonormal. APOLLO-Mini uses rank 1
    and scale=128, because ||G~|| is much smaller than ||G|| there. Zero columns, the
    first step and zero gradients are handled as in `recover_residual`.
    `variant="published"` adds 1e-8 to ||G~|| and ||Lambda_{t-1}||.

    Args:
      limit: zeta, the largest growth of the step's norm from step to step.
      per: "column" for a factor per column, "matrix" for a factor per matrix.
      scale: alpha; its square root multiplies the step.
      variant: "paper" or "published".

    Raises:
      ValueError: an unknown `per` or variant; at update, without a step before it in
        the chain, for a step that accumulates gradients, or inside error feedback.

    Example:
      >>> stages = optax.chain(lro.bases.gaussian(key=0), lro.project(),
      ...     lro.in_subspace(optax.scale_by_adam()), lro.scale_gradient())
    """
    if per not in ("column", "matrix"):
        raise ValueError(f'per={per!r}: choose "column" or "matrix"')
    check_limit(limit)
    arithmetic = arithmetic_of(variant)

    def norms(x: jax.Array) -> jax.Array:
        """The norms of the columns (*batch, n), or of the matrix (*batch, 1)."""
        squares = column_norms_squared(x)
        if per == "matrix":
            squares = jnp.sum(squares, axis=-1, keepdims=True)
        return jnp.sqrt(squares)

    def one(frame: Frame, last: jax.Array) -> tuple[Frame, jax.Array]:
        check_first(frame, "step")
        frame.check_residual("scale_gradient()", orthonormal=False)
        low = frame.need("low")
        low_step = frame.need("low_step")
        phi = ratio(norms(low_step), norms(low), arithmetic.norm_eps)
        squares = column_norms_squared(frame.gradient)
        norm = jnp.sqrt(jnp.sum(phi**2 * squares, axis=-1))
        phi, norm = limit_growth(phi, norm, last, limit, arithmetic)
        phi = jnp.sqrt(scale) * phi
        G, phi = map(frame.as_stored, (frame.gradient, phi[..., None, :]))
        return frame.replace(step=frame.as_stored(G * phi)), norm

    return frame_stage(LimiterState, one, no_norm_yet)


def scale_by_shape(scale: Number = 1.0) -> optax.GradientTransformation:
    """Multiplies the step by scale sqrt(max(m, n)); stands last in the chain.

    A step with orthonormal rows has entries of at most 1 / sqrt(n). Times sqrt(n) they
    have the size of Adam's for every shape, so that one learning rate serves all
    matrices (Refael et al. 2025, "SUMO", section 3.2).

    Args:
      scale: a further factor.

    Raises:
      ValueError: at update, if no way back stands before it in the chain.

    Example:
      >>> step = optax.chain(optax.trace(0.95), lro.steps.scale_by_polar_factor())
      >>> stages = optax.chain(lro.dominant_svd(), lro.project(),
      ...     lro.rotate_moments(step), lro.project_back(),
      ...     lro.recovery.scale_by_shape())
    """

    def one(frame: Frame) -> Frame:
        step = frame.need("step")
        factor = scale * math.sqrt(max(step.shape[-2:]))
        return frame.replace(step=jnp.multiply(factor, step))

    return stateless_stage(one)
