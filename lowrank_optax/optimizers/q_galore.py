"""Q-GaLore."""

import jax
import optax

from lowrank_optax.bases.refresh import lazy_refresh
from lowrank_optax.bases.singular import dominant_svd
from lowrank_optax.bases.storage import quantize_basis
from lowrank_optax.core.layout import (
    TRANSFORMER_MATRICES,
    DimensionNumbers,
    Rank,
    Square,
)
from lowrank_optax.core.typing import Mask
from lowrank_optax.optimizers.assemble import basis_or, low_rank_optimizer
from lowrank_optax.recovery.projection import project, project_back
from lowrank_optax.steps.quantize import quantize_moments
from lowrank_optax.steps.subspace import in_subspace


def q_galore(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: Rank = 0.25,
    refresh_every: int = 200,
    basis: optax.GradientTransformation | None = None,
    bits: int = 4,
    threshold: float | jax.Array = 0.4,
    shards: int = 1,
    min_size: int = 4096,
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
    """Q-GaLore: 4-bit bases, 8-bit moments, fewer refreshes where a basis stands still.

    GaLore with its basis stored in `bits` bits, Adam's moments in eight, and each
    leaf's refresh interval doubled while its bases stay similar (Zhang et al. 2024,
    "Q-GaLore"; equations in `quantize_basis`, `quantize_moments`, `lazy_refresh`).
    State of a matrix: bits mr / 8 + 2nr bytes, and scales; two products a step.

    When to choose it: GaLore at a quarter of its memory. When not: where the subspace
    should be left before it freezes, which a lazy refresh hastens.

    The source also stores weights in 8 bits with stochastic rounding: here
    `store_weights` and `apply_updates`, with any optimizer.

    Args:
      basis: a basis rule to store in few bits; `dominant_svd()` by default.
      bits: 4 or 8.
      shards: as in `quantize_moments`.
      min_size: moments with fewer numbers stay as they are.
      threshold: the mean similarity from which on a leaf's interval doubles.
      learning_rate, rank, refresh_every, scale, b1, b2, eps, weight_decay, mask,
        dimension_numbers, square, precision: as in `galore`.

    Raises:
      ValueError: bits other than 4 and 8; and as `low_rank` does.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> params = {"mlp": {"kernel": jnp.ones((16, 64))}, "norm": jnp.ones(16)}
      >>> tx = lro.q_galore(0.01, rank=4, refresh_every=200)
      >>> updates, state = tx.update(params, tx.init(params), params)
    """
    rule = quantize_basis(basis_or(basis, dominant_svd), bits=bits)
    rule = lazy_refresh(rule, threshold=threshold)
    adam = optax.scale_by_adam(b1, b2, eps)
    step = in_subspace(quantize_moments(adam, shards=shards, min_size=min_size))
    return low_rank_optimizer(
        optax.chain(rule, project(), step, project_back(scale)),
        learning_rate,
        rank=rank,
        refresh_every=refresh_every,
        dimension_numbers=dimension_numbers,
        square=square,
        precision=precision,
        weight_decay=weight_decay,
        mask=mask,
    )
