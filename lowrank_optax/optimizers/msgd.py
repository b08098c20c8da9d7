"""Momentum SGD in a sampled subspace, the optimizer of SARA's theory."""

import jax
import optax

from lowrank_optax.bases.singular import sara_sample
from lowrank_optax.core.layout import (
    TRANSFORMER_MATRICES,
    DimensionNumbers,
    Rank,
    Square,
)
from lowrank_optax.core.typing import Mask
from lowrank_optax.optimizers.assemble import low_rank_optimizer, one_of
from lowrank_optax.recovery.projection import project, project_back
from lowrank_optax.steps.rotation import rotate_moments


def msgd(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: Rank = 0.25,
    refresh_every: int = 200,
    key: jax.Array | int | None = None,
    basis: optax.GradientTransformation | None = None,
    scale: float | jax.Array = 1.0,
    b1: float | jax.Array = 0.9,
    weight_decay: float | jax.Array = 0.0,
    mask: Mask = None,
    dimension_numbers: DimensionNumbers = TRANSFORMER_MATRICES,
    square: Square = "input",
    precision: jax.lax.PrecisionLike = None,
) -> optax.GradientTransformationExtraArgs:
    """MSGD-SARA: momentum SGD in a sampled subspace, with momentum re-projection.

        M <- S_t^T S_{t-1} M   at a refresh
        M <- b1 M + (1 - b1) S_t^T G_t,    W <- W - lr scale S_t M

    (SARA paper, section 3.3: the method of Theorem 3.4, which converges at
    O(1 / T + 1 / sqrt(T)); its beta_1 is 1 - b1 here.) State of a matrix: mr + nr
    numbers; two products a step.

    When to choose it: to study convergence, and where SGD trains. When not: for
    transformers, which want Adam's second moment; then `galore(basis=sara_sample)`.

    Args:
      key: a seed or a typed key for SARA's samples; required unless `basis` is given.
      basis: another basis rule in place of `sara_sample(key)`.
      scale: on the matrices' step; 1 in the paper.
      learning_rate, rank, refresh_every, b1, weight_decay, mask, dimension_numbers,
        square, precision: as in `galore`.

    Raises:
      ValueError: neither or both of `key` and `basis`; and as `low_rank` does.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> params = {"mlp": {"kernel": jnp.ones((16, 64))}, "norm": jnp.ones(16)}
      >>> tx = lro.msgd(0.1, rank=4, refresh_every=200, key=0)
      >>> updates, state = tx.update(params, tx.init(params), params)
    """
    rule = one_of(key, basis, sara_sample)
    step = rotate_moments(optax.ema(b1, debias=False))
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
