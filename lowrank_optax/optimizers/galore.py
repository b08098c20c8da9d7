"""GaLore, and with `basis=sara_sample(key)` GaLore-SARA."""

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
from lowrank_optax.recovery.projection import project, project_back
from lowrank_optax.recovery.published import Variant


@passes_on(low_rank_optimizer)
def galore(
    learning_rate: optax.ScalarOrSchedule,
    *,
    basis: optax.GradientTransformation | None = None,
    step: optax.GradientTransformation | None = None,
    scale: Number = 0.25,
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: Number | None = None,
    variant: Variant = "paper",
    **options: Unpack[Options],
) -> optax.GradientTransformationExtraArgs:
    """GaLore: Adam on the gradient's projection, its step projected back.

        G~ = S^T G;   W <- W - lr scale S M^ / (sqrt(V^) + eps)

    for attention and MLP matrices, AdamW for all other leaves (Zhao et al. 2024,
    "GaLore"; SARA paper, section 2). Moments are not rotated at a refresh. State of a
    matrix: mr + 2nr numbers.

    When to choose it: few products a step, and no residual. `basis=sara_sample(key)`
    samples the subspace, so that it does not freeze. On LLaMA-60M that changed the loss
    by no more than the noise (0.001 +- 0.059; docs/results/ablations.md). When not:
    with a random basis, which alone misses most of the gradient; `grass_jump` recovers
    that part.

    Deviations: the signs of singular vectors are fixed (`singular.fix_signs`).
    `variant="published"` is galore-torch 1.0 step for step: bias correction on the step
    size, eps 1e-6, weight decay last, on the stepped weights, and never scaled.

    Args:
      learning_rate: a number or a schedule.
      basis: the basis rule; `dominant_svd()` by default.
      step: a stage in place of Adam, such as `in_subspace(inner)`; b1, b2 and eps then
        have no effect.
      scale: alpha, on the matrices' step alone.
      b1: decay rate of M.
      b2: decay rate of V.
      eps: added to sqrt(V); 1e-8, or 1e-6 for the published variant.
      variant: "paper" or "published".
      **options: as in `low_rank_optimizer`.

    Raises:
      ValueError: as `low_rank` does; an unknown variant, or a step with "published".

    Example:
      >>> tx = lro.galore(0.01, rank=4, basis=lro.sara_sample(key=0))
      >>> state = tx.init({"mlp": {"kernel": jnp.ones((16, 64))}, "norm": jnp.ones(16)})
    """
    step = adam_or(step, b1, b2, eps, variant)
    stages = optax.chain(
        basis_or(basis, dominant_svd), project(), step, project_back(scale)
    )
    return variant_optimizer(stages, learning_rate, variant, b1, b2, **options)
