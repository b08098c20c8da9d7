"""The smallest residual that rounding does not hide."""

import math

import jax
import jax.numpy as jnp

from lowrank_optax.core.aliases import Number
from lowrank_optax.core.frame import Frame

LOW_RESOLUTION = 0.02
"""The `resolution` where products round to TF32 or bfloat16."""


def resolution(frame: Frame) -> Number:
    """The fraction of ||G diag(phi)|| below which a residual's norm is rounding.

    About 1e-3 with products in float32, and 2e-2 in TF32 or bfloat16, which is what
    accelerators use unless the precision says otherwise. Two causes: the difference of
    two squared norms that agree to a relative eps has no correct digit, and the
    products with S round. A zero residual measured as 1e-4 of G with products in
    float32, 4e-3 in TF32 and 1.2e-2 in bfloat16 (512 x 1376, r = 128, on an H100).
    """
    full = math.sqrt(8 * float(jnp.finfo(frame.gradient.dtype).eps))
    if frame.gradient.dtype == jnp.float64:
        return full
    name = str(frame.precision).upper()
    if "HIGHEST" in name or name in ("FLOAT32", "F32_F32_F32"):
        return full
    if frame.precision is not None:
        return LOW_RESOLUTION
    return jax.lax.platform_dependent(
        cpu=lambda: jnp.asarray(full), default=lambda: jnp.asarray(LOW_RESOLUTION)
    )
