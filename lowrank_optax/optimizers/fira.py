"""Fira, and with `basis=sara_sample(key)` Fira-SARA."""

import jax
import optax

from lowrank_optax.bases.singular import dominant_svd
from lowrank_optax.core.aliases import Mask
from lowrank_optax.core.layout import (
    TRANSFORMER_MATRICES,
    DimensionNumbers,
    Rank,
    Square,
)
from lowrank_optax.optimizers.assemble import adam_or, basis_or, low_rank_optimizer
from lowrank_optax.recovery.projection import project
from lowrank_optax.recovery.published import Variant, arithmetic_of
from lowrank_optax.recovery.residual import recover_residual


def fira(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: Rank = 0.25,
    refresh_every: int = 200,
    basis: optax.GradientTransformation | None = None,
    step: optax.GradientTransformation | None = None,
    scale: float | jax.Array = 0.25,
    limit: float | jax.Array = 1.01,
    b1: float | jax.Array = 0.9,
    b2: float | jax.Array = 0.999,
    eps: float | jax.Array | None = None,
    weight_decay: float | jax.Array = 0.0,
    mask: Mask = None,
    dimension_numbers: DimensionNumbers = TRANSFORMER_MATRICES,
    square: Square = "input",
    precision: jax.lax.PrecisionLike = None,
    variant: Variant = "paper",
) -> optax.GradientTransformationExtraArgs:
    """Fira: GaLore plus the rescaled residual, so that the update has full rank.

    W <- W - lr (scale S G~^O + phi (G - S G~)), phi_i = ||G~^O_i|| / ||G~_i||, with the
    residual's norm limited to grow by `limit` a step (Chen et al. 2024, "Fira"; SARA
    paper, section 2; equations in `recover_residual`). State: mr + 2nr + 1 numbers.

    When to choose it: as `galore`, for column norms and another pass over the gradient;
    the products with S are the same two. When not: with random bases, since its moments
    are not rotated and phi is read off them (GrassWalk paper, section 5); then
    `grass_jump`.

    `variant="published"` is fira 1.0.2 step for step: as for `galore`, and the residual
    is G - scale S G~, which gives 1 - scale of the part inside the subspace back at
    scale 1; the limiter sees the norms before bias correction.

    Args:
      limit: zeta, the residual's largest growth from step to step.
      learning_rate, rank, refresh_every, basis, step, scale, b1, b2, eps, weight_decay,
        mask, dimension_numbers, square, precision, variant: as in `galore`.

    Raises:
      ValueError: as `low_rank` does, and for an unknown variant.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> params = {"mlp": {"kernel": jnp.ones((16, 64))}, "norm": jnp.ones(16)}
      >>> tx = lro.fira(0.003, rank=4, refresh_every=200)
      >>> updates, state = tx.update(params, tx.init(params), params)
    """
    arithmetic = arithmetic_of(variant)
    step = adam_or(step, b1, b2, eps, variant)
    back = recover_residual(limit, scale=scale, variant=variant)
    return low_rank_optimizer(
        optax.chain(basis_or(basis, dominant_svd), project(), step, back),
        learning_rate,
        rank=rank,
        refresh_every=refresh_every,
        dimension_numbers=dimension_numbers,
        square=square,
        precision=precision,
        after=arithmetic.after(learning_rate, weight_decay, mask, b1, b2),
    )
