"""Back: the step, and with it the part of the gradient that the projection lost."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.frame import Frame, map_frames, update_frames

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
      ValueError: an unknown variant; no step before it in the chain.

    Example:
      >>> import lowrank_optax as lro
      >>> stages = optax.chain(lro.grassmann_jump(key=0), lro.project(),
      ...     lro.rotate_moments(optax.scale_by_adam()), lro.recover_residual(1.01))
    """
    if variant not in ("paper", "published"):
        raise ValueError(f'variant={variant!r}: choose "paper" or "published"')
    published = variant == "published"
    inside = scale if published else 1.0
    eps = 1e-8 if published else 0.0

    def init(params: Any) -> Any:
        def before(frame: Frame) -> jax.Array:
            return jnp.full(frame.batch, -1.0, frame.gradient.dtype)

        return RecoverState(
            map_frames(before, params, plain=lambda _: optax.MaskedNode())
        )

    def one(frame: Frame, last: jax.Array) -> tuple[Frame, jax.Array]:
        G = frame.gradient
        low = frame.need("low", "project()")
        low_step = frame.need("low_step", "in_subspace() or rotate_moments()")
        squared = _column_norms_squared(low)
        phi = _ratio(jnp.sqrt(_column_norms_squared(low_step)), jnp.sqrt(squared), eps)
        lost = _column_norms_squared(G) - inside * (2 - inside) * squared
        norm = jnp.sqrt(jnp.sum(phi**2 * jnp.maximum(lost, 0), axis=-1))

        bound = limit * (last + eps)
        limited = (last >= 0) & (norm > bound)
        factor = jnp.where(limited, bound / jnp.where(limited, norm, 1), 1)
        usable = jnp.isfinite(norm)
        phi = jnp.where(usable[..., None], phi * factor[..., None], 0)
        norm = jnp.where(usable, norm * factor, last)
        if not published:
            norm = jnp.where(norm > 0, norm, last)
        inner = jnp.multiply(scale, low_step) - inside * low * phi[..., None, :]
        return frame.replace(step=frame.up(inner) + G * phi[..., None, :]), norm

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        frames, norm = update_frames(one, updates, state.norm)
        return frames, RecoverState(norm)

    return optax.GradientTransformation(init, update)


def _column_norms_squared(x: jax.Array) -> jax.Array:
    return jnp.sum(jnp.square(x), axis=-2)


def _ratio(a: jax.Array, b: jax.Array, eps: float) -> jax.Array:
    """a / (b + eps), and 0 where that denominator is 0."""
    b = b + eps
    return jnp.where(b > 0, a / jnp.where(b > 0, b, 1), 0)
