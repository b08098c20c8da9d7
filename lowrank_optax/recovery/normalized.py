"""Back: the step plus the residual's polar factor, both normalized (COSMOS)."""

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from lowrank_optax.core.aliases import Number
from lowrank_optax.core.frame import Frame
from lowrank_optax.core.linalg import largest
from lowrank_optax.core.newton_schulz import newton_schulz
from lowrank_optax.core.stage import check_first, stateless_stage
from lowrank_optax.recovery.outside import add_outside, check_dtype, residual_factor


def normalized_spectral_residual(
    residual_scale: Number = 0.2,
    *,
    scale: Number = 1.0,
    dtype: DTypeLike | None = jnp.bfloat16,
) -> optax.GradientTransformation:
    """Adds the residual's polar factor, and gives the sum a fixed size (COSMOS).

    With G~ = S^T G, the optimizer's output G~^O and five of Muon's Newton-Schulz steps,

        O = NS5(R / ||R||_F),   R = G - S G~
        D = S G~^O + residual_scale sqrt(mn) (I - S S^T) O / ||O||_F
        step = scale sqrt(mn) D / ||D||_F

    The entries of the step have a root mean square of `scale`, for every shape and
    every G. (Liu et al. 2025, "COSMOS", arXiv 2502.17410, Algorithm 1, whose gamma is
    `residual_scale`.) `spectral_residual` normalizes neither O nor the sum. There is no
    state.

    A residual below the `resolution` of G gets no step. A zero D stays zero. At full
    rank D is G~^O.

    Args:
      residual_scale: gamma, on the part outside of the subspace.
      scale: the root mean square entry of the step.
      dtype: as in `spectral_residual`.

    Raises:
      ValueError: dtype float16; at update, as `recover_residual` does.

    Example:
      >>> stages = optax.chain(lro.dominant_svd(), lro.project(),
      ...     lro.steps.scale_by_full_momentum(),
      ...     lro.recovery.normalized_spectral_residual())
    """
    check_dtype(dtype)

    def one(frame: Frame) -> Frame:
        check_first(frame, "step")
        frame.check_residual("normalized_spectral_residual()")
        low_step = frame.need("low_step")
        if frame.full_rank:
            return frame.replace(step=_of_size(scale, low_step))
        outside, _ = residual_factor(frame, _muon, dtype)
        size = _inverse_rms(outside.astype(low_step.dtype))
        step = add_outside(frame, low_step, residual_scale * size, outside)
        return frame.replace(step=_of_size(scale, step))

    return stateless_stage(one)


def _muon(r: jax.Array, dtype: DTypeLike | None) -> tuple[jax.Array, jax.Array]:
    """NS5(R / ||R||_F) in the dtype of the products, and ||R||_F^2."""
    squared = jnp.sum(jnp.square(r), axis=(-2, -1), keepdims=True)
    return newton_schulz(r, 5, dtype).astype(dtype or r.dtype), squared


def _of_size(scale: Number, x: jax.Array) -> jax.Array:
    """x with a root mean square entry of `scale`."""
    x = x / largest(x)  # squares of small entries underflow
    return scale * _inverse_rms(x) * x


def _inverse_rms(x: jax.Array) -> jax.Array:
    """sqrt(mn) / ||x||_F, (*batch, 1, 1), and 0 where x is 0."""
    root = jnp.sqrt(jnp.mean(jnp.square(x), axis=(-2, -1), keepdims=True))
    return jnp.where(root > 0, 1 / jnp.where(root > 0, root, 1), 0)
