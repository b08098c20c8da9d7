"""Adam in a subspace that follows the momentum, spectral descent on the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

import optax

from lowrank_optax.bases.momentum import power_iterate
from lowrank_optax.core.aliases import Number
from lowrank_optax.core.newton_schulz import FITTED, Quintic
from lowrank_optax.optimizers.assemble import basis_or, low_rank_optimizer
from lowrank_optax.optimizers.options import Options, passes_on
from lowrank_optax.recovery.projection import project
from lowrank_optax.recovery.spectral import spectral_residual
from lowrank_optax.steps.rotation import Outside, rotate_moments


@passes_on(low_rank_optimizer, refresh_every=10)
def spectral_adam(
    learning_rate: optax.ScalarOrSchedule,
    *,
    basis: optax.GradientTransformation | None = None,
    scale: Number = 1.0,
    residual_scale: Number = 0.5,
    coefficients: Sequence[Quintic] = FITTED,
    neuron_decay: Number | None = None,
    outside: Outside = "zero",
    b1: Number = 0.908,
    b2: Number = 0.99,
    eps: Number = 1e-8,
    **options: Unpack[Options],
) -> optax.GradientTransformationExtraArgs:
    """Adam inside the subspace, rotated with it; spectral descent outside (ours).

        S <- power step, M, V <- rotated by S_t^T S_{t-1}             every T steps
        G~ = S^T G,  M, V <- Adam's of G~,  O = M^ / (sqrt(V^) + eps)
        W <- W - lr (scale S O + residual_scale sqrt(n) polar(G - S G~))

    The power step is LDAdam's (`power_iterate`, `rotate_moments`). polar(R)
    approximates U V^T of R = U diag(s) V^T (`spectral_residual`). State of a matrix: mr
    + 2nr numbers, GaLore's. Four products with S a step, and those of Newton-Schulz.

    When to choose it: for a low loss at GaLore's memory, where steps are large enough
    to pay for the products. On LLaMA-60M and 39 M tokens it had the lowest loss of
    seven methods, at 4.5e-3. It and AdamW had 13 tries there, the others seven
    (docs/results/losses_60m.md). On LLaMA-130M it had the lowest of three, at 3e-3
    (docs/results/losses_130m.md). On LLaMA-1B and 4.9 M tokens it ended at 4.522 and
    AdamW at 5.177, one rate and one run each (docs/results/losses_1b.md).

    When not: where the time of the update matters more than the number of steps. At
    LLaMA-1B and 16,384 tokens a step took 1.48 times AdamW's with refreshes, and 1.37
    between them (docs/results/step_time.md). With fewer tokens the update takes a
    larger share. Nor where microbatches are summed in the subspace.

    COSMOS (arXiv 2502.17410) is the nearest published method. It keeps the full
    momentum, mn numbers more, and takes both steps from it. Here both steps come from
    the gradient. It chooses its basis from an average of G G^T, does not rotate Adam's
    moments with it, and renormalizes the sum.

    Args:
      basis: another basis rule in place of the power step.
      scale: on the matrices' step inside the subspace.
      residual_scale: on the step outside.
      coefficients: (a, b, c) of each Newton-Schulz step (`spectral_residual`).
      neuron_decay: of NorMuon's mean squares of the outputs; None for no such scaling.
      outside: what V is outside of the last subspace, "zero" or "alike"
        (`rotate_moments`; docs/results/ablations.md).
      learning_rate, b1, b2, eps: as in `galore`.
      **options: as in `low_rank_optimizer`.

    Raises:
      ValueError: no coefficients; and as `low_rank` does.

    Example:
      >>> tx = lro.spectral_adam(4.5e-3, rank=4)
    """
    rule = basis_or(basis, lambda: power_iterate(b1=b1))
    step = rotate_moments(optax.scale_by_adam(b1, b2, eps), outside=outside)
    back = spectral_residual(
        residual_scale,
        scale=scale,
        coefficients=coefficients,
        neuron_decay=neuron_decay,
    )
    stages = optax.chain(rule, project(), step, back)
    return low_rank_optimizer(stages, learning_rate, **options)
