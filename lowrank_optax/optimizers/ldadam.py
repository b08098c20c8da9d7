"""LDAdam."""

import jax
import optax

from lowrank_optax.bases.momentum import power_iterate
from lowrank_optax.core.aliases import Mask
from lowrank_optax.core.layout import (
    TRANSFORMER_MATRICES,
    DimensionNumbers,
    Rank,
    Square,
)
from lowrank_optax.optimizers.assemble import low_rank_optimizer
from lowrank_optax.recovery.feedback import error_feedback
from lowrank_optax.recovery.projection import project, project_back
from lowrank_optax.steps.rotation import rotate_moments


def ldadam(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: Rank = 0.25,
    refresh_every: int = 1,
    rho: float | jax.Array = 0.908,
    feedback: bool = True,
    scale: float | jax.Array = 1.0,
    b1: float | jax.Array = 0.908,
    b2: float | jax.Array = 0.99,
    eps: float | jax.Array = 1e-8,
    weight_decay: float | jax.Array = 0.0,
    mask: Mask = None,
    dimension_numbers: DimensionNumbers = TRANSFORMER_MATRICES,
    square: Square = "output",
    precision: jax.lax.PrecisionLike = None,
) -> optax.GradientTransformationExtraArgs:
    """LDAdam: a basis that moves every step, moments that follow, error feedback.

    At every step S takes a block power step towards rho M^ + (1 - rho) G, both moments
    turn with it, and what the projection and the turn lost is added to the next
    gradient (Robert et al. 2025, "LDAdam"; equations in `power_iterate`,
    `rotate_moments`, `error_feedback`). This is what the released code computes step
    for step; of a square matrix it projects the output side, as that does, unless
    `square` says otherwise. State of a matrix: mr + 2nr numbers, and mn for the error;
    about seven products and one QR a step.

    When to choose it: for the lowest loss where time and memory allow; small ranks.
    When not: to save memory, with feedback (its error is as large as the gradient;
    `memory_report` shows it). `feedback=False` saves, and loses.

    Args:
      refresh_every: steps between two bases; 1 in the source.
      rho: the momentum's weight in the power step.
      feedback: whether the error is fed back.
      scale: on the matrices' step; 1 in the source.
      learning_rate, rank, b1, b2, eps, weight_decay, mask, dimension_numbers,
        square, precision: as in `galore`.

    Raises:
      ValueError: as `low_rank` does.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> params = {"mlp": {"kernel": jnp.ones((16, 64))}, "norm": jnp.ones(16)}
      >>> tx = lro.ldadam(0.002, rank=4)
      >>> updates, state = tx.update(params, tx.init(params), params)
    """
    where = optax.chain(power_iterate(rho, b1=b1), project())
    if feedback:
        where = error_feedback(where, b1=b1)
    step = rotate_moments(optax.scale_by_adam(b1, b2, eps))
    return low_rank_optimizer(
        optax.chain(where, step, project_back(scale)),
        learning_rate,
        rank=rank,
        refresh_every=refresh_every,
        dimension_numbers=dimension_numbers,
        square=square,
        precision=precision,
        weight_decay=weight_decay,
        mask=mask,
    )
