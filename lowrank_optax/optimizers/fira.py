"""Fira, and with `basis=sara_sample(key)` Fira-SARA."""

from __future__ import annotations

from typing import Unpack

import optax

from lowrank_optax.bases.singular import dominant_svd
from lowrank_optax.core.aliases import Number
from lowrank_optax.optimizers.assemble import (
    adam_or,
    basis_or,
    low_rank_optimizer,
    variant_optimizer,
)
from lowrank_optax.optimizers.options import Options, passes_on
from lowrank_optax.recovery.projection import project
from lowrank_optax.recovery.published import Variant
from lowrank_optax.recovery.residual import recover_residual


@passes_on(low_rank_optimizer)
def fira(
    learning_rate: optax.ScalarOrSchedule,
    *,
    basis: optax.GradientTransformation | None = None,
    step: optax.GradientTransformation | None = None,
    scale: Number = 0.25,
    limit: Number = 1.01,
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: Number | None = None,
    variant: Variant = "paper",
    **options: Unpack[Options],
) -> optax.GradientTransformationExtraArgs:
    """Fira: GaLore plus the rescaled residual, so that the update has full rank.

        W <- W - lr (scale S G~^O + phi (G - S G~)),   phi_i = ||G~^O_i|| / ||G~_i||

    with the residual's norm limited to grow by `limit` a step (Chen et al. 2024,
    "Fira"; SARA paper, section 2; `recover_residual`). State of a matrix: mr + 2nr + 1
    numbers.

    When to choose it: with random bases. There the residual lowered the loss of
    LLaMA-60M by 0.066 +- 0.037 (docs/results/ablations.md). When not: to gain over
    `galore` with dominant bases. The residual lowered the loss by 0.019 +- 0.020, and
    in other runs `fira` ended at 3.955 and `galore` at 3.932
    (docs/results/losses_60m.md). It costs column norms and one more pass over the
    gradient.

    Deviations: `variant="published"` is fira 1.0.2 step for step: as for `galore`, with
    the residual G - scale S G~ and a limiter on norms before bias correction.

    Args:
      limit: zeta, the residual's largest growth from step to step.
      learning_rate, basis, step, scale, b1, b2, eps, variant: as in `galore`.
      **options: as in `low_rank_optimizer`.

    Raises:
      ValueError: as `galore` does.

    Example:
      >>> tx = lro.fira(0.003, rank=4)
    """
    step = adam_or(step, b1, b2, eps, variant)
    back = recover_residual(limit, scale=scale, variant=variant)
    stages = optax.chain(basis_or(basis, dominant_svd), project(), step, back)
    return variant_optimizer(stages, learning_rate, variant, b1, b2, **options)
