"""Back: the step, plus the residual, which is what the projection lost."""

from typing import Literal

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.core.aliases import Number
from lowrank_optax.core.checks import check_limit
from lowrank_optax.core.frame import Frame, are_coordinates
from lowrank_optax.core.linalg import column_norms_squared, ratio
from lowrank_optax.core.resolution import resolution
from lowrank_optax.core.stage import check_first, frame_stage, stateless_stage
from lowrank_optax.recovery.limiter import LimiterState, limit_growth, no_norm_yet
from lowrank_optax.recovery.published import Variant, arithmetic_of


def recover_residual(
    limit: Number = 1.01, *, scale: Number = 1.0, variant: Variant = "paper"
) -> optax.GradientTransformationExtraArgs:
    """Projects the step back and adds the rescaled residual (Fira; GrassWalk's RS).

    With G~ = S^T G, the optimizer's output G~^O and zeta = `limit`:

        phi_i = ||G~^O_:,i|| / ||G~_:,i||        one factor per column   (eq. 9)
        Lambda_t = (G - S G~) diag(phi)
        if ||Lambda_t|| > zeta ||Lambda_{t-1}||:
            Lambda_t <- Lambda_t zeta ||Lambda_{t-1}|| / ||Lambda_t||    (eq. 10)
        step = scale S G~^O + Lambda_t                                   (eq. 11)

    (GrassWalk paper, section 4; with a scale, Fira in the SARA paper, section 2.)
    `variant="published"` is fira 1.0.2: the residual is G - scale S G~, 1e-8 is added
    to ||G~_i|| and to ||Lambda_{t-1}||, and a zero Lambda is stored like any other.

    Deviations where the papers are silent: a column with G~_i = 0 gets phi_i = 0. The
    first step has no limit. A Lambda that is zero, or below the `resolution` of its
    norm, does not change the norm that limits the next step. A Lambda whose squared
    norm overflows is dropped.

    Args:
      limit: zeta, the largest growth of the residual's norm from step to step.
      scale: alpha, on the part inside the subspace only.
      variant: "paper" or "published".

    Raises:
      ValueError: an unknown variant; at update, without a step before it in the chain,
        for a basis that is not orthonormal, a step that accumulates gradients, or
        inside error feedback.

    Example:
      >>> stages = optax.chain(lro.grassmann_jump(key=0), lro.project(),
      ...     lro.rotate_moments(optax.scale_by_adam()), lro.recover_residual(1.01))
    """
    check_limit(limit)
    arithmetic = arithmetic_of(variant)
    alpha = scale if arithmetic.scaled_residual else 1.0

    def one(frame: Frame, last: jax.Array) -> tuple[Frame, jax.Array]:
        check_first(frame, "step")
        frame.check_residual("recover_residual()")
        G = frame.gradient
        low = frame.need("low")
        low_step = frame.need("low_step")
        low_squares, squares = column_norms_squared(low), column_norms_squared(G)
        phi = ratio(
            jnp.sqrt(column_norms_squared(low_step)),
            jnp.sqrt(low_squares),
            arithmetic.norm_eps,
        )
        # S is orthonormal, so ||G - alpha S G~||^2 = ||G||^2 - alpha (2 - alpha)
        # ||G~||^2 in each column: the norm needs no residual of the gradient's size.
        lost = squares - alpha * (2 - alpha) * low_squares
        norm = jnp.sqrt(jnp.sum(phi**2 * jnp.maximum(lost, 0), axis=-1))
        floor = resolution(frame) * jnp.sqrt(jnp.sum(phi**2 * squares, axis=-1))
        phi, norm = limit_growth(phi, norm, last, limit, arithmetic, floor)
        phi = phi[..., None, :]
        # Two products with S in all, one down and one up, instead of three.
        inside = frame.up(jnp.multiply(scale, low_step) - alpha * low * phi)
        inside, G, phi = map(frame.as_stored, (inside, G, phi))
        return frame.replace(step=frame.as_stored(inside + G * phi)), norm

    return frame_stage(LimiterState, one, no_norm_yet)


def sign_residual(
    scale: Number = 1.0, *, step: Literal["sign", "sgd"] = "sign"
) -> optax.GradientTransformation:
    """Projects the step back and adds a stateless step on the residual (FRUGAL).

        step = S G~^O + scale sign(G - S G~)        or  scale (G - S G~), "sgd"

    (Zmushko et al. 2025, "FRUGAL", section 3.) A residual of exactly zero moves
    nothing, such as the rows inside the subspace of `coordinates`. Deviation: with
    other bases, a residual below the `resolution` of G is rounding error and gets no
    step. In the released code, the signs of rounding errors move weights. The stage
    costs one more pass over G.

    Args:
      scale: the residual's learning rate, as a fraction of the matrices'.
      step: "sign" (signSGD) or "sgd".

    Raises:
      ValueError: an unknown step; at update, as `recover_residual` does.

    Example:
      >>> stages = optax.chain(lro.bases.coordinates(key=0), lro.project(),
      ...     lro.reset_moments(optax.scale_by_adam()), lro.sign_residual())
    """
    if step not in ("sign", "sgd"):
        raise ValueError(f'step={step!r}: choose "sign" or "sgd"')

    def one(frame: Frame) -> Frame:
        check_first(frame, "step")
        frame.check_residual("sign_residual()")
        low = frame.need("low")
        low_step = frame.need("low_step")
        G, s = frame.gradient, frame.basis
        if step == "sgd" and s is not None and not are_coordinates(s):
            # Linear in G, so that no residual of the gradient's size is formed.
            inside = frame.up(low_step - jnp.multiply(scale, low))
            return frame.replace(step=inside + jnp.multiply(scale, G))
        residual = G - frame.up(low)
        rest = jnp.sign(residual) if step == "sign" else residual
        if s is not None and not are_coordinates(s):
            rest = rest * _resolved(frame, low)
        return frame.replace(step=frame.up(low_step) + jnp.multiply(scale, rest))

    return stateless_stage(one)


def _resolved(frame: Frame, low: jax.Array) -> jax.Array:
    """Whether ||G - S G~|| is more than rounding, 0 or 1: (*batch, 1, 1)."""
    squares, inside = (
        jnp.sum(jnp.square(x), axis=(-2, -1), keepdims=True)
        for x in (frame.gradient, low)
    )
    lost = squares - inside
    # Not below instead of above: a NaN has to reach the check that skips the step.
    resolved = ~(lost <= resolution(frame) ** 2 * squares)
    return resolved.astype(low.dtype)
