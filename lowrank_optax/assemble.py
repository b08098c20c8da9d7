"""What the named optimizers share: Adam, and the bracket with what follows it."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from lowrank_optax.layout import DimensionNumbers, Rank
from lowrank_optax.low_rank import low_rank
from lowrank_optax.published import (
    decay_stepped_weights,
    scale_by_bias_correction,
    scale_by_uncorrected_adam,
)

Mask = Any | Callable[[Any], Any] | None

STATIC_ARGS = (
    "rank",
    "refresh_every",
    "key",
    "basis",
    "mask",
    "dimension_numbers",
    "variant",
    "precision",
)
"""For `optax.inject_hyperparams(galore, static_args=STATIC_ARGS)`: the arguments of the
named optimizers that are no numbers to be scheduled."""


def adam(
    b1: float | jax.Array,
    b2: float | jax.Array,
    eps: float | jax.Array | None,
    variant: str,
) -> optax.GradientTransformation:
    """Adam as the papers write it, or as galore-torch and fira compute it."""
    if variant == "published":
        return scale_by_uncorrected_adam(b1, b2, 1e-6 if eps is None else eps)
    if variant != "paper":
        raise ValueError(f'variant={variant!r}: choose "paper" or "published"')
    return optax.scale_by_adam(b1, b2, 1e-8 if eps is None else eps)


def optimizer(
    stages: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: Rank,
    refresh_every: int,
    dimension_numbers: DimensionNumbers,
    precision: jax.lax.PrecisionLike,
    weight_decay: float | jax.Array,
    mask: Mask,
    published_decays: tuple[Any, Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The bracket around the stages, then weight decay and learning rate.

    Leaves of full rank pass through the stages' Adam too, which makes it AdamW for
    them. With `published_decays` = (b1, b2) the rest is the released packages': bias
    correction on the step size, and the decay last.
    """
    bracket = low_rank(
        stages,
        rank=rank,
        refresh_every=refresh_every,
        dimension_numbers=dimension_numbers,
        precision=precision,
    )
    rate = optax.scale_by_learning_rate(learning_rate)
    if published_decays is None:
        return optax.chain(bracket, optax.add_decayed_weights(weight_decay, mask), rate)
    decay = decay_stepped_weights(learning_rate, weight_decay)
    if mask is not None:
        decay = optax.masked(decay, mask)
    return optax.chain(
        bracket, scale_by_bias_correction(*published_decays), rate, decay
    )
