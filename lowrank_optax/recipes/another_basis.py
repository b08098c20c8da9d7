"""GaLore with another basis."""

from __future__ import annotations

from typing import Unpack

import optax

from lowrank_optax.bases.dct import dct_columns
from lowrank_optax.bases.lazy import lazy_refresh
from lowrank_optax.bases.momentum import correlation_aware
from lowrank_optax.bases.pca import online_pca
from lowrank_optax.bases.random import random_after
from lowrank_optax.bases.rows import sample_rows
from lowrank_optax.bases.singular import dominant_svd
from lowrank_optax.bases.storage import quantize_basis
from lowrank_optax.core.aliases import Key, Number, Step
from lowrank_optax.optimizers.assemble import basis_or, low_rank_optimizer
from lowrank_optax.optimizers.galore import galore
from lowrank_optax.optimizers.options import (
    GaloreOptions,
    NeverRefreshedOptions,
    Options,
    ScaledOptions,
    passes_on,
)
from lowrank_optax.recovery.feedback import error_feedback
from lowrank_optax.recovery.projection import project, project_back
from lowrank_optax.steps.quantize import quantize_moments
from lowrank_optax.steps.rotation import rotate_moments
from lowrank_optax.steps.subspace import in_subspace, reset_moments

__all__ = [
    "coap",
    "dct_adamw",
    "galore_2",
    "golore",
    "grass_sparse",
    "online_subspace_descent",
    "q_galore",
]

NEVER = 2**31 - 1


@passes_on(galore, eps=1e-6, refresh_every=40)
def coap(
    learning_rate: optax.ScalarOrSchedule,
    *,
    recompute_every: int = 5,
    step_size: Number = 0.1,
    **options: Unpack[GaloreOptions],
) -> optax.GradientTransformationExtraArgs:
    """COAP: GaLore with a basis that gradient steps correct between sketches.

        S <- S - step_size grad_S [mean((S S^T G - G)^2) (1 - mean_i cos((S M)_i, G_i))]
        W <- W - lr scale S M^ / (sqrt(V^) + eps),    M, V Adam's of S^T G

    The first equation is a refresh, with the norm of grad_S clipped at 1. Every
    `recompute_every`-th refresh takes the left singular vectors of a sketch of G
    instead (Xiao et al. 2025, "COAP"; `correlation_aware`). Moments are not rotated,
    the released default. State of a matrix: mr + 2nr numbers.

    When to choose it: a cheap refresh without an SVD. When not: with very small
    gradients, such as those of a language model's mean loss. Their squares scale the
    basis's steps, so that only the recomputations move it. Deviation: Adam's moments
    are corrected for bias before eps is added; the released code corrects the step
    size.

    Args:
      recompute_every: refreshes from one recomputation to the next.
      step_size: of the basis' gradient step.
      learning_rate, scale, b1, b2, eps: as in `galore`.
      **options: as in `low_rank_optimizer`.

    Raises:
      ValueError: as `low_rank` does.

    Example:
      >>> tx = lro.recipes.coap(0.01, rank=4)
    """
    rule = correlation_aware(step_size, recompute_every=recompute_every)
    return galore(learning_rate, basis=rule, **options)


@passes_on(low_rank_optimizer, refresh_every=1)
def dct_adamw(
    learning_rate: optax.ScalarOrSchedule,
    *,
    feedback: bool = False,
    scale: Number = 1.0,
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: Number = 1e-8,
    **options: Unpack[Options],
) -> optax.GradientTransformationExtraArgs:
    """DCT-AdamW: Adam on the DCT's columns along which the gradient is longest.

    One product chooses r columns of the DCT matrix; Adam's moments stay with their
    columns (Modoranu et al. 2025, "FFT-based Dynamic Subspace Selection";
    `dct_columns`). State of a matrix: 2nr numbers and r integers, and mn with feedback;
    two products a step, and at a refresh one of (m, m) and (m, n).

    When to choose it: a basis that follows the gradient without a factorization, and is
    not stored. When not: where the top of the spectrum counts, which a fixed matrix
    only approximates. Deviations: this is the released code with `rotate_subspace`, on
    the smaller side of every matrix. That code was read, but not run for comparison. It
    can also store the feedback in 4 or 8 bits.

    Args:
      feedback: whether what the projection lost is added to the next gradient.
      scale: on the matrices' step; 1 in the source.
      learning_rate, b1, b2, eps: as in `galore`.
      **options: as in `low_rank_optimizer`; the source refreshes at every step.

    Raises:
      ValueError: as `low_rank` does.

    Example:
      >>> tx = lro.recipes.dct_adamw(0.001, rank=4)
    """
    where = optax.chain(dct_columns(), project())
    if feedback:
        # b1=0: M is not lost to the error, for the rotation drops whole rows of it.
        where = error_feedback(where, b1=0.0)
    step = rotate_moments(optax.scale_by_adam(b1, b2, eps))
    stages = optax.chain(where, step, project_back(scale))
    return low_rank_optimizer(stages, learning_rate, **options)


@passes_on(galore)
def galore_2(
    learning_rate: optax.ScalarOrSchedule, *, key: Key, **options: Unpack[GaloreOptions]
) -> optax.GradientTransformationExtraArgs:
    """GaLore 2: GaLore with bases of a randomized SVD.

    S_t are the r leading left singular vectors of G_t, from a random sketch (Su et al.
    2025, "GaLore 2: Large-Scale LLM Pre-Training by Gradient Low-Rank Projection",
    arXiv 2504.20437; `dominant_svd`). State of a matrix: mr + 2nr numbers.

    When to choose it: large matrices, whose SVD would dominate a refresh. When not: if
    the subspace must not freeze. Use `galore(basis=sara_sample(key))` then. Deviations:
    the sketch has eight more columns than the rank and two power steps. The paper's
    FSDP is not part of this: `state_shardings` and `training` are for any optimizer.

    Args:
      key: a seed or a typed key for the sketches.
      learning_rate, scale, b1, b2, eps: as in `galore`.
      **options: as in `low_rank_optimizer`.

    Raises:
      ValueError: as `low_rank` does.

    Example:
      >>> tx = lro.recipes.galore_2(0.01, rank=4, key=0)
    """
    rule = dominant_svd(decomposition="randomized", key=key)
    return galore(learning_rate, basis=rule, **options)


@passes_on(galore)
def golore(
    learning_rate: optax.ScalarOrSchedule,
    *,
    switch_step: Step,
    key: Key,
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: Number = 1e-8,
    **options: Unpack[ScaledOptions],
) -> optax.GradientTransformationExtraArgs:
    """GoLore: GaLore with a random subspace late in training.

    The basis is the gradient's leading singular vectors before `switch_step`, and
    uniformly random from there on. The first moment rotates with it, M <- S_t^T S_{t-1}
    M; the second does not (He et al. 2025, "Subspace Optimization for Large Language
    Models with Convergence Guarantees"; `random_after`). State of a matrix: mr + 2nr
    numbers.

    When to choose it: where GaLore stalls late because noise fills its subspace. When
    not: for the whole run, since a random subspace alone misses most of the gradient.
    Use `grass_jump` for that. Deviations: the released code rotates M for one step and
    forgets it; here it is stored, as in the paper. Scale 0.25 is GaLore's; the released
    script takes 1.

    Args:
      switch_step: the first step of random bases; 0.5 to 0.8 of the run there.
      key: a seed or a typed key for the random bases.
      learning_rate, b1, b2, eps, scale: as in `galore`.
      **options: as in `low_rank_optimizer`.

    Raises:
      ValueError: as `low_rank` does.

    Example:
      >>> tx = lro.recipes.golore(0.01, rank=4, switch_step=8000, key=0)
    """
    step = rotate_moments(optax.scale_by_adam(b1, b2, eps), moments="first")
    rule = random_after(switch_step, key)
    return galore(learning_rate, basis=rule, step=step, **options)


@passes_on(galore)
def grass_sparse(
    learning_rate: optax.ScalarOrSchedule,
    *,
    key: Key,
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: Number = 1e-8,
    **options: Unpack[ScaledOptions],
) -> optax.GradientTransformationExtraArgs:
    """Grass: Adam on r sampled rows of the gradient.

    A refresh draws r rows by their norm, without replacement, and restarts Adam on
    them; a step moves these rows alone (Muhamed et al. 2024, "Grass: Compute Efficient
    Low-Memory LLM Training with Structured Sparse Gradients"; `sample_rows`). State of
    a matrix: 2nr numbers, r integers, a count; no product.

    When to choose it: a fast step, where most rows may wait. At LLaMA-350M its step
    took 0.98 of the time of AdamW's (docs/results/step_time.md). When not: for progress
    per token. On LLaMA-60M it ended at 4.048, and `galore` at 3.932, one run each
    (docs/results/losses_60m.md). Deviations: the source projects to save gradient
    memory as well; here the full gradient comes in. Rows lie along the smaller side. No
    code is published; scale 0.25 is GaLore's.

    Args:
      key: a seed or a typed key for the samples.
      learning_rate, b1, b2, eps, scale: as in `galore`.
      **options: as in `low_rank_optimizer`.

    Raises:
      ValueError: as `low_rank` does.

    Example:
      >>> tx = lro.recipes.grass_sparse(0.01, rank=4, key=0)
    """
    step = reset_moments(optax.scale_by_adam(b1, b2, eps))
    return galore(learning_rate, basis=sample_rows(key), step=step, **options)


@passes_on(galore, eps=1e-8)
def online_subspace_descent(
    learning_rate: optax.ScalarOrSchedule,
    *,
    optimizer_of_basis: optax.GradientTransformation | None = None,
    penalty: Number = 0.0,
    **options: Unpack[NeverRefreshedOptions],
) -> optax.GradientTransformationExtraArgs:
    """Online subspace descent: GaLore with a basis trained by online PCA.

    At every step the basis P takes one step of its own optimizer on the reconstruction
    loss ||P P^T G^ - G^||_F^2 (Liang et al. 2024, "Memory-Efficient LLM Training with
    Online Subspace Descent"; `online_pca`, whose state reports loss and drift). State
    of a matrix: 3mr + 2nr + 2 numbers: P with Adam's moments, loss and drift; four
    products a step.

    When to choose it: where no factorization after the first step can be afforded. When
    not: for stability (the SARA paper, Table 3, finds it unstable and below GoLore); P
    drifts from orthonormal without a penalty.

    Args:
      optimizer_of_basis: any optax optimizer for P, learning rate and sign included;
        by default `optax.adamw(1 / 200, weight_decay=0.01)`.
      penalty: lambda on ||P^T P - I||_F^2; 0 in the released code.
      learning_rate, scale, b1, b2, eps: as in `galore`.
      **options: as in `low_rank_optimizer`.

    Raises:
      ValueError: as `low_rank` does.

    Example:
      >>> tx = lro.recipes.online_subspace_descent(0.01, rank=4)
    """
    rule = online_pca(optimizer_of_basis, penalty=penalty)
    return galore(learning_rate, basis=rule, refresh_every=NEVER, **options)


@passes_on(galore)
def q_galore(
    learning_rate: optax.ScalarOrSchedule,
    *,
    basis: optax.GradientTransformation | None = None,
    bits: int = 4,
    threshold: Number = 0.4,
    min_size: int = 4096,
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: Number = 1e-8,
    **options: Unpack[ScaledOptions],
) -> optax.GradientTransformationExtraArgs:
    """Q-GaLore: 4-bit bases, 8-bit moments, fewer refreshes where a basis stands still.

        S <- Q_bits(U[:, :r]),  G = U diag(s) V^T,    at a refresh that is not skipped
        M, V <- Q_8(Adam's of S^T G),    W <- W - lr scale S M^ / (sqrt(V^) + eps)

    with Q_b to b-bit codes; each leaf's refresh interval doubles while its bases stay
    similar, cos(S_t S_t^T, S_{t-1} S_{t-1}^T) >= threshold in the mean (Zhang et al.
    2024, "Q-GaLore"; `quantize_basis`, `quantize_moments`, `lazy_refresh`). State of a
    matrix: bits mr / 8 + 2nr bytes, and scales.

    When to choose it: GaLore at a quarter of its memory. When not: where the subspace
    must not freeze. A lazy refresh makes it freeze sooner. Deviation: the source also
    stores weights in 8 bits with stochastic rounding; `weights.store` and
    `weights.add_updates` do that for any optimizer.

    Args:
      basis: a basis rule to store in few bits; `dominant_svd()` by default.
      bits: 4 or 8.
      threshold: the mean similarity from which on a leaf's interval doubles.
      min_size: moments with fewer numbers are not quantized.
      learning_rate, b1, b2, eps, scale: as in `galore`.
      **options: as in `low_rank_optimizer`.

    Raises:
      ValueError: bits other than 4 and 8; and as `low_rank` does.

    Example:
      >>> tx = lro.recipes.q_galore(0.005, rank=4)
    """
    rule = quantize_basis(basis_or(basis, dominant_svd), bits=bits)
    rule = lazy_refresh(rule, threshold=threshold)
    adam = optax.scale_by_adam(b1, b2, eps)
    step = in_subspace(quantize_moments(adam, min_size=min_size))
    return galore(learning_rate, basis=rule, step=step, **options)
