"""Back: the step, and with it the part of the gradient that the projection lost."""

from typing import Literal

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.core.frame import Frame, are_coordinates
from lowrank_optax.core.linalg import column_norms_squared, ratio
from lowrank_optax.core.trees import map_frames
from lowrank_optax.recovery.limiter import limit_growth, limited_stage
from lowrank_optax.recovery.published import Variant, arithmetic_of
from lowrank_optax.recovery.resolution import resolution


def recover_residual(
    limit: float | jax.Array = 1.01,
    *,
    scale: float | jax.Array = 1.0,
    variant: Variant = "paper",
) -> optax.GradientTransformationExtraArgs:
    """The step back in full space plus the rescaled residual (Fira; GrassWalk's RS).

    With G~ = S^T G, the optimizer's output G~^O and zeta = `limit`:

        phi_i = ||G~^O_:,i|| / ||G~_:,i||        one factor per column   (eq. 9)
        Lambda_t = (G - S G~) diag(phi)
        if ||Lambda_t|| > zeta ||Lambda_{t-1}||:
            Lambda_t <- Lambda_t zeta ||Lambda_{t-1}|| / ||Lambda_t||    (eq. 10)
        step = scale S G~^O + Lambda_t                                   (eq. 11)

    (GrassWalk paper, section 4; with a scale, Fira in the SARA paper, section 2.)
    S being orthonormal, two products do: step = S (scale G~^O - G~ diag(phi')) + G
    diag(phi'), phi' = phi after the limiter, and ||Lambda||^2 = sum_i phi_i^2
    (||G_i||^2 - ||G~_i||^2), clipped at 0 against rounding. No residual is formed.

    Where the paper is silent: a column with G~_i = 0 gets phi_i = 0; the first step has
    no limit; and a step whose Lambda is zero (a zero gradient) does not change the
    norm that the next one is limited against, so that the residual comes back. A
    residual whose squared norm overflows is left out of that step.

    The difference of squares resolves a residual down to about 1e-3 of G in float32
    products, and 2e-2 in TF32 or bfloat16 ones (`resolution`). A smaller one is given
    back like any other, but its norm, which is rounding, bounds no later one: a first
    gradient of rank r does not hold the residual back for the steps after it.

    `variant="published"` is what fira 1.0.2 computes: the residual is G - scale S G~;
    1e-8 is added to ||G~_i|| and to ||Lambda_{t-1}||; and a zero Lambda is stored like
    any other, after which the residual grows back from 1e-8 by zeta a step.

    Args:
      limit: zeta, the largest growth of the residual's norm from step to step.
      scale: alpha, on the part inside the subspace only.
      variant: "paper" or "published".

    Raises:
      ValueError: an unknown variant; no step before it in the chain; a basis that is
        not orthonormal, a step that accumulates gradients, or error feedback.

    Example:
      >>> import lowrank_optax as lro
      >>> stages = optax.chain(lro.grassmann_jump(key=0), lro.project(),
      ...     lro.rotate_moments(optax.scale_by_adam()), lro.recover_residual(1.01))
    """
    arithmetic = arithmetic_of(variant)
    inside = scale if arithmetic.scaled_residual else 1.0

    def one(frame: Frame, last: jax.Array) -> tuple[Frame, jax.Array]:
        frame.check_residual("recover_residual()")
        G = frame.gradient
        low = frame.need("low", "project()")
        low_step = frame.need("low_step", "in_subspace() or rotate_moments()")
        inner, outer = column_norms_squared(low), column_norms_squared(G)
        phi = ratio(
            jnp.sqrt(column_norms_squared(low_step)),
            jnp.sqrt(inner),
            arithmetic.norm_eps,
        )
        lost = outer - inside * (2 - inside) * inner
        norm = jnp.sqrt(jnp.sum(phi**2 * jnp.maximum(lost, 0), axis=-1))
        floor = resolution(frame) * jnp.sqrt(jnp.sum(phi**2 * outer, axis=-1))
        phi, norm = limit_growth(phi, norm, last, limit, arithmetic, floor)
        phi = phi[..., None, :]
        kept = frame.up(jnp.multiply(scale, low_step) - inside * low * phi)
        kept, G, phi = map(frame.as_stored, (kept, G, phi))
        return frame.replace(step=frame.as_stored(kept + G * phi)), norm

    return limited_stage(one)


def sign_residual(
    scale: float | jax.Array = 1.0, *, step: Literal["sign", "sgd"] = "sign"
) -> optax.GradientTransformation:
    """The step back in full space plus a stateless step on the residual (FRUGAL).

        step = S G~^O + scale sign(G - S G~)        or  scale (G - S G~), "sgd"

    (Zmushko et al. 2025, "FRUGAL", section 3: a stateful optimizer in the subspace, a
    state-free one on the rest.) A residual of exactly zero moves nothing; in
    coordinates the rows inside the subspace are exact zeros. With other bases what is
    left of a gradient that lies wholly inside is rounding, and the sign of that moves
    weights, as in the released code.

    Args:
      scale: the rest's learning rate, as a part of the matrices'.
      step: "sign" (signSGD) or "sgd".

    Raises:
      ValueError: an unknown step; no step before it in the chain; a basis that is
        not orthonormal, a step that accumulates gradients, or error feedback.

    Example:
      >>> import lowrank_optax as lro
      >>> stages = optax.chain(lro.bases.coordinates(key=0), lro.project(),
      ...     lro.reset_moments(optax.scale_by_adam()), lro.sign_residual())
    """
    if step not in ("sign", "sgd"):
        raise ValueError(f'step={step!r}: choose "sign" or "sgd"')

    def one(frame: Frame) -> Frame:
        frame.check_residual("sign_residual()")
        low = frame.need("low", "project()")
        low_step = frame.need("low_step", "in_subspace() or reset_moments()")
        G, s = frame.gradient, frame.basis
        if step == "sgd" and s is not None and not are_coordinates(s):
            kept = frame.up(low_step - jnp.multiply(scale, low))  # two products
            return frame.replace(step=kept + jnp.multiply(scale, G))
        residual = G - frame.up(low)
        rest = jnp.sign(residual) if step == "sign" else residual
        return frame.replace(step=frame.up(low_step) + jnp.multiply(scale, rest))

    return optax.stateless(lambda frames, _: map_frames(one, frames))
