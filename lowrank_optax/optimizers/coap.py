"""COAP."""

import jax
import optax

from lowrank_optax.bases.momentum import correlation_aware
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


def coap(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: Rank = 0.25,
    refresh_every: int = 200,
    recompute_every: int = 5,
    step_size: float | jax.Array = 0.1,
    scale: float | jax.Array = 0.25,
    b1: float | jax.Array = 0.9,
    b2: float | jax.Array = 0.999,
    eps: float | jax.Array = 1e-6,
    weight_decay: float | jax.Array = 0.0,
    mask: Mask = None,
    dimension_numbers: DimensionNumbers = TRANSFORMER_MATRICES,
    square: Square = "input",
    precision: jax.lax.PrecisionLike = None,
) -> optax.GradientTransformationExtraArgs:
    """COAP: GaLore with a basis that is corrected by gradient steps between sketches.

    At a refresh the basis takes a gradient step that lowers the reconstruction error
    and raises the momentum's correlation with the gradient; at every
    `recompute_every`-th it is recomputed from a sketch (Xiao et al. 2025, "COAP";
    equations and deviations in `correlation_aware`). The moments are left as they are,
    the released default. State of a matrix: mr + 2nr numbers; two products a step.

    Deviation: Adam's moments are corrected for bias before eps is added; the released
    code corrects the step size.

    When to choose it: a cheap refresh without an SVD. When not: with very small
    gradients, whose squares scale its steps (the mean loss of a language model is such
    a case; then only the recomputations move it).

    Args:
      recompute_every: refreshes from one recomputation to the next.
      step_size: of the basis' gradient step.
      learning_rate, rank, refresh_every, scale, b1, b2, eps, weight_decay, mask,
        dimension_numbers, square, precision: as in `galore`.

    Raises:
      ValueError: as `low_rank` does.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> params = {"mlp": {"kernel": jnp.ones((16, 64))}, "norm": jnp.ones(16)}
      >>> tx = lro.coap(0.01, rank=4, refresh_every=40)
      >>> updates, state = tx.update(params, tx.init(params), params)
    """
    rule = correlation_aware(step_size, recompute_every=recompute_every)
    step = in_subspace(optax.scale_by_adam(b1, b2, eps))
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
