"""Optimizers with a step in full space, and moments that are stored at rank r."""

from __future__ import annotations

from typing import Unpack

import optax

from lowrank_optax.core.aliases import Key, Number
from lowrank_optax.full_rank.lora_pre import scale_by_lora_pre
from lowrank_optax.full_rank.mofasgd import scale_by_mofasgd
from lowrank_optax.full_rank.step import full_step
from lowrank_optax.optimizers.assemble import full_rank_optimizer, low_rank_optimizer
from lowrank_optax.optimizers.options import SubspaceOptions, passes_on
from lowrank_optax.recovery.scaling import scale_by_shape
from lowrank_optax.steps.factor import factor_moments
from lowrank_optax.steps.rest import with_rest

__all__ = ["lora_pre", "mlorc", "mofasgd"]


@passes_on(low_rank_optimizer)
def lora_pre(
    learning_rate: optax.ScalarOrSchedule,
    *,
    key: Key,
    scale: Number = 0.25,
    b1: Number = 0.9,
    b2: Number = 0.95,
    eps: Number = 1e-8,
    **options: Unpack[SubspaceOptions],
) -> optax.GradientTransformationExtraArgs:
    """LoRA-Pre: AdamW in full space, with moments that low-rank factors fit online.

        M = b1 B A + (1 - b1) G,    V = b2 (B_v A_v)^2 + (1 - b2) G^2
        W <- W - lr scale M^ / (sqrt(V^) + eps)

    B and A take a step of Newton's method on ||B A - G||_F^2, and B_v and A_v one on
    ||B_v A_v - |G| ||_F^2 (Wang et al. 2026, "Taming Momentum: Rethinking Optimizer
    States Through Low-Rank Approximation"; `scale_by_lora_pre`). State of a matrix: 2r
    (m + n) numbers; six products a step, four eigh of (r, r), in one call.

    When to choose it: Adam's step on the full gradient at small ranks, without a basis
    that is refreshed. On LLaMA-60M and 9.8 M tokens it ended at 4.885, and `galore` at
    4.535, one run each (docs/results/losses_60m.md). When not: at large ranks, because
    of the eigendecompositions; where microbatches are summed in a subspace, since it
    has none.

    Deviations: those of `scale_by_lora_pre`; no code is published. Scale 0.25 and b2 of
    0.95 are the source's.

    Args:
      key: a seed or a typed key for the first factors.
      scale: on the matrices' step.
      b1, b2, eps: Adam's, also of leaves of full rank.
      learning_rate: as in `galore`.
      **options: as in `low_rank_optimizer`; rank is that of the factors, precision of
        the products with them.

    Raises:
      ValueError: as `low_rank` does.

    Example:
      >>> tx = lro.recipes.lora_pre(0.001, rank=4, key=0)
    """
    step = scale_by_lora_pre(b1, b2, eps, scale=scale, key=key)
    stages = with_rest(step, optax.scale_by_adam(b1, b2, eps))
    return full_rank_optimizer(stages, learning_rate, **options)


@passes_on(low_rank_optimizer)
def mlorc(
    learning_rate: optax.ScalarOrSchedule,
    *,
    key: Key,
    scale: Number = 1.0,
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: Number = 1e-8,
    **options: Unpack[SubspaceOptions],
) -> optax.GradientTransformationExtraArgs:
    """MLorc: AdamW in full space, its moments compressed to rank r after each step.

        M, V <- Adam's of G and the products of their factors
        W <- W - lr scale M^ / (sqrt(V^) + eps)
        M ~ L R,  V ~ L_v R_v    by a randomized SVD of rank r

    with the mean of V's negative entries' magnitudes in their place when it is read
    (Shen et al. 2025, "MLorc: Momentum Low-rank Compression for Memory Efficient Large
    Language Model Adaptation", Algorithm 1; `factor_moments`). State of a matrix: 2r (m
    + n) numbers and two bytes; ten products a step, and two QRs for each moment.

    When to choose it: the source's use, fine-tuning at small ranks. No loss was
    measured here. When not: where time counts, because both moments are factorized at
    every step; where microbatches are summed in a subspace, since it has none.

    Deviations: those of `factor_moments`. Adam's moments are corrected for bias before
    eps is added; the released code corrects the step size.

    Args:
      key: a seed or a typed key for the sketches.
      scale: on the matrices' step; 1 in the source.
      b1, b2, eps: Adam's, also of leaves of full rank.
      learning_rate: as in `galore`.
      **options: as in `low_rank_optimizer`; rank is that of the factors, precision of
        the products with them.

    Raises:
      ValueError: as `low_rank` does.

    Example:
      >>> tx = lro.recipes.mlorc(0.002, rank=4, key=0)
    """
    rank, precision = options.get("rank", 0.25), options.get("precision")
    adam = optax.scale_by_adam(b1, b2, eps)
    factored = factor_moments(adam, rank, key=key, precision=precision)
    stages = with_rest(full_step(factored, scale=scale), adam)
    return full_rank_optimizer(stages, learning_rate, **options)


@passes_on(low_rank_optimizer)
def mofasgd(
    learning_rate: optax.ScalarOrSchedule,
    *,
    key: Key,
    scale: Number = 1.0,
    b1: Number = 0.95,
    rest: optax.GradientTransformation | None = None,
    **options: Unpack[SubspaceOptions],
) -> optax.GradientTransformationExtraArgs:
    """MoFaSGD: momentum that is an SVD of rank r at all times, and its polar factor.

        U diag(sigma) V^T <- its best approximation of rank r to
            b1 U diag(sigma) V^T + U U^T G + G V V^T - U U^T G V V^T
        W <- W - lr scale sqrt(max(m, n)) U V^T

    (Mahdavinia and Mahdavi 2025, "Low-rank Momentum Factorization for Memory Efficient
    Training", Algorithm 1; `scale_by_mofasgd`.) State of a matrix: r (m + n) + r
    numbers; three products a step, two QRs of 2r columns, one of (2r, r), an SVD of
    (2r, 2r) and two eigh of (r, r).

    When to choose it: Muon's step with r (m + n) + r numbers in place of Muon's mn. On
    LLaMA-60M and 9.8 M tokens it ended at 4.684, and `galore` at 4.535, one run each
    (docs/results/losses_60m.md). When not: at large ranks, because of the
    factorizations at every step; where gradients stay zero for long, as in an unused
    expert, since the step keeps its size; where microbatches are summed in a subspace.

    Deviations: those of `scale_by_mofasgd`. The source has the step U V^T alone, with a
    learning rate of its own; sqrt(max(m, n)) is SUMO's, so that one rate serves all.

    Args:
      key: a seed or a typed key for the first V.
      scale: on the matrices' step, together with sqrt(max(m, n)).
      b1: decay rate of the momentum, beta in the paper.
      rest: the step for leaves of full rank; `optax.scale_by_adam()` by default.
      learning_rate: as in `galore`.
      **options: as in `low_rank_optimizer`; rank is that of the factors, precision of
        the products with them.

    Raises:
      ValueError: as `low_rank` does.

    Example:
      >>> tx = lro.recipes.mofasgd(0.001, rank=4, key=0)
    """
    step = optax.chain(scale_by_mofasgd(b1, key=key), scale_by_shape(scale))
    stages = with_rest(step, rest)
    return full_rank_optimizer(stages, learning_rate, **options)
