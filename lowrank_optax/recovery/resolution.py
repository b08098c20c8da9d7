"""The part of a residual that is rounding."""

import math

import jax
import jax.numpy as jnp

from lowrank_optax.core.frame import Frame

LOW_RESOLUTION = 0.02
"""Of `resolution`, where products round to TF32 or bfloat16."""


def resolution(frame: Frame) -> float | jax.Array:
    """The part of ||G diag(phi)|| under which a residual's norm is rounding.

    The difference of two squared norms that agree to a part eps has no digit left, and
    the products with S round too: to TF32 or bfloat16 on accelerators, unless their
    precision says otherwise. A residual of zero was seen as 1e-4 of G in float32, 4e-3
    in TF32 and 1.2e-2 in bfloat16 products (512 x 1376, r = 128, on an H100).
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
