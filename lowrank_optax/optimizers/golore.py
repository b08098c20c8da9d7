"""GoLore."""

import jax
import optax

from lowrank_optax.bases.random import random_after
from lowrank_optax.core.layout import (
    TRANSFORMER_MATRICES,
    DimensionNumbers,
    Rank,
    Square,
)
from lowrank_optax.core.typing import Mask
from lowrank_optax.optimizers.assemble import low_rank_optimizer
from lowrank_optax.recovery.projection import project, project_back
from lowrank_optax.steps.rotation import rotate_moments


def golore(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: Rank = 0.25,
    refresh_every: int = 200,
    switch_step: int | jax.Array,
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
    """GoLore: GaLore whose subspace is random in the end.

    At a refresh the basis is the gradient's leading singular vectors before
    `switch_step` and uniformly random from it on; the first moment turns with it, M <-
    S_t^T S_{t-1} M, the second stays (He et al. 2025, "Subspace Optimization for Large
    Language Models with Convergence Guarantees"; equations in `random_after`). State
    of a matrix: mr + 2nr numbers; two products a step.

    When to choose it: where GaLore stalls late because noise fills its subspace. When
    not: for the whole run (a random subspace alone misses most of the gradient);
    `grass_jump` gives that part back, `basis=sara_sample(key)` in `galore` samples.

    Deviation: the released code turns M for one step and forgets it; here it is kept,
    as in the paper. Scale 0.25 is GaLore's; the released script takes 1.

    Args:
      switch_step: the first step of random bases; the source takes a half to 0.8 of
        the run.
      key: a seed or a typed key for the random bases.
      learning_rate, rank, refresh_every, scale, b1, b2, eps, weight_decay, mask,
        dimension_numbers, square, precision: as in `galore`.

    Raises:
      ValueError: as `low_rank` does.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> params = {"mlp": {"kernel": jnp.ones((16, 64))}, "norm": jnp.ones(16)}
      >>> tx = lro.golore(0.01, rank=4, refresh_every=200, switch_step=8000, key=0)
      >>> updates, state = tx.update(params, tx.init(params), params)
    """
    step = rotate_moments(optax.scale_by_adam(b1, b2, eps), moments="first")
    rule = random_after(switch_step, key)
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
