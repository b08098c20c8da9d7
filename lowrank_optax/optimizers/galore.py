"""GaLore, and with `basis=sara_sample(key)` GaLore-SARA."""

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
from lowrank_optax.recovery.projection import project, project_back
from lowrank_optax.recovery.published import Variant, arithmetic_of


def galore(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: Rank = 0.25,
    refresh_every: int = 200,
    basis: optax.GradientTransformation | None = None,
    step: optax.GradientTransformation | None = None,
    scale: float | jax.Array = 0.25,
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
    """GaLore: Adam on the gradient's projection, its step projected back.

    G~ = S^T G;  W <- W - lr scale S M^ / (sqrt(V^) + eps)   for attention and MLP
    matrices, AdamW for everything else (Zhao et al. 2024, "GaLore"; SARA paper, section
    2). State of a matrix: mr + 2nr numbers. The moments are not rotated at a refresh.

    When to choose it: the least work per step, with `basis=sara_sample(key)` so that
    the subspace does not freeze. When not: with a random basis, which alone misses
    most of the gradient; `grass_jump` gives that part back.

    Deviations: singular vectors' signs are fixed (`linalg.fix_signs`); the paper and
    the released package leave them to the SVD routine. `variant="published"` is
    galore-torch 1.0 step for step: bias correction on the step size, eps 1e-6, weight
    decay last, on the stepped weights, and never scaled.

    Args:
      learning_rate: a number or a schedule.
      rank: r: an int, a fraction of the smaller side, or rules by path (`low_rank`); a
        quarter by default.
      refresh_every: T, steps between two bases; 200 by default, as released scripts
        have it.
      basis: the basis rule; `dominant_svd()` by default.
      step: another step than Adam, a stage such as `in_subspace(inner)`; b1, b2 and
        eps are then its own affair.
      scale: alpha, on the matrices' step alone.
      b1: decay rate of M.
      b2: decay rate of V.
      eps: added to sqrt(V); 1e-8, or 1e-6 for the published variant.
      weight_decay: decoupled, times the learning rate.
      mask: which leaves decay, as in `optax.add_decayed_weights`.
      dimension_numbers: which leaves are low-rank matrices (`low_rank`).
      square: the side of a square matrix that is projected (`low_rank`).
      precision: of the products with S (`low_rank`).
      variant: "paper" or "published".

    Raises:
      ValueError: as `low_rank` does, for an unknown variant, and for the published one
        with a step.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> params = {"mlp": {"kernel": jnp.ones((16, 64))}, "norm": jnp.ones(16)}
      >>> tx = lro.galore(0.01, rank=4, refresh_every=200, basis=lro.sara_sample(key=0))
      >>> updates, state = tx.update(params, tx.init(params), params)
    """
    arithmetic = arithmetic_of(variant)
    step = adam_or(step, b1, b2, eps, variant)
    rule = basis_or(basis, dominant_svd)
    return low_rank_optimizer(
        optax.chain(rule, project(), step, project_back(scale)),
        learning_rate,
        rank=rank,
        refresh_every=refresh_every,
        dimension_numbers=dimension_numbers,
        square=square,
        precision=precision,
        after=arithmetic.after(learning_rate, weight_decay, mask, b1, b2),
    )
