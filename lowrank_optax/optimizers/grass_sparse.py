"""Grass, the row-sparse projection (not GrassWalk)."""

import jax
import optax

from lowrank_optax.bases.rows import sample_rows
from lowrank_optax.core.layout import (
    TRANSFORMER_MATRICES,
    DimensionNumbers,
    Rank,
    Square,
)
from lowrank_optax.core.typing import Mask
from lowrank_optax.optimizers.assemble import low_rank_optimizer
from lowrank_optax.recovery.projection import project, project_back
from lowrank_optax.steps.subspace import reset_moments


def grass_sparse(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: Rank = 0.25,
    refresh_every: int = 200,
    key: jax.Array | int,
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
    """Grass: Adam on r sampled rows of the gradient.

    At a refresh r rows are drawn by their norm, without replacement, and Adam starts
    anew on them; a step moves these rows alone (Muhamed et al. 2024, "Grass: Compute
    Efficient Low-Memory LLM Training with Structured Sparse Gradients"; equations in
    `sample_rows`). State of a matrix: 2nr numbers, r integers, a count; no
    product.

    When to choose it: the cheapest update, where most rows may wait. When not: for
    speed per token: `frugal(basis=coordinates(key))` moves the other rows too.

    The source projects to save gradient memory as well; here the full gradient comes
    in. Rows are those of the canonical orientation, along the smaller side. No code
    is published; scale 0.25 is GaLore's.

    Args:
      key: a seed or a typed key for the samples.
      learning_rate, rank, refresh_every, scale, b1, b2, eps, weight_decay, mask,
        dimension_numbers, square, precision: as in `galore`.

    Raises:
      ValueError: as `low_rank` does.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> params = {"mlp": {"kernel": jnp.ones((16, 64))}, "norm": jnp.ones(16)}
      >>> tx = lro.grass_sparse(0.01, rank=4, refresh_every=200, key=0)
      >>> updates, state = tx.update(params, tx.init(params), params)
    """
    step = reset_moments(optax.scale_by_adam(b1, b2, eps))
    return low_rank_optimizer(
        optax.chain(sample_rows(key), project(), step, project_back(scale)),
        learning_rate,
        rank=rank,
        refresh_every=refresh_every,
        dimension_numbers=dimension_numbers,
        square=square,
        precision=precision,
        weight_decay=weight_decay,
        mask=mask,
    )
