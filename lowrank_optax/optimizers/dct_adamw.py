"""DCT-AdamW."""

import jax
import optax

from lowrank_optax.bases.dct import dct_columns
from lowrank_optax.core.layout import (
    TRANSFORMER_MATRICES,
    DimensionNumbers,
    Rank,
    Square,
)
from lowrank_optax.core.typing import Mask
from lowrank_optax.optimizers.assemble import low_rank_optimizer
from lowrank_optax.recovery.feedback import error_feedback
from lowrank_optax.recovery.projection import project, project_back
from lowrank_optax.steps.rotation import rotate_moments


def dct_adamw(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: Rank = 0.25,
    refresh_every: int = 1,
    feedback: bool = False,
    scale: float | jax.Array = 1.0,
    b1: float | jax.Array = 0.9,
    b2: float | jax.Array = 0.999,
    eps: float | jax.Array = 1e-8,
    weight_decay: float | jax.Array = 0.0,
    mask: Mask = None,
    dimension_numbers: DimensionNumbers = TRANSFORMER_MATRICES,
    square: Square = "input",
    precision: jax.lax.PrecisionLike = None,
) -> optax.GradientTransformationExtraArgs:
    """DCT-AdamW: Adam on the cosine transform's columns that the gradient is long in.

    S_t = r columns of the DCT matrix, chosen by one product; Adam's moments go with
    their columns (Modoranu et al. 2025, "FFT-based Dynamic Subspace Selection";
    equations in `dct_columns`). State of a matrix: 2nr numbers and r integers, and mn
    with feedback; two products a step, and at a refresh one of m x m and n.

    When to choose it: a basis that follows the gradient without any factorisation, and
    is not stored. When not: where the top of the spectrum is what counts, which a fixed
    matrix only comes near to.

    As the released code with `rotate_subspace` (read, not run beside it), on the
    smaller side of every matrix; its feedback can be kept in 4 or 8 bits too.

    Args:
      refresh_every: steps between two choices; 1 in the released code.
      feedback: whether what the projection lost is added to the next gradient.
      scale: on the matrices' step; 1 in the source.
      learning_rate, rank, b1, b2, eps, weight_decay, mask, dimension_numbers,
        square, precision: as in `galore`.

    Raises:
      ValueError: as `low_rank` does.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> params = {"mlp": {"kernel": jnp.ones((16, 64))}, "norm": jnp.ones(16)}
      >>> tx = lro.dct_adamw(0.002, rank=4)
      >>> updates, state = tx.update(params, tx.init(params), params)
    """
    where = optax.chain(dct_columns(), project())
    if feedback:
        where = error_feedback(where, b1=0.0)  # the turn loses whole rows of M
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
