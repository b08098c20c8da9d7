"""SUMO."""

import jax
import optax

from lowrank_optax.bases.singular import dominant_svd
from lowrank_optax.core.layout import (
    TRANSFORMER_MATRICES,
    DimensionNumbers,
    Rank,
    Square,
)
from lowrank_optax.core.typing import Mask
from lowrank_optax.optimizers.assemble import basis_or, low_rank_optimizer
from lowrank_optax.recovery.limiter import limit_step
from lowrank_optax.recovery.projection import project
from lowrank_optax.recovery.residual import sign_residual
from lowrank_optax.recovery.scaling import scale_by_shape
from lowrank_optax.steps.orthogonal import Polar, orthogonalize
from lowrank_optax.steps.rest import with_rest
from lowrank_optax.steps.rotation import rotate_moments


def sumo(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: Rank = 0.25,
    refresh_every: int = 200,
    basis: optax.GradientTransformation | None = None,
    method: Polar = "eigh",
    scale: float | jax.Array = 1.0,
    residual_scale: float | jax.Array = 1.0,
    limit: float | jax.Array = 1.1,
    b1: float | jax.Array = 0.95,
    rest: optax.GradientTransformation | None = None,
    weight_decay: float | jax.Array = 0.0,
    mask: Mask = None,
    dimension_numbers: DimensionNumbers = TRANSFORMER_MATRICES,
    square: Square = "input",
    precision: jax.lax.PrecisionLike = None,
) -> optax.GradientTransformationExtraArgs:
    """SUMO: momentum in the subspace, orthogonalised, and the rest of the gradient.

        M <- S_t^T S_{t-1} M   at a refresh
        M <- b1 M + S_t^T G_t,   O = (M M^T)^(-1/2) M, its norm limited
        W <- W - lr scale sqrt(max(m, n)) (S O + residual_scale (G - S S^T G))

    (Refael et al. 2025, "SUMO: Subspace-Aware Moment-Orthogonalization for Accelerating
    Memory-Efficient LLM Training", Algorithm 1 and section 3.2; equations in
    `orthogonalize`, `limit_step`, `scale_by_shape`.) State of a matrix: mr + nr + 1
    numbers; three products a step, and two r x r eigendecompositions.

    When to choose it: Muon's step at half of GaLore's moments, with small ranks. When
    not: at large ranks, whose eigendecompositions every step pays for
    (`method="newton_schulz"` does not, and is inexact where the moment is ill
    conditioned, as it is here); on micro-batches summed in the subspace, for it needs
    the gradient.

    What is ours where the paper leaves it open: Algorithm 1 takes m >= n and projects
    the m rows; here, as everywhere, the smaller side. The factor sqrt(max(m, n)) is in
    the text and not in Algorithm 1; it is on the whole step. No value of its decay is
    given: 0.95 is Muon's. The limiter, optional there, bites only while M's rank grows,
    for ||O|| is sqrt(r) otherwise. Its bases are of a randomized SVD or an SVD: here of
    an SVD, else `basis=dominant_svd(decomposition="randomized", key=key)`. Leaves of
    full rank take Adam's step: so embedding, norms and head do by default.

    Args:
      basis: the basis rule, of orthonormal bases; `dominant_svd()` by default.
      method: of the polar factor, "eigh", "svd" or "newton_schulz" (`orthogonalize`).
      scale: on the matrices' step, besides sqrt(max(m, n)).
      residual_scale: on the part of the gradient outside of the subspace besides.
      limit: the largest growth of the step's norm from step to step; the paper's 1.1.
      b1: decay rate of M, mu in the paper.
      rest: the step for leaves of full rank; `optax.scale_by_adam()` by default.
      learning_rate, rank, refresh_every, weight_decay, mask, dimension_numbers,
        square, precision: as in `galore`.

    Raises:
      ValueError: another method; a basis that is not orthonormal; and as `low_rank`
        does.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> params = {"mlp": {"kernel": jnp.ones((16, 64))}, "norm": jnp.ones(16)}
      >>> tx = lro.sumo(0.002, rank=4, refresh_every=200)
      >>> updates, state = tx.update(params, tx.init(params), params)
    """
    stages = optax.chain(
        basis_or(basis, dominant_svd),
        project(),
        rotate_moments(optax.chain(optax.trace(b1), orthogonalize(method))),
        limit_step(limit),
        sign_residual(residual_scale, step="sgd"),
        scale_by_shape(scale),
    )
    return low_rank_optimizer(
        with_rest(stages, rest),
        learning_rate,
        rank=rank,
        refresh_every=refresh_every,
        dimension_numbers=dimension_numbers,
        square=square,
        precision=precision,
        weight_decay=weight_decay,
        mask=mask,
    )
