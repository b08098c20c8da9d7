"""Optimizers that also use the part of the gradient outside of the subspace."""

from __future__ import annotations

from typing import Unpack

import optax

from lowrank_optax.bases.folded import fold
from lowrank_optax.bases.grassmann import grassmann_track
from lowrank_optax.bases.iterate import orthogonal_iterate
from lowrank_optax.bases.singular import dominant_svd
from lowrank_optax.bases.switching import switch_basis, track_gram
from lowrank_optax.core.aliases import Key, Number
from lowrank_optax.optimizers.assemble import basis_or, low_rank_optimizer, one_of
from lowrank_optax.optimizers.grass import grass_jump
from lowrank_optax.optimizers.options import (
    FixedOptions,
    GaloreOptions,
    Options,
    passes_on,
)
from lowrank_optax.recovery.compensation import compensate_columns
from lowrank_optax.recovery.limiter import clip_step_growth
from lowrank_optax.recovery.normalized import normalized_spectral_residual
from lowrank_optax.recovery.projection import project
from lowrank_optax.recovery.published import scale_by_uncorrected_adam
from lowrank_optax.recovery.residual import sign_residual
from lowrank_optax.recovery.scaling import scale_by_shape
from lowrank_optax.recovery.unfold import scale_details, unfold_moments
from lowrank_optax.steps.full_momentum import scale_by_full_momentum
from lowrank_optax.steps.orthogonal import Polar, scale_by_polar_factor
from lowrank_optax.steps.rest import with_rest
from lowrank_optax.steps.rotation import rotate_moments
from lowrank_optax.steps.subspace import in_subspace

__all__ = ["alice", "cosmos", "foam", "gwt", "subtrack", "sumo"]

NEVER = 2**31 - 1


@passes_on(low_rank_optimizer)
def alice(
    learning_rate: optax.ScalarOrSchedule,
    *,
    key: Key | None = None,
    keep: float = 0.3125,
    basis: optax.GradientTransformation | None = None,
    scale: Number = 0.3,
    residual_scale: Number = 0.4,
    limit: Number = 1.01,
    b1: Number = 0.9,
    b2: Number = 0.9,
    b3: Number | None = 0.999,
    eps: Number = 1e-8,
    rest: optax.GradientTransformation | None = None,
    **options: Unpack[Options],
) -> optax.GradientTransformationExtraArgs:
    """Alice: leading directions and a draw of the others, the lost part normalized.

        W <- W - lr scale (S M / sqrt(V) + residual_scale C)

    A refresh keeps the leading directions of a power step in S and draws the others
    from its complement. C is what the projection lost, each column over its running
    norm (Gong et al. 2025, "Towards Efficient Optimizer Design for LLM via Structured
    Fisher Approximation with a Low-Rank Extension", Algorithm 4; `switch_basis`,
    `track_gram`, `compensate_columns`). State of a matrix: mr + 2nr + n + 1 numbers,
    and r^2 with tracking; two products a step. Published: rate 0.02 and the defaults;
    scale 0.25, residual_scale 0.2 at 1.3B.

    When to choose it: for a low loss, and a refresh without an SVD. Its paper reports
    its lowest losses where it trains the head too. When not: without tuning, or where
    microbatches are summed in the subspace, since it needs the full gradient.
    Deviations: eps is ours; as in the paper no moment is corrected for bias. Leaves of
    full rank take Adam's step with `learning_rate`, for which the paper names no value.

    Args:
      key: a seed or a typed key for the draws; required unless `basis` is passed.
      keep: how many directions stay, an int or a fraction of the rank.
      basis: another basis rule; only `switch_basis` follows what is tracked.
      scale: alpha, on the matrices' step.
      residual_scale: alpha_c, a further factor on the lost part.
      limit: the largest growth of the lost part's norm from step to step.
      b1: decay rate of M, and of the lost part's column norms.
      b3: decay rate of the mean of G~ G~^T; None for Alice-0, which tracks nothing.
      rest: the step for leaves of full rank; `optax.scale_by_adam()` by default.
      learning_rate, b2, eps: as in `galore`.
      **options: as in `low_rank_optimizer`.

    Raises:
      ValueError: neither or both of `key` and `basis`; and as `switch_basis` does.

    Example:
      >>> tx = lro.recipes.alice(0.005, rank=4, key=0)
    """
    rule = one_of(key, basis, lambda key: switch_basis(key, keep=keep))
    where = optax.chain(rule, project())
    if b3 is not None:
        where = track_gram(where, decay=b3)
    step = in_subspace(scale_by_uncorrected_adam(b1, b2, eps))
    back = compensate_columns(
        limit, scale=scale, residual_scale=residual_scale, decay=b1
    )
    stages = with_rest(optax.chain(where, step, back), rest)
    return low_rank_optimizer(stages, learning_rate, **options)


@passes_on(low_rank_optimizer, refresh_every=1)
def cosmos(
    learning_rate: optax.ScalarOrSchedule,
    *,
    basis: optax.GradientTransformation | None = None,
    scale: Number = 0.2,
    residual_scale: Number = 0.2,
    b1: Number = 0.9,
    b2: Number = 0.95,
    b3: Number = 0.95,
    eps: Number = 1e-8,
    rest: optax.GradientTransformation | None = None,
    **options: Unpack[Options],
) -> optax.GradientTransformationExtraArgs:
    """COSMOS: Adam in the leading eigenspace, Muon outside, both of a full momentum.

        S <- Q of (b3 S Q~ + (1 - b3) G G^T S),  Q~ <- b3 C Q~ C^T + (1 - b3) G~ G~^T
        M <- b1 M + (1 - b1) G,  V <- b2 V + (1 - b2) G~^2,  G~ = S^T G,  C = S^T S_old
        D = S (S^T M)^ / (sqrt(V^) + eps) + residual_scale norm(NS5(M - S S^T M))
        W <- W - lr scale norm(D),   norm(X) = sqrt(mn) X / ||X||_F

    (Liu et al. 2025, "COSMOS", arXiv 2502.17410, Algorithm 1; `orthogonal_iterate`,
    `track_gram`, `scale_by_full_momentum`, `normalized_spectral_residual`.) State of a
    matrix: mn + nr + mr + r^2 numbers; seven products with S a step, a QR of (m, r) and
    five Newton-Schulz steps of (m, n).

    When to choose it: as the reference for `spectral_adam`, which stores no momentum of
    mn numbers. No loss was measured here. When not: to save memory; where gradients
    stay zero for long, since the step keeps its size; where microbatches are summed in
    the subspace.

    Deviations: the paper projects the n columns of an (m, n) matrix; here the smaller
    side is projected. The paper's norm is sqrt(n) X / ||X||_F; this norm and the
    factor `scale` are of the released code, in which one number, 0.1, stands for
    `scale` and `residual_scale`. eps is added to the root, as there. S_0 are singular
    vectors. Leaves of full rank take Adam's step with `learning_rate`.

    Args:
      basis: another basis rule; only `orthogonal_iterate` and `switch_basis` follow Q~.
      scale: the root mean square entry of the matrices' step.
      residual_scale: gamma, on the part outside of the subspace.
      b3: decay rate of Q~.
      rest: the step for leaves of full rank; `optax.scale_by_adam()` by default.
      learning_rate, b1, b2, eps: as in `galore`.
      **options: as in `low_rank_optimizer`; the source refreshes at every step.

    Raises:
      ValueError: as `low_rank` does.

    Example:
      >>> tx = lro.recipes.cosmos(4.5e-3, rank=4)
    """
    rule = basis_or(basis, orthogonal_iterate)
    stages = optax.chain(
        track_gram(optax.chain(rule, project()), decay=b3, rotate=True),
        scale_by_full_momentum(b1, b2, eps),
        normalized_spectral_residual(residual_scale, scale=scale),
    )
    return low_rank_optimizer(with_rest(stages, rest), learning_rate, **options)


@passes_on(grass_jump, refresh_every=200)
def subtrack(
    learning_rate: optax.ScalarOrSchedule,
    *,
    step_size: Number | None = 10.0,
    limit: Number = 1.01,
    **options: Unpack[GaloreOptions],
) -> optax.GradientTransformationExtraArgs:
    """SubTrack++: a tracked subspace, rotated moments, the residual recovered.

    At a refresh S follows the gradient of the estimation error along a rank-one
    geodesic, and Adam's moments rotate with it. Every step adds the rescaled residual
    (SubTrack++, as the GrassWalk paper compares with it, sections 2 and 5;
    `grassmann_track`, `rotate_moments`, `recover_residual`). State of a matrix: mr +
    2nr + 1 numbers.

    When to choose it: where the gradient's subspace moves slowly and is worth following
    with a cheap refresh. When not: if the basis should explore. Use `grass_walk` then.

    Deviations: the released code tracks only matrices with fewer rows than columns,
    multiplies V by 1 - b2 at every interval, and M by S_t^T S_0. Here every matrix is
    tracked, and the moments rotate by eqs. 7 and 8 at the refresh. Bias correction, eps
    and the residual are the paper's (released: as `fira`'s published variant).

    Args:
      step_size: eta of `grassmann_track`; None chooses the angle by a line search.
      limit, scale: as in `grass_jump`.
      learning_rate, b1, b2, eps: as in `galore`.
      **options: as in `low_rank_optimizer`.

    Raises:
      ValueError: as `low_rank` does.

    Example:
      >>> tx = lro.recipes.subtrack(0.002, rank=4)
    """
    rule = grassmann_track(step_size)
    return grass_jump(learning_rate, basis=rule, limit=limit, **options)


@passes_on(low_rank_optimizer)
def sumo(
    learning_rate: optax.ScalarOrSchedule,
    *,
    basis: optax.GradientTransformation | None = None,
    method: Polar = "eigh",
    scale: Number = 1.0,
    residual_scale: Number = 1.0,
    limit: Number = 1.1,
    b1: Number = 0.95,
    rest: optax.GradientTransformation | None = None,
    **options: Unpack[Options],
) -> optax.GradientTransformationExtraArgs:
    """SUMO: momentum in the subspace, orthogonalized, and the rest of the gradient.

        M <- S_t^T S_{t-1} M   at a refresh
        M <- b1 M + S_t^T G_t,   O = (M M^T)^(-1/2) M, its norm limited
        W <- W - lr scale sqrt(max(m, n)) (S O + residual_scale (G - S S^T G))

    (Refael et al. 2025, "SUMO: Subspace-Aware Moment-Orthogonalization for Accelerating
    Memory-Efficient LLM Training", Algorithm 1, section 3.2.) State of a matrix: mr +
    nr + 1 numbers; two products with S a step, two r x r eigendecompositions.

    When to choose it: Muon's step at half of GaLore's moments, with small ranks. When
    not: at large ranks, because of the eigendecompositions at every step; where
    microbatches are summed in the subspace, since it needs the full gradient.

    Deviations: Algorithm 1 takes m >= n and projects the m rows; here the smaller side
    is projected. The paper has sqrt(max(m, n)) only in its text. It scales the whole
    step. No decay is named: 0.95 is Muon's. The source may draw bases from a randomized
    SVD, which is `basis=dominant_svd(decomposition="randomized", key=key)`.

    Args:
      basis: the basis rule, of orthonormal bases; `dominant_svd()` by default.
      method: of the polar factor, as in `scale_by_polar_factor`.
      scale: on the matrices' step, together with sqrt(max(m, n)).
      residual_scale: a further factor on the part outside of the subspace.
      limit: the largest growth of the step's norm from step to step; the paper's 1.1.
      b1: decay rate of M, mu in the paper.
      rest: the step for leaves of full rank; `optax.scale_by_adam()` by default.
      learning_rate: as in `galore`.
      **options: as in `low_rank_optimizer`.

    Raises:
      ValueError: an unknown method; a basis that is not orthonormal.

    Example:
      >>> tx = lro.recipes.sumo(0.001, rank=4)
    """
    stages = optax.chain(
        basis_or(basis, dominant_svd),
        project(),
        rotate_moments(optax.chain(optax.trace(b1), scale_by_polar_factor(method))),
        clip_step_growth(limit),
        sign_residual(residual_scale, step="sgd"),
        scale_by_shape(scale),
    )
    return low_rank_optimizer(with_rest(stages, rest), learning_rate, **options)


@passes_on(low_rank_optimizer)
def foam(
    learning_rate: optax.ScalarOrSchedule,
    *,
    scale: Number = 0.25,
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: Number = 1e-8,
    **options: Unpack[FixedOptions],
) -> optax.GradientTransformationExtraArgs:
    """FOAM: Adam with one pair of moments for each block of neighboring rows.

        M, V <- Adam's of the block means of G,   R = G - U mean(G)
        W <- W - lr scale (U M^ + R) / (sqrt(U V^ + R^2) + eps)

    with r blocks of rows, and U to repeat a block's row for each of its rows (Wen et
    al. 2025, "FOAM: Blocked State Folding for Memory-Efficient LLM Training"; `fold`,
    `unfold_moments`). State of a matrix: 2nr numbers, without a basis; no product and
    no refresh. The paper's level l is rank 2^-l, and its level 2 the default.

    When to choose it: a step with a residual, no product and nothing to factorize. On
    LLaMA-60M and 9.8 M tokens it ended at 4.496, and `galore` at 4.535, one run each
    (docs/results/losses_60m.md). When not: where neighboring rows have nothing in
    common, since no basis follows the gradient; where microbatches are summed in the
    subspace. Deviations: those of `fold` (the smaller side is folded) and of
    `unfold_moments` (bias, V).

    Args:
      scale: alpha, on the matrices' step.
      learning_rate, b1, b2, eps: as in `galore`.
      **options: as in `low_rank_optimizer`; the rank is the number of blocks.

    Raises:
      ValueError: as `low_rank` does.

    Example:
      >>> tx = lro.recipes.foam(2e-3, rank=4)
    """
    back = unfold_moments(b2, eps=eps, scale=scale)
    return _folded(back, learning_rate, b1, b2, eps, **options)


@passes_on(low_rank_optimizer)
def gwt(
    learning_rate: optax.ScalarOrSchedule,
    *,
    scale: Number = 0.25,
    limit: Number = 1.01,
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: Number = 1e-8,
    **options: Unpack[FixedOptions],
) -> optax.GradientTransformationExtraArgs:
    """GWT: Adam on Haar coefficients of the gradient, details over the same root.

        A = S^T G, the approximation;   M, V <- Adam's of A,   D = sqrt(V^) + eps
        W <- W - lr scale (S (M^ / D) + (G - S A) / U D)

    with S the low-pass part of the Haar wavelet, U to repeat a row for each row of its
    block, and the growth of ||M^ / D|| limited (Wen et al. 2025, "Breaking Memory
    Limits: Gradient Wavelet Transform Enhances LLMs Training", arXiv 2501.07237;
    `fold`, `scale_details`). State of a matrix: 2nr + 1 numbers, without a basis; no
    product and no refresh. The paper's level l is rank 2^-l, and its level 2 the
    default.

    When to choose it: as `foam`, with a step whose growth is limited. On LLaMA-60M
    and 9.8 M tokens it ended at 4.489, and `galore` at 4.535, one run each
    (docs/results/losses_60m.md). When not: with outliers in the
    residual. This step does not bound them, and that of `foam` does. Deviations: those
    of `fold` (the smaller side is transformed) and of `scale_details` (bias).

    Args:
      limit: zeta, the largest growth of the step's norm from step to step.
      scale: alpha, on the matrices' step.
      learning_rate, b1, b2, eps: as in `galore`.
      **options: as in `low_rank_optimizer`; the rank is the number of blocks.

    Raises:
      ValueError: as `low_rank` does.

    Example:
      >>> tx = lro.recipes.gwt(2e-3, rank=4)
    """
    back = scale_details(b2, eps=eps, limit=limit, scale=scale)
    return _folded(back, learning_rate, b1, b2, eps, **options)


def _folded(
    back: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    b1: Number,
    b2: Number,
    eps: Number,
    **options: Unpack[FixedOptions],
) -> optax.GradientTransformationExtraArgs:
    """Momentum of blocks of rows, this way back, and Adam for leaves of full rank."""
    stages = optax.chain(fold(), project(), in_subspace(optax.ema(b1)), back)
    stages = with_rest(stages, optax.scale_by_adam(b1, b2, eps))
    return low_rank_optimizer(stages, learning_rate, refresh_every=NEVER, **options)
