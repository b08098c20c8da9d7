"""SubTrack++."""

import jax
import optax

from lowrank_optax.bases.grassmann import grassmann_track
from lowrank_optax.core.layout import (
    TRANSFORMER_MATRICES,
    DimensionNumbers,
    Rank,
    Square,
)
from lowrank_optax.core.typing import Mask
from lowrank_optax.optimizers.assemble import low_rank_optimizer
from lowrank_optax.recovery.projection import project
from lowrank_optax.recovery.residual import recover_residual
from lowrank_optax.steps.rotation import rotate_moments


def subtrack(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: Rank = 0.25,
    refresh_every: int = 200,
    step_size: float | jax.Array | None = 10.0,
    scale: float | jax.Array = 1.0,
    limit: float | jax.Array = 1.01,
    b1: float | jax.Array = 0.9,
    b2: float | jax.Array = 0.999,
    eps: float | jax.Array = 1e-8,
    weight_decay: float | jax.Array = 0.0,
    mask: Mask = None,
    dimension_numbers: DimensionNumbers = TRANSFORMER_MATRICES,
    square: Square = "input",
    precision: jax.lax.PrecisionLike = None,
) -> optax.GradientTransformationExtraArgs:
    """SubTrack++: a tracked subspace, rotated moments, the residual given back.

    At a refresh S follows the gradient of the estimation error along a rank-one
    geodesic, and Adam's moments turn with it; every step gives the residual back,
    rescaled (SubTrack++, as the GrassWalk paper compares with it, sections 2 and 5;
    equations in `grassmann_track`, `rotate_moments`, `recover_residual`). State of a
    matrix: mr + 2nr + 1 numbers; two products a step.

    When to choose it: where the gradient's subspace turns slowly and is worth following
    with a cheap refresh. When not: for a basis that explores; then `grass_walk`.

    Deviations: every matrix is tracked (the released code tracks only those with fewer
    rows than columns); the moments turn by eqs. 7 and 8 at the refresh itself (the
    released code multiplies V by 1 - b2 at every interval, and M by S_t^T S_0); bias
    correction, eps and the residual are the paper's (released: as `fira`'s published
    variant).

    Args:
      step_size: eta of `grassmann_track`; None chooses the angle by a line search.
      learning_rate, rank, refresh_every, scale, limit, b1, b2, eps, weight_decay, mask,
        dimension_numbers, square, precision: as in `galore`.

    Raises:
      ValueError: as `low_rank` does.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> params = {"mlp": {"kernel": jnp.ones((16, 64))}, "norm": jnp.ones(16)}
      >>> tx = lro.subtrack(0.002, rank=4, refresh_every=200)
      >>> updates, state = tx.update(params, tx.init(params), params)
    """
    step = rotate_moments(optax.scale_by_adam(b1, b2, eps))
    back = recover_residual(limit, scale=scale)
    return low_rank_optimizer(
        optax.chain(grassmann_track(step_size), project(), step, back),
        learning_rate,
        rank=rank,
        refresh_every=refresh_every,
        dimension_numbers=dimension_numbers,
        square=square,
        precision=precision,
        weight_decay=weight_decay,
        mask=mask,
    )
