"""Back: the step, and with it the part of the gradient that the projection lost."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.frame import Frame, map_frames, nothing, update_frames

Variant = Literal["paper", "published"]


class RecoverState(NamedTuple):
    """State of `recover_residual`.

    Attributes:
      norm: ||Lambda_{t-1}||_F per matrix, (*batch,); negative before the first step;
        `optax.MaskedNode` at leaves of full rank.
    """

    norm: Any


def recover_residual(
    limit: float | jax.Array = 1.01,
    *,
    scale: float | jax.Array = 1.0,
    variant: Variant = "paper",
) -> optax.GradientTransformation:
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
    published = check_variant(variant)
    inside = scale if published else 1.0
    eps = 1e-8 if published else 0.0

    def one(frame: Frame, last: jax.Array) -> tuple[Frame, jax.Array]:
        frame.check_residual("recover_residual()")
        G = frame.gradient
        low = frame.need("low", "project()")
        low_step = frame.need("low_step", "in_subspace() or rotate_moments()")
        squared = column_norms_squared(low)
        phi = ratio(jnp.sqrt(column_norms_squared(low_step)), jnp.sqrt(squared), eps)
        lost = column_norms_squared(G) - inside * (2 - inside) * squared
        norm = jnp.sqrt(jnp.sum(phi**2 * jnp.maximum(lost, 0), axis=-1))
        factor, norm = limit_growth(norm, last, limit, published=published)
        phi = limited(phi, factor)
        inner = jnp.multiply(scale, low_step) - inside * low * phi[..., None, :]
        return frame.replace(step=frame.up(inner) + G * phi[..., None, :]), norm

    return with_last_norm(one)


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
      >>> stages = optax.chain(lro.coordinates(key=0), lro.project(),
      ...     lro.reset_moments(optax.scale_by_adam()), lro.sign_residual())
    """
    if step not in ("sign", "sgd"):
        raise ValueError(f'step={step!r}: choose "sign" or "sgd"')

    def one(frame: Frame) -> Frame:
        frame.check_residual("sign_residual()")
        low = frame.need("low", "project()")
        low_step = frame.need("low_step", "in_subspace() or reset_moments()")
        residual = frame.gradient - frame.up(low)
        rest = jnp.sign(residual) if step == "sign" else residual
        return frame.replace(step=frame.up(low_step) + jnp.multiply(scale, rest))

    return optax.stateless(lambda frames, _: map_frames(one, frames))


def with_last_norm(
    one: Callable[[Frame, jax.Array], tuple[Frame, jax.Array]],
) -> optax.GradientTransformation:
    """A stage from `one(frame, last norm) -> (frame, norm)`, with a `RecoverState`."""

    def init(params: Any) -> Any:
        def before(frame: Frame) -> jax.Array:
            return jnp.full(frame.batch, -1.0, frame.gradient.dtype)

        return RecoverState(map_frames(before, params, plain=nothing))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        frames, norm = update_frames(one, updates, state.norm)
        return frames, RecoverState(norm)

    return optax.GradientTransformation(init, update)


def limit_growth(
    norm: jax.Array, last: jax.Array, limit: float | jax.Array, *, published: bool
) -> tuple[jax.Array, jax.Array]:
    """Fira's norm-growth limiter: the factor on Lambda_t, and the norm to store.

    Factor zeta ||Lambda_{t-1}|| / ||Lambda_t|| where that is below 1; 0 where
    ||Lambda_t|| overflowed. A negative `last` is no norm yet.
    """
    bound = limit * (last + (1e-8 if published else 0.0))
    grown = (last >= 0) & (norm > bound)
    factor = jnp.where(grown, bound / jnp.where(grown, norm, 1), 1)
    usable = jnp.isfinite(norm)
    factor = jnp.where(usable, factor, 0)
    after = jnp.where(usable, norm * factor, last)
    return factor, after if published else jnp.where(after > 0, after, last)


def limited(phi: jax.Array, factor: jax.Array) -> jax.Array:
    """phi times its matrix's factor; 0 where that is 0, even if phi overflowed."""
    factor = factor[..., None]
    return jnp.where(factor > 0, phi * factor, 0)


def check_variant(variant: str) -> bool:
    """Whether it is "published"; ValueError for neither that nor "paper"."""
    if variant not in ("paper", "published"):
        raise ValueError(f'variant={variant!r}: choose "paper" or "published"')
    return variant == "published"


def column_norms_squared(x: jax.Array) -> jax.Array:
    return jnp.sum(jnp.square(x), axis=-2)


def ratio(a: jax.Array, b: jax.Array, eps: float) -> jax.Array:
    """a / (b + eps), and 0 where that denominator is 0."""
    b = b + eps
    return jnp.where(b > 0, a / jnp.where(b > 0, b, 1), 0)
