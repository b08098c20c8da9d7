"""APOLLO and APOLLO-Mini."""

from __future__ import annotations

from typing import Unpack

import optax

from lowrank_optax.bases.random import gaussian
from lowrank_optax.core.aliases import Key, Number
from lowrank_optax.optimizers.assemble import (
    low_rank_optimizer,
    one_of,
    variant_optimizer,
)
from lowrank_optax.optimizers.options import Options, passes_on
from lowrank_optax.recovery.projection import project
from lowrank_optax.recovery.published import Variant, arithmetic_of
from lowrank_optax.recovery.scaling import scale_gradient
from lowrank_optax.steps.subspace import in_subspace


@passes_on(low_rank_optimizer)
def apollo(
    learning_rate: optax.ScalarOrSchedule,
    *,
    key: Key | None = None,
    basis: optax.GradientTransformation | None = None,
    scale: Number = 1.0,
    limit: Number = 1.01,
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: Number | None = None,
    variant: Variant = "paper",
    **options: Unpack[Options],
) -> optax.GradientTransformationExtraArgs:
    """APOLLO: the gradient, each channel scaled as Adam scales it in a random subspace.

        W <- W - lr sqrt(scale) G diag(phi),   phi_i = ||G~^O_:,i|| / ||G~_:,i||

    with a Gaussian S, and the step's norm limited to grow by `limit` (Zhu et al. 2025,
    "APOLLO"; `scale_gradient`). State of a matrix: 2nr + 1 numbers, since S is drawn
    from its key at every step; one product a step.

    When to choose it: no basis in the state, no factorization, one product. When not:
    where the gradient's directions need preconditioning, since each column of the step
    is a multiple of the gradient's column. Use `grass_jump` there.

    Deviations: torch's random numbers are not reproduced. Otherwise
    `variant="published"` is apollo-torch 1.0.3 step for step, as for `fira`. Like the
    released code, both variants keep the moments when S is redrawn.

    Args:
      key: a seed or a typed key for the projections; required unless `basis` is passed.
      basis: another basis rule; `gaussian(key, stored=True)` stores S in the state.
      scale: alpha; its square root multiplies the step.
      limit: zeta, the step's largest growth from step to step.
      learning_rate, b1, b2, eps, variant: as in `galore`.
      **options: as in `low_rank_optimizer`.

    Raises:
      ValueError: neither or both of `key` and `basis`; an unknown variant; and as
        `low_rank` does.

    Example:
      >>> tx = lro.apollo(0.003, rank=4, key=0)
    """
    step = in_subspace(arithmetic_of(variant).adam(b1, b2, eps))
    back = scale_gradient(limit, scale=scale, variant=variant)
    stages = optax.chain(one_of(key, basis, gaussian), project(), step, back)
    return variant_optimizer(stages, learning_rate, variant, b1, b2, **options)


@passes_on(low_rank_optimizer, rank=1)
def apollo_mini(
    learning_rate: optax.ScalarOrSchedule,
    *,
    key: Key | None = None,
    basis: optax.GradientTransformation | None = None,
    scale: Number = 128.0,
    limit: Number = 1.01,
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: Number | None = None,
    variant: Variant = "paper",
    **options: Unpack[Options],
) -> optax.GradientTransformationExtraArgs:
    """APOLLO-Mini: `apollo` at rank 1, with one factor for the matrix.

        W <- W - lr sqrt(scale) phi G,   phi = ||G~^O||_F / ||G~||_F

    (Zhu et al. 2025, "APOLLO"; `scale_gradient`.) State of a matrix: 2n + 1 numbers;
    one product of rank one a step. When to choose it: SGD's memory. When not: where
    `apollo` fits, which scales each channel. Deviations: those of `apollo`.

    Args:
      scale: alpha, 128 in the source; its square root multiplies the step.
      key, basis, limit: as in `apollo`.
      learning_rate, b1, b2, eps, variant: as in `galore`.
      **options: as in `low_rank_optimizer`; the rank is 1 in the source.

    Raises:
      ValueError: as `apollo` does.

    Example:
      >>> tx = lro.apollo_mini(0.003, key=0)
    """
    step = in_subspace(arithmetic_of(variant).adam(b1, b2, eps))
    back = scale_gradient(limit, per="matrix", scale=scale, variant=variant)
    stages = optax.chain(one_of(key, basis, gaussian), project(), step, back)
    return variant_optimizer(stages, learning_rate, variant, b1, b2, **options)
