"""The smallest residual, and the smallest row of S^T G, that rounding does not hide."""

import math

import jax
import jax.numpy as jnp

from lowrank_optax.core.aliases import Number
from lowrank_optax.core.frame import Frame

LOW_RESOLUTION = 0.02
"""The `resolution` where products round to TF32 or bfloat16."""

TF32_EPS, BF16_EPS = 2.0**-10, 2.0**-7


def resolution(frame: Frame) -> Number:
    """The fraction of ||G diag(phi)|| below which a residual's norm is rounding.

    About 1e-3 with products in float32, and 2e-2 in TF32 or bfloat16, which is what
    accelerators use unless the precision says otherwise; 4e-3 at least where the
    gradient came in bfloat16. Three causes: the difference of two squared norms that
    agree to a relative eps has no correct digit; the products with S round, and so did
    the gradient. A zero residual measured as 1e-4 of G with products in
    float32, 4e-3 in TF32 and 1.2e-2 in bfloat16 (512 x 1376, r = 128, on an H100).
    """
    dtype = frame.gradient.dtype
    full = math.sqrt(8 * float(jnp.finfo(dtype).eps))
    # The root mean square of the gradient's own rounding is 0.2 eps.
    full = max(full, float(jnp.finfo(frame.given_dtype or dtype).eps) / 2)
    return _by_products(frame, full, LOW_RESOLUTION, LOW_RESOLUTION)


def row_resolution(frame: Frame, *, products: bool = True) -> Number:
    """The fraction of ||S^T G||_F below which a row of S^T G is rounding.

    The larger of 64 eps of float32 (or float64), for the factorization that chose S,
    and eps / sqrt(m), eps of the coarser of the gradient as it came and, with
    `products`, of the products with S. An SVD of a G of rank k < r has r - k rows of
    rounding, which measured as 1e-7 to 5e-6 of ||S^T G|| in float32, and 0.3 to 0.7
    eps / sqrt(m) where G or the factors of the products were rounded to bfloat16 or
    TF32 (16 x 48 to 1024 x 2736, k from 2 to 128).
    """
    dtype, m = frame.gradient.dtype, frame.gradient.shape[-2]
    given = float(jnp.finfo(frame.given_dtype or dtype).eps)

    def at_least(eps: float) -> float:
        exact = 64 * float(jnp.finfo(dtype).eps)
        return max(exact, max(eps, given) / math.sqrt(m))

    if not products:
        return at_least(0)
    return _by_products(frame, at_least(0), at_least(TF32_EPS), at_least(BF16_EPS))


def _by_products(frame: Frame, full: float, tf32: float, bf16: float) -> Number:
    """Selects a value by how products with S round: float32, TF32 or bfloat16."""
    if frame.gradient.dtype == jnp.float64 or full == tf32 == bf16:
        return full
    name = str(frame.precision).upper()
    if "HIGHEST" in name or name in ("FLOAT32", "F32_F32_F32"):
        return full
    if name not in ("NONE", "DEFAULT"):
        return bf16 if "BF16" in name or "BFLOAT16" in name else tf32
    return jax.lax.platform_dependent(
        cpu=lambda: jnp.asarray(full),
        tpu=lambda: jnp.asarray(bf16),
        default=lambda: jnp.asarray(tf32),
    )
