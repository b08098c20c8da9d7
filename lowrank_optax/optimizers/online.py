"""Online subspace descent."""

import jax
import optax

from lowrank_optax.bases.pca import online_pca
from lowrank_optax.core.layout import (
    TRANSFORMER_MATRICES,
    DimensionNumbers,
    Rank,
    Square,
)
from lowrank_optax.core.typing import Mask
from lowrank_optax.optimizers.assemble import low_rank_optimizer
from lowrank_optax.recovery.projection import project, project_back
from lowrank_optax.steps.subspace import in_subspace

NEVER = 2**31 - 1


def online_subspace_descent(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: Rank = 0.25,
    optimizer_of_basis: optax.GradientTransformation | None = None,
    penalty: float | jax.Array = 0.0,
    scale: float | jax.Array = 0.25,
    b1: float | jax.Array = 0.9,
    b2: float | jax.Array = 0.999,
    eps: float | jax.Array = 1e-8,
    weight_decay: float | jax.Array = 0.0,
    mask: Mask = None,
    dimension_numbers: DimensionNumbers = TRANSFORMER_MATRICES,
    square: Square = "input",
    precision: jax.lax.PrecisionLike = None,
) -> optax.GradientTransformationExtraArgs:
    """Online subspace descent: GaLore with a basis trained by online PCA.

    The basis P takes one step of an optimizer of its own on the reconstruction loss
    ||P P^T G^ - G^||_F^2 at every step; nothing is ever factorised after step 0
    (Liang et al. 2024, "Memory-Efficient LLM Training with Online Subspace Descent";
    equations in `online_pca`, whose state reports loss and orthonormality drift).
    State of a matrix: 3mr + 2nr + 2 numbers (P with Adam's moments; loss and drift);
    four products a step.

    When to choose it: where no factorisation after the first step can be afforded. When
    not: for stability (the SARA paper, Table 3, finds it unstable and below GoLore); P
    drifts from orthonormal without a penalty.

    Args:
      optimizer_of_basis: any optax optimizer for P, learning rate and sign included;
        by default `optax.adamw(1 / 200, weight_decay=0.01)` (see `online_pca`).
      penalty: lambda on ||P^T P - I||_F^2; 0 in the released code.
      learning_rate, rank, scale, b1, b2, eps, weight_decay, mask, dimension_numbers,
        square, precision: as in `galore`.

    Raises:
      ValueError: as `low_rank` does.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> params = {"mlp": {"kernel": jnp.ones((16, 64))}, "norm": jnp.ones(16)}
      >>> tx = lro.online_subspace_descent(0.01, rank=4)
      >>> updates, state = tx.update(params, tx.init(params), params)
    """
    rule = online_pca(optimizer_of_basis, penalty=penalty)
    step = in_subspace(optax.scale_by_adam(b1, b2, eps))
    return low_rank_optimizer(
        optax.chain(rule, project(), step, project_back(scale)),
        learning_rate,
        rank=rank,
        refresh_every=NEVER,
        dimension_numbers=dimension_numbers,
        square=square,
        precision=precision,
        weight_decay=weight_decay,
        mask=mask,
    )
