"""Rotary position embedding, and how long-context models slow its rotations.

Array names end in their axes: B batch, T tokens, N heads, H head size, P = H / 2 pairs.
"""

import math
from dataclasses import dataclass, fields

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class LinearScaling:
    """Every pair turns `factor` times slower (Chen et al., 2023).

        frequency_i <- frequency_i / factor

    "Position interpolation", https://arxiv.org/abs/2306.15595: positions of a context
    `factor` times as long meet the angles of the original one.

    Raises:
      ValueError: if `factor` is below 1.

    Example:
      >>> LinearScaling(4.0)(jnp.array([1.0, 0.1])).tolist()
      [0.25, 0.02500000037252903]
    """

    factor: float

    def __post_init__(self) -> None:
        _check_positive(self)

    def __call__(self, frequency_P: jax.Array) -> jax.Array:
        return frequency_P / self.factor


@dataclass(frozen=True)
class Llama3Scaling:
    """Slow pairs turn `factor` times slower, fast pairs stay, those between blend.

        turns_i = original_positions * frequency_i / 2 pi
        keep_i  = clip((turns_i - low) / (high - low), 0, 1)
        frequency_i <- (keep_i + (1 - keep_i) / factor) * frequency_i

    as in Llama 3.1 (Grattafiori et al., 2024, https://arxiv.org/abs/2407.21783), with
    factor 8, low 1, high 4 and 8192 original positions.

    Attributes:
      factor: how many times slower the slowest pairs turn; 1 or more.
      low: pairs with fewer turns than this in the original context are slowed fully.
      high: pairs with more turns than this keep their frequency.
      original_positions: the length of the original context.

    Raises:
      ValueError: if `factor` is below 1, another number is not positive, or `low` is
        not below `high`.

    Example:
      >>> scaling = Llama3Scaling(8.0, low=1.0, high=4.0, original_positions=8192)
      >>> scaling(jnp.array([1.0, 1e-4])).tolist()  # 1304 turns, and 0.13
      [1.0, 1.249999968422344e-05]
    """

    factor: float
    low: float
    high: float
    original_positions: int

    def __post_init__(self) -> None:
        _check_positive(self)
        if self.low >= self.high:
            raise ValueError(
                f"rope_scaling: low={self.low} must be below high={self.high}; "
                "Llama 3.1 has low=1 and high=4"
            )

    def __call__(self, frequency_P: jax.Array) -> jax.Array:
        turns_P = self.original_positions * frequency_P / (2 * math.pi)
        keep_P = jnp.clip((turns_P - self.low) / (self.high - self.low), 0, 1)
        return (keep_P + (1 - keep_P) / self.factor) * frequency_P


RopeScaling = LinearScaling | Llama3Scaling


def _check_positive(scaling: RopeScaling) -> None:
    for field in fields(scaling):
        least = 1 if field.name == "factor" else 0
        value = getattr(scaling, field.name)
        if value < least or value == 0:
            bound = "1 or more" if least else "positive"
            raise ValueError(
                f"rope_scaling: {field.name}={value} must be {bound}; "
                "give None for a model without scaling"
            )


def rotary_angles(
    positions: jax.Array, H: int, theta: float, scaling: RopeScaling | None = None
) -> jax.Array:
    """Radians that position t turns pair i of a head by: t * theta**(-2 i / H).

    `scaling` changes the frequencies theta**(-2 i / H).

    Args:
      positions: int (..., T).
      H: the head size.
      theta: the base of the wavelengths.
      scaling: None for the frequencies as they are.

    Returns:
      float32 (..., T, H / 2).

    Example:
      >>> rotary_angles(jnp.arange(2), 4, theta=100.0)[1].tolist()
      [1.0, 0.10000000149011612]
    """
    frequency_P = theta ** (-jnp.arange(0, H, 2, dtype=jnp.float32) / H)
    if scaling is not None:
        frequency_P = scaling(frequency_P)
    return positions.astype(jnp.float32)[..., None] * frequency_P


def rotate(x_BTNH: jax.Array, angle_TP: jax.Array) -> jax.Array:
    """Rotary position embedding (Su et al., 2021, https://arxiv.org/abs/2104.09864).

    Turns the pair (unit i, unit i + H / 2) of every head by its angle, in float32.
    Keeps shape and dtype. The angles are (T, P), or (B, T, P) where each sequence has
    its own positions.
    """
    cos, sin = (f(angle_TP)[..., None, :] for f in (jnp.cos, jnp.sin))
    a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return rotated.astype(x_BTNH.dtype)
