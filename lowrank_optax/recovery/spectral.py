"""Back: the step, plus a step in the spectral norm on the residual."""

from functools import partial

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from lowrank_optax.core.aliases import Number
from lowrank_optax.core.checks import check_count
from lowrank_optax.core.frame import Frame
from lowrank_optax.core.newton_schulz import newton_schulz
from lowrank_optax.core.resolution import resolution
from lowrank_optax.core.spread import whole_matrices
from lowrank_optax.core.stage import check_first, stateless_stage


def spectral_residual(
    residual_scale: Number = 0.5,
    *,
    scale: Number = 1.0,
    iterations: int = 5,
    dtype: DTypeLike | None = jnp.bfloat16,
) -> optax.GradientTransformation:
    """Projects the step back and adds the residual's polar factor.

    With G~ = S^T G, the optimizer's output G~^O, and the residual's singular vectors:

        R = G - S G~ = U diag(s) V^T
        step = scale S G~^O + residual_scale sqrt(n) (I - S S^T) U V^T

    U V^T already lies outside of the subspace, up to the rounding of its products. The
    factor I - S S^T reduces this error to the rounding of products with S (2e-4 of the
    step in TF32, 1.5e-3 in bfloat16). It takes one more such product, three in all. The
    residual takes the steepest descent step in the spectral norm (Carlson et al. 2015,
    "Preconditioned Spectral Descent for Deep Learning"; Jordan et al. 2024, "Muon");
    combining it with a subspace is our own. U V^T is Muon's approximation
    (`newton_schulz`). There is no state.

    The residual's step has entries of about `residual_scale`, whatever the size of G,
    since the root mean square entry of U V^T is sqrt((m - r) / (m n)); Adam's have at
    most about one. A residual below the `resolution` of G gets no step, because
    normalizing it would amplify rounding.

    Args:
      residual_scale: size of the residual's step, as a fraction of the learning rate.
      scale: alpha, on the part inside the subspace only.
      iterations: number of Newton-Schulz iterations.
      dtype: of the factors of its products; None for the gradient's, at the highest
        precision. A float64 gradient has its products in float64.

    Raises:
      ValueError: iterations below 1; at update, as `recover_residual` does.

    Example:
      >>> stages = optax.chain(lro.bases.power_iterate(b1=0.9), lro.project(),
      ...     lro.rotate_moments(optax.scale_by_adam()), lro.spectral_residual(0.5))
    """
    check_count("iterations", iterations)

    def one(frame: Frame) -> Frame:
        check_first(frame, "step")
        frame.check_residual("spectral_residual()")
        G, low = frame.gradient, frame.need("low")
        low_step = frame.need("low_step")
        R = G - frame.up(low)
        n = R.shape[-1]
        resolved = _norm(R) > resolution(frame) * _norm(G)
        size = jnp.where(resolved, residual_scale * jnp.sqrt(n), 0).astype(R.dtype)
        narrow = None if R.dtype == jnp.float64 else dtype
        polar = partial(newton_schulz, iterations=iterations, dtype=narrow)
        outside = whole_matrices(polar, R, narrow)
        # Rounding in the subspace, where R has nothing, grows up to 3.4 a time.
        inside = jnp.multiply(scale, low_step) - size * frame.down(outside)
        return frame.replace(step=frame.up(inside) + size * outside)

    return stateless_stage(one)


def _norm(x: jax.Array) -> jax.Array:
    """||X||_F of each matrix, (*batch, 1, 1)."""
    return jnp.sqrt(jnp.sum(jnp.square(x), axis=(-2, -1), keepdims=True))
