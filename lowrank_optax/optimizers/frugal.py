"""FRUGAL."""

from __future__ import annotations

from typing import Literal, Unpack

import optax

from lowrank_optax.bases.singular import dominant_svd
from lowrank_optax.core.aliases import Number
from lowrank_optax.optimizers.assemble import basis_or, low_rank_optimizer
from lowrank_optax.optimizers.options import Options, passes_on
from lowrank_optax.recovery.projection import project
from lowrank_optax.recovery.residual import sign_residual
from lowrank_optax.steps.subspace import reset_moments


@passes_on(low_rank_optimizer)
def frugal(
    learning_rate: optax.ScalarOrSchedule,
    *,
    basis: optax.GradientTransformation | None = None,
    residual: Literal["sign", "sgd"] = "sign",
    residual_scale: Number = 1.0,
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: Number = 1e-8,
    **options: Unpack[Options],
) -> optax.GradientTransformationExtraArgs:
    """FRUGAL: Adam in the subspace, signSGD on the rest.

        W <- W - lr (S G~^O + residual_scale sign(G - S G~))

    Adam restarts at every refresh (Zmushko et al. 2025, "FRUGAL"; `sign_residual`,
    `reset_moments`). State of a matrix: mr + 2nr numbers, or 2nr and r integers with
    coordinates, and a count; three products a step, none with coordinates.

    The source has three splits: `dominant_svd()`; `coordinates(key)`, random rows
    ("columns" there); and `coordinates(order="descending")` with the dimension numbers
    `LAYERS`, which trains the layers of a stacked kernel in blocks. A rank of 0.25 is
    the source's density.

    When to choose it: with `coordinates`, an update without products and a refresh
    without a factorization. When not: at the high learning rates of GaLore, since every
    weight moves by lr at every step.

    Deviations: a residual that is only rounding error takes no step (`sign_residual`).
    Otherwise this is the released code step for step.

    Args:
      basis: the basis rule; `dominant_svd()` by default.
      residual: the optimizer of the rest, "sign" or "sgd".
      residual_scale: learning rate of the rest, as a fraction of the matrices'.
      learning_rate, b1, b2, eps: as in `galore`.
      **options: as in `low_rank_optimizer`.

    Raises:
      ValueError: an unknown residual; and as `low_rank` does.

    Example:
      >>> tx = lro.frugal(0.001, rank=0.25)
    """
    step = reset_moments(optax.scale_by_adam(b1, b2, eps))
    back = sign_residual(residual_scale, step=residual)
    stages = optax.chain(basis_or(basis, dominant_svd), project(), step, back)
    return low_rank_optimizer(stages, learning_rate, **options)
