"""FRUGAL."""

from typing import Literal

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
from lowrank_optax.optimizers.assemble import basis_or, low_rank_optimizer
from lowrank_optax.recovery.projection import project
from lowrank_optax.recovery.residual import sign_residual
from lowrank_optax.steps.subspace import reset_moments


def frugal(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: Rank = 0.25,
    refresh_every: int = 200,
    basis: optax.GradientTransformation | None = None,
    residual: Literal["sign", "sgd"] = "sign",
    residual_scale: float | jax.Array = 1.0,
    b1: float | jax.Array = 0.9,
    b2: float | jax.Array = 0.999,
    eps: float | jax.Array = 1e-8,
    weight_decay: float | jax.Array = 0.0,
    mask: Mask = None,
    dimension_numbers: DimensionNumbers = TRANSFORMER_MATRICES,
    square: Square = "input",
    precision: jax.lax.PrecisionLike = None,
) -> optax.GradientTransformationExtraArgs:
    """FRUGAL: Adam in the subspace, signSGD on all the rest.

    W <- W - lr (S G~^O + residual_scale sign(G - S G~)), Adam starting anew at every
    refresh (Zmushko et al. 2025, "FRUGAL"; equations in `sign_residual`,
    `reset_moments`). This is what the released code computes step for step. State of
    a matrix: mr + 2nr numbers, or 2nr and r integers with coordinates, and a count;
    three products a step, none with coordinates.

    The source's three ways to split: `dominant_svd()`; `coordinates(key)`, rows chosen
    at random ("columns" there); and whole matrices in turn, which is
    `coordinates(order="descending")` with the dimension numbers `LAYERS` for stacked
    kernels. A rank of 0.25 is the source's density.

    When to choose it: with `coordinates`, an update without products and a refresh
    without a factorisation. When not: at the high learning rates of GaLore, since every
    weight moves by lr at every step.

    Args:
      basis: the basis rule; `dominant_svd()` by default.
      residual: the rest's optimizer, "sign" or "sgd".
      residual_scale: the rest's learning rate, as a part of the matrices'.
      learning_rate, rank, refresh_every, b1, b2, eps, weight_decay, mask,
        dimension_numbers, square, precision: as in `galore`.

    Raises:
      ValueError: an unknown residual; and as `low_rank` does.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> params = {"mlp": {"kernel": jnp.ones((16, 64))}, "norm": jnp.ones(16)}
      >>> tx = lro.frugal(0.001, rank=0.25, refresh_every=200)
      >>> updates, state = tx.update(params, tx.init(params), params)
    """
    step = reset_moments(optax.scale_by_adam(b1, b2, eps))
    back = sign_residual(residual_scale, step=residual)
    return low_rank_optimizer(
        optax.chain(basis_or(basis, dominant_svd), project(), step, back),
        learning_rate,
        rank=rank,
        refresh_every=refresh_every,
        dimension_numbers=dimension_numbers,
        square=square,
        precision=precision,
        weight_decay=weight_decay,
        mask=mask,
    )
