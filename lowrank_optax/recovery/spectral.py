"""Back: the step, and a step in the spectral norm on what the projection lost."""

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from lowrank_optax.core.frame import Frame
from lowrank_optax.core.newton_schulz import check_iterations, newton_schulz
from lowrank_optax.core.trees import map_frames
from lowrank_optax.recovery.resolution import resolution


def spectral_residual(
    residual_scale: float | jax.Array = 0.5,
    *,
    scale: float | jax.Array = 1.0,
    iterations: int = 5,
    dtype: DTypeLike | None = jnp.bfloat16,
) -> optax.GradientTransformation:
    """The step back in full space plus the residual with its directions equally long.

    With G~ = S^T G, the optimizer's output G~^O, and the residual's singular vectors:

        R = G - S G~ = U diag(s) V^T
        step = scale S G~^O + residual_scale sqrt(n) U V^T

    A steepest descent step in the spectral norm (Carlson et al. 2015, "Preconditioned
    Spectral Descent for Deep Learning"; Jordan et al. 2024, "Muon") in place of
    FRUGAL's sign of R (`sign_residual`) and Fira's rescaled R (`recover_residual`);
    putting it here is ours. It has no state. U V^T is Muon's approximation, by products
    with the m x m matrix R R^T (`newton_schulz`). Its root mean square entry being
    sqrt((m - r) / (m n)), the residual's step has entries of about `residual_scale`, as
    Adam's has of about one at most, whatever the size of G.

    When it is worth it: where the subspace is small, and a step costs less than the
    forward and the backward pass by far: m x m products of each matrix, about
    `iterations` (2 m^2 n + m^3) multiplications, the same for any batch. Where n is cut
    over devices each of them is a sum of m x m numbers over these.

    A residual that is no more than the rounding of G (`residual.resolution`) gives
    nothing: made as long as a step it would be noise.

    Args:
      residual_scale: of the residual's step, as a part of the learning rate.
      scale: on the part inside the subspace only.
      iterations: of Newton-Schulz.
      dtype: of the factors of its products; None for the gradient's, multiplied at
        the highest precision.

    Raises:
      ValueError: iterations below 1; no step before it in the chain; a basis that is
        not orthonormal, a step that accumulates gradients, or error feedback.

    Example:
      >>> import lowrank_optax as lro, optax
      >>> stages = optax.chain(lro.bases.power_iterate(b1=0.9), lro.project(),
      ...     lro.rotate_moments(optax.scale_by_adam()), lro.spectral_residual(0.5))
    """
    check_iterations(iterations)

    def one(frame: Frame) -> Frame:
        frame.check_residual("spectral_residual()")
        G, low = frame.gradient, frame.need("low", "project()")
        low_step = frame.need("low_step", "in_subspace() or rotate_moments()")
        R = G - frame.up(low)
        n = R.shape[-1]
        lost = length(R) > resolution(frame) * length(G)
        size = jnp.where(lost, residual_scale * jnp.sqrt(n), 0).astype(R.dtype)
        rest = size * newton_schulz(R, iterations, dtype)
        return frame.replace(step=frame.up(jnp.multiply(scale, low_step)) + rest)

    return optax.stateless(lambda frames, _: map_frames(one, frames))


def length(x: jax.Array) -> jax.Array:
    """||X||_F of each matrix, (*batch, 1, 1)."""
    return jnp.sqrt(jnp.sum(jnp.square(x), axis=(-2, -1), keepdims=True))
