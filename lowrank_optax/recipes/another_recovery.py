"""Optimizers that also use the part of the gradient outside of the subspace."""

from __future__ import annotations

from typing import Unpack

import optax

from lowrank_optax.bases.grassmann import grassmann_track
from lowrank_optax.bases.singular import dominant_svd
from lowrank_optax.bases.switching import switch_basis, track_gram
from lowrank_optax.core.aliases import Key, Number
from lowrank_optax.optimizers.assemble import basis_or, low_rank_optimizer, one_of
from lowrank_optax.optimizers.grass import grass_jump
from lowrank_optax.optimizers.options import GaloreOptions, Options, passes_on
from lowrank_optax.recovery.compensation import compensate_columns
from lowrank_optax.recovery.limiter import clip_step_growth
from lowrank_optax.recovery.projection import project
from lowrank_optax.recovery.published import scale_by_uncorrected_adam
from lowrank_optax.recovery.residual import sign_residual
from lowrank_optax.recovery.scaling import scale_by_shape
from lowrank_optax.steps.orthogonal import Polar, scale_by_polar_factor
from lowrank_optax.steps.rest import with_rest
from lowrank_optax.steps.rotation import rotate_moments
from lowrank_optax.steps.subspace import in_subspace

__all__ = ["alice", "subtrack", "sumo"]


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
