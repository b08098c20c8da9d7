"""Back: the step, plus a step in the spectral norm on the residual."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from lowrank_optax.core.aliases import Number
from lowrank_optax.core.frame import Frame
from lowrank_optax.core.linalg import largest
from lowrank_optax.core.newton_schulz import FITTED, Quintic, polar_of_spectrum
from lowrank_optax.core.resolution import resolution
from lowrank_optax.core.spread import whole_matrices
from lowrank_optax.core.stage import check_first, stateless_stage


def spectral_residual(
    residual_scale: Number = 0.5,
    *,
    scale: Number = 1.0,
    coefficients: Sequence[Quintic] = FITTED,
    dtype: DTypeLike | None = jnp.bfloat16,
) -> optax.GradientTransformation:
    """Projects the step back and adds the residual's polar factor.

    With G~ = S^T G, the optimizer's output G~^O, and the residual's singular vectors:

        R = G - S G~ = U diag(s) V^T
        step = scale S G~^O + residual_scale sqrt(n) (I - S S^T) U V^T

    U V^T already lies outside of the subspace, up to the rounding of its products. The
    factor I - S S^T reduces this error to the rounding of products with S. The residual
    takes the steepest descent step in the spectral norm (Carlson et al. 2015,
    "Preconditioned Spectral Descent for Deep Learning"; Jordan et al. 2024, "Muon");
    combining it with a subspace is our own. There is no state.

    U V^T is approximated by Newton-Schulz steps X <- a X + b A X + c A^2 X, A = X X^T.
    X begins as R over its Schatten norm (sum_i s_i^8)^(1/8). The default is three
    steps whose coefficients are fitted to the residuals of LLaMA-60M. They make
    singular values of 0.88 to 1.2 from those of 0.02 to 0.75 times the norm, which are
    nearly all, and reach the loss of Muon's five steps (docs/results/polar_factor.md).

    The residual's step has entries of about `residual_scale`, whatever the size of G,
    since the root mean square entry of U V^T is sqrt((m - r) / (m n)); Adam's have at
    most about one. A residual below the `resolution` of G gets no step, because
    normalizing it would amplify rounding.

    Args:
      residual_scale: size of the residual's step, as a fraction of the learning rate.
      scale: alpha, on the part inside the subspace only.
      coefficients: (a, b, c) of each Newton-Schulz step.
      dtype: of the factors of its products; None for the gradient's, at the highest
        precision. A float64 gradient has its products in float64.

    Raises:
      ValueError: no coefficients, or others than triples; dtype float16, in which
        squares over- and underflow; at update, as `recover_residual` does.

    Example:
      >>> stages = optax.chain(lro.bases.power_iterate(b1=0.9), lro.project(),
      ...     lro.rotate_moments(optax.scale_by_adam()), lro.spectral_residual(0.5))
    """
    quintics = _checked(coefficients)
    if dtype is not None and jnp.dtype(dtype) == jnp.float16:
        raise ValueError(
            "dtype=float16: squares over- and underflow in it; choose bfloat16, "
            "float32 or None"
        )

    def one(frame: Frame) -> Frame:
        check_first(frame, "step")
        frame.check_residual("spectral_residual()")
        low, low_step = frame.need("low"), frame.need("low_step")
        if frame.full_rank:
            return frame.replace(step=jnp.multiply(scale, low_step))
        narrow = None if low.dtype == jnp.float64 else dtype
        # Of a size whose squares are finite; only that of R itself would need a pass.
        unit = largest(low)
        R = (frame.gradient - frame.up(low)) / unit
        n = R.shape[-1]
        polar = partial(polar_of_spectrum, coefficients=quintics, dtype=narrow)
        outside, squared = whole_matrices(polar, R, narrow)
        # S is orthonormal: ||G||^2 = ||R||^2 + ||G~||^2.
        total = squared + jnp.sum(jnp.square(low / unit), axis=(-2, -1), keepdims=True)
        resolved = squared > resolution(frame) ** 2 * total
        # Where squares overflow, the polar factor is NaN: there is no step either.
        outside = jnp.where(resolved, outside, 0)
        size = jnp.where(resolved, residual_scale * jnp.sqrt(n), 0).astype(R.dtype)
        # Rounding in the subspace, where R has nothing, grows with each step.
        inside = jnp.multiply(scale, low_step) - size * _down(frame, outside)
        return frame.replace(step=frame.up(inside) + size * outside.astype(R.dtype))

    return stateless_stage(one)


def _down(frame: Frame, outside: jax.Array) -> jax.Array:
    """S^T O in the dtype of the gradient.

    S^T O is small. On an accelerator that rounds products anyway, the factors keep the
    narrow dtype of O: half of the traffic, and an error of 6e-4 of O.
    """
    wide = frame.gradient.dtype

    def exact(o: jax.Array) -> jax.Array:
        return frame.down(o.astype(wide))

    def narrow(o: jax.Array) -> jax.Array:
        return frame.down(o).astype(wide)

    if frame.precision is not None or outside.dtype == wide:
        return exact(outside)
    return jax.lax.platform_dependent(outside, cpu=exact, default=narrow)


def _checked(coefficients: Sequence[Quintic]) -> tuple[Quintic, ...]:
    try:
        quintics = tuple((float(a), float(b), float(c)) for a, b, c in coefficients)
    except (TypeError, ValueError):
        quintics = ()
    if not quintics:
        raise ValueError(
            f"coefficients={coefficients!r}: give a sequence of triples (a, b, c), one "
            "for each step"
        )
    return quintics
