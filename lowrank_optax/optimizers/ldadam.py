"""LDAdam."""

from __future__ import annotations

from typing import Unpack

import optax

from lowrank_optax.bases.momentum import power_iterate
from lowrank_optax.core.aliases import Number
from lowrank_optax.optimizers.assemble import low_rank_optimizer
from lowrank_optax.optimizers.options import Options, passes_on
from lowrank_optax.recovery.feedback import error_feedback
from lowrank_optax.recovery.projection import project, project_back
from lowrank_optax.steps.rotation import rotate_moments


@passes_on(low_rank_optimizer, refresh_every=1, square="output")
def ldadam(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rho: Number = 0.908,
    feedback: bool = True,
    scale: Number = 1.0,
    b1: Number = 0.908,
    b2: Number = 0.99,
    eps: Number = 1e-8,
    **options: Unpack[Options],
) -> optax.GradientTransformationExtraArgs:
    """LDAdam: a basis that moves every step, moments that follow, error feedback.

    At every step S takes a block power step towards rho M^ + (1 - rho) G, both moments
    rotate with it, and the next gradient gets what the projection and the rotation lost
    (Robert et al. 2025, "LDAdam"; `power_iterate`, `rotate_moments`, `error_feedback`).
    State of a matrix: mr + 2nr numbers, and mn for the error; about six products and
    one QR a step.

    When to choose it: for a low loss where memory allows, and at small ranks. It ended
    at 3.756 on LLaMA-60M, where `spectral_adam` ended at 3.683 with less state. When
    not: to save memory, since its error is as large as the gradient. `feedback=False`
    saves that memory, but raised the loss by 0.116 (docs/results/ablations.md).

    Deviations: none; this is the released code step for step. Like that code, it
    projects the output side of a square matrix, unless `square` says otherwise.

    Args:
      rho: the momentum's weight in the power step.
      feedback: whether the error is added to the next gradient.
      scale: on the matrices' step; 1 in the source.
      learning_rate, b1, b2, eps: as in `galore`.
      **options: as in `low_rank_optimizer`; the source refreshes at every step.

    Raises:
      ValueError: as `low_rank` does.

    Example:
      >>> tx = lro.ldadam(0.003, rank=4)
    """
    where = optax.chain(power_iterate(rho, b1=b1), project())
    if feedback:
        where = error_feedback(where, b1=b1)
    step = rotate_moments(optax.scale_by_adam(b1, b2, eps))
    stages = optax.chain(where, step, project_back(scale))
    return low_rank_optimizer(stages, learning_rate, **options)
