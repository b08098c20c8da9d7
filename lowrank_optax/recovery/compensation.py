"""Back: the step, and what the projection lost with its columns normalised (Alice)."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.core.frame import Frame
from lowrank_optax.core.linalg import column_norms_squared
from lowrank_optax.core.sharding import shard_along, shard_batch, spec_of
from lowrank_optax.core.stage import simple_stage
from lowrank_optax.core.trees import map_frames, nothing, update_frames
from lowrank_optax.recovery.limiter import limit_growth
from lowrank_optax.recovery.published import arithmetic_of
from lowrank_optax.recovery.resolution import resolution


class CompensationState(NamedTuple):
    """State of `compensate_columns`; False at leaves of full rank.

    Attributes:
      lost: p, (*batch, n), running means of the squared column norms of the residual.
      norm: ||C||_F of the last step, after the limiter, (*batch,); negative before the
        first.
    """

    lost: Any
    norm: Any


def compensate_columns(
    limit: float | jax.Array = 1.01,
    *,
    scale: float | jax.Array = 1.0,
    residual_scale: float | jax.Array = 1.0,
    decay: float | jax.Array = 0.9,
) -> optax.GradientTransformationExtraArgs:
    """The step back in full space plus the residual, each column over its usual norm.

    With G~ = S^T G, the optimizer's output G~^O and zeta = `limit`:

        p_i <- decay p_i + (1 - decay) (||G_:,i||^2 - ||G~_:,i||^2)
        C = sqrt(m - r) (G - S G~) diag(p)^(-1/2)
        if ||C_t|| > zeta ||C_{t-1}||:   C_t <- C_t zeta ||C_{t-1}|| / ||C_t||
        step = scale (S G~^O + residual_scale C)

    (Gong et al. 2025, "Structured Fisher Approximation", Algorithm 3: of all diagonal
    scalings of the residual the one whose Fisher matrix is nearest, Theorem 5.1.) What
    was lost comes back with entries of Adam's size, where `recover_residual` gives each
    column what the subspace's step did to it. S being orthonormal, two products do:
    step = S (scale G~^O - G~ diag(phi)) + G diag(phi); no residual is formed.

    Where the paper is silent: a column of which nothing is lost now, or less than the
    difference of two squares resolves (`residual.resolution`, 1e-3 of the column in
    float32 products, 2e-2 in TF32 or bfloat16), gets nothing back, for it would be
    rounding made as large as a step. As in `recover_residual` a step whose C is zero
    does not change the norm that the next one is limited against; in the paper the one
    after it is free. p is not corrected for bias, as there: C is the larger in the
    first steps, by up to 1 / sqrt(1 - decay).

    Args:
      limit: zeta, the largest growth of C's norm from step to step.
      scale: alpha, on the whole step.
      residual_scale: alpha_c, on C besides.
      decay: beta of p.

    Raises:
      ValueError: no step before it in the chain; a basis that is not orthonormal, a
        step that accumulates gradients, or error feedback.

    Example:
      >>> import lowrank_optax as lro, optax
      >>> stages = optax.chain(lro.bases.switch_basis(key=0), lro.project(),
      ...     lro.in_subspace(optax.scale_by_adam()),
      ...     lro.compensate_columns(scale=0.3, residual_scale=0.4))
    """

    def init(params: optax.Params) -> CompensationState:
        def columns(frame: Frame) -> jax.Array:
            shape, cut = frame.gradient.shape, spec_of(frame.gradient)
            zeros = jnp.zeros((*shape[:-2], shape[-1]), frame.gradient.dtype)
            return shard_along(zeros, (*cut[:-2], cut[-1]), of=frame.gradient)

        def before(frame: Frame) -> jax.Array:
            none = jnp.full(frame.batch, -1.0, frame.gradient.dtype)
            return shard_batch(frame, none)

        return CompensationState(
            map_frames(columns, params, plain=nothing),
            map_frames(before, params, plain=nothing),
        )

    def one(
        frame: Frame, p: jax.Array, last: jax.Array
    ) -> tuple[Frame, jax.Array, jax.Array]:
        frame.check_residual("compensate_columns()")
        G, (m, r) = frame.gradient, frame.basis_shape[-2:]
        low = frame.need("low", "project()")
        low_step = frame.need("low_step", "in_subspace() or rotate_moments()")
        outer = column_norms_squared(G)
        lost = outer - column_norms_squared(low)
        seen = lost > resolution(frame) ** 2 * outer
        lost = jnp.where(seen, lost, 0)
        p = decay * p + (1 - decay) * lost
        phi = jnp.where(seen, math.sqrt(m - r) / jnp.sqrt(jnp.where(seen, p, 1)), 0)
        norm = jnp.sqrt(jnp.sum(phi**2 * lost, axis=-1))
        phi, norm = limit_growth(phi, norm, last, limit, arithmetic_of("paper"))
        phi = scale * residual_scale * phi[..., None, :]
        kept = frame.up(jnp.multiply(scale, low_step) - low * phi)
        kept, G, phi = map(frame.as_stored, (kept, G, phi))
        return frame.replace(step=frame.as_stored(kept + G * phi)), p, norm

    def update(
        frames: optax.Updates, state: CompensationState
    ) -> tuple[optax.Updates, CompensationState]:
        frames, lost, norm = update_frames(one, frames, state.lost, state.norm)
        return frames, CompensationState(lost, norm)

    return simple_stage(init, update)
