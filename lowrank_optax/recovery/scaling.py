"""Back: the gradient itself, scaled by what the subspace's step did to it (APOLLO)."""

import math

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.core.frame import Frame
from lowrank_optax.core.linalg import column_norms_squared, ratio
from lowrank_optax.core.trees import map_frames
from lowrank_optax.recovery.limiter import limit_growth, limited_stage
from lowrank_optax.recovery.published import Variant, arithmetic_of


def scale_channels(
    limit: float | jax.Array = 1.01,
    *,
    scale: float | jax.Array = 1.0,
    variant: Variant = "paper",
) -> optax.GradientTransformationExtraArgs:
    """The gradient, each column scaled as the subspace's step scaled it (APOLLO).

    With G~ = S^T G, the optimizer's output G~^O and zeta = `limit`:

        phi_i = ||G~^O_:,i|| / ||G~_:,i||        one factor per column (channel)
        Lambda_t = G diag(phi),  its norm limited to zeta ||Lambda_{t-1}||
        step = sqrt(scale) Lambda_t

    (Zhu et al. 2025, "APOLLO", section 4; the limiter is Fira's.) The step has the
    gradient's directions: nothing is projected back, and no basis needs to be
    orthonormal. Zero columns, the first step and zero gradients are as in
    `recover_residual`, and so is `variant="published"`, which adds 1e-8 to ||G~_:,i||
    and to the norm before.

    Args:
      limit: zeta, the largest growth of the step's norm from step to step.
      scale: alpha; its root multiplies the step.
      variant: "paper" or "published".

    Raises:
      ValueError: an unknown variant; no step before it in the chain; a step that
        accumulates gradients, or error feedback.

    Example:
      >>> import lowrank_optax as lro
      >>> stages = optax.chain(lro.bases.gaussian(key=0), lro.project(),
      ...     lro.in_subspace(optax.scale_by_adam()), lro.scale_channels())
    """
    return _scaled("scale_channels()", True, limit, scale, variant)


def scale_tensor(
    limit: float | jax.Array = 1.01,
    *,
    scale: float | jax.Array = 128.0,
    variant: Variant = "paper",
) -> optax.GradientTransformationExtraArgs:
    """`scale_channels` with one factor for the whole matrix (APOLLO-Mini).

    phi = ||G~^O||_F / ||G~||_F, which a subspace of rank 1 is enough for; a scale of
    128 makes up for how much smaller ||G~|| is than ||G|| there (Zhu et al. 2025,
    "APOLLO", section 4).

    Args:
      limit: zeta, the largest growth of the step's norm from step to step.
      scale: alpha; its root multiplies the step.
      variant: "paper" or "published".

    Raises:
      ValueError: as `scale_channels` does.

    Example:
      >>> import lowrank_optax as lro
      >>> stages = optax.chain(lro.bases.gaussian(key=0), lro.project(),
      ...     lro.in_subspace(optax.scale_by_adam()),
      ...     lro.recovery.scale_tensor(scale=128.0))
    """
    return _scaled("scale_tensor()", False, limit, scale, variant)


def scale_by_shape(
    scale: float | jax.Array = 1.0,
) -> optax.GradientTransformation:
    """The step times scale sqrt(max(m, n)), last in the chain.

    A step of orthonormal rows has entries of size 1 / sqrt(n) at most; times sqrt(n)
    they are those of Adam's, whatever the matrix's shape, and one learning rate does
    for all (Refael et al. 2025, "SUMO", section 3.2).

    Args:
      scale: another factor.

    Raises:
      ValueError: at update, when no way back stands before it.

    Example:
      >>> import lowrank_optax as lro, optax
      >>> step = optax.chain(optax.trace(0.95), lro.steps.scale_by_polar_factor())
      >>> stages = optax.chain(lro.dominant_svd(), lro.project(),
      ...     lro.rotate_moments(step), lro.project_back(),
      ...     lro.recovery.scale_by_shape())
    """

    def one(frame: Frame) -> Frame:
        step = frame.need("step", "project_back() or another way back")
        factor = scale * math.sqrt(max(step.shape[-2:]))
        return frame.replace(step=jnp.multiply(factor, step))

    return optax.stateless(lambda frames, _: map_frames(one, frames))


def _scaled(
    stage: str,
    channels: bool,
    limit: float | jax.Array,
    scale: float | jax.Array,
    variant: Variant,
) -> optax.GradientTransformationExtraArgs:
    arithmetic = arithmetic_of(variant)

    def norms(x: jax.Array) -> jax.Array:
        """(*batch, n) of the columns, or (*batch, 1) of the matrix."""
        squared = column_norms_squared(x)
        if not channels:
            squared = jnp.sum(squared, axis=-1, keepdims=True)
        return jnp.sqrt(squared)

    def one(frame: Frame, last: jax.Array) -> tuple[Frame, jax.Array]:
        frame.check_residual(stage, orthonormal=False)
        low = frame.need("low", "project()")
        low_step = frame.need("low_step", "in_subspace() or rotate_moments()")
        phi = ratio(norms(low_step), norms(low), arithmetic.norm_eps)
        squared = column_norms_squared(frame.gradient)
        norm = jnp.sqrt(jnp.sum(phi**2 * squared, axis=-1))
        phi, norm = limit_growth(phi, norm, last, limit, arithmetic)
        phi = jnp.sqrt(scale) * phi
        G, phi = map(frame.as_stored, (frame.gradient, phi[..., None, :]))
        return frame.replace(step=frame.as_stored(G * phi)), norm

    return limited_stage(one)
