"""GaLore with another step than Adam."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

import optax

from lowrank_optax.bases.random import gaussian
from lowrank_optax.bases.singular import sara_sample
from lowrank_optax.core.aliases import Key, Number
from lowrank_optax.optimizers.assemble import low_rank_optimizer, one_of
from lowrank_optax.optimizers.galore import galore
from lowrank_optax.optimizers.options import Options, ScaledOptions, passes_on
from lowrank_optax.recovery.projection import project, project_back
from lowrank_optax.steps.adafactor import scale_by_adafactor
from lowrank_optax.steps.adam_mini import (
    adam_mini_blocks,
    check_heads,
    scale_by_adam_mini,
)
from lowrank_optax.steps.quantize import quantize_moments
from lowrank_optax.steps.rotation import rotate_moments
from lowrank_optax.steps.subspace import in_full_space, in_subspace, per_matrix

__all__ = ["flora", "galore_adafactor", "galore_adam8bit", "galore_adam_mini", "msgd"]


@passes_on(low_rank_optimizer)
def flora(
    learning_rate: optax.ScalarOrSchedule,
    *,
    key: Key,
    b1: Number = 0.9,
    scale: Number = 1.0,
    **options: Unpack[Options],
) -> optax.GradientTransformationExtraArgs:
    """FLora: momentum compressed by a random projection that is redrawn at refreshes.

        U = G / sqrt(V),  V Adafactor's factored second moment of G, in full space
        M <- S_t^T S_{t-1} M   at a refresh,    M <- b1 M + (1 - b1) S_t^T U
        W <- W - lr scale S_t M,               S_t Gaussian, from its key

    (Hao et al. 2024, "FLora: Low-Rank Adapters Are Secretly Gradient Compressors",
    section 2.4, with Adafactor as in its experiments.) State of a matrix: nr + m + n
    numbers.

    When to choose it: a first moment at Adafactor's memory. When not: with a small rank
    and a large rate, since ||S S^T|| is about m / r. Deviation: the released optax code
    projects the transferred momentum with the old key both ways; here it enters the new
    projection, as the paper writes.

    Args:
      key: a seed or a typed key for the projections.
      b1: decay rate of M.
      scale: on the matrices' step; 1 in the source.
      learning_rate: as in `galore`.
      **options: as in `low_rank_optimizer`.

    Raises:
      ValueError: as `low_rank` does.

    Example:
      >>> tx = lro.recipes.flora(0.002, rank=4, refresh_every=1000, key=0)
    """
    # Any matrix is factored, as in the paper; optax leaves small ones out by default.
    second = optax.scale_by_factored_rms(min_dim_size_to_factor=1)
    before = in_full_space(per_matrix(second))
    step = rotate_moments(optax.ema(b1, debias=False))
    stages = optax.chain(before, gaussian(key), project(), step, project_back(scale))
    return low_rank_optimizer(stages, learning_rate, **options)


@passes_on(galore)
def galore_adafactor(
    learning_rate: optax.ScalarOrSchedule,
    *,
    basis: optax.GradientTransformation | None = None,
    b1: Number | None = 0.9,
    decay_rate: Number = 0.8,
    clip: Number = 1.0,
    **options: Unpack[ScaledOptions],
) -> optax.GradientTransformationExtraArgs:
    """GaLore-Adafactor: Adafactor on the gradient's projection.

    `galore` with `scale_by_adafactor` in the subspace, one matrix at a time (Zhao et
    al. 2024, "GaLore"; SARA paper, section 4, with b1 = 0.9). State of a matrix: mr + n
    + r numbers, and nr with b1.

    When to choose it: half of Adam's moments, or with b1 = None next to none, at full
    precision; better than GaLore-Adam in the SARA paper's Table 1. When not: on work
    like that of docs/results/losses_60m.md, where Adam's two moments were a little
    better. Deviations: with b1 = None this is galore-torch 1.0's GaLoreAdafactor step
    for step. With b1 the released code averages after the learning rate, and this code
    before it.

    Args:
      b1: decay rate of M; None for no momentum.
      decay_rate: of the second moment's schedule, 1 - t^-decay_rate.
      clip: the largest root mean square of a matrix's low-rank step.
      learning_rate, basis, scale: as in `galore`.
      **options: as in `low_rank_optimizer`.

    Raises:
      ValueError: as `low_rank` does.

    Example:
      >>> tx = lro.recipes.galore_adafactor(0.01, rank=4)
    """
    adafactor = scale_by_adafactor(b1, decay_rate=decay_rate, clip=clip)
    step = in_subspace(per_matrix(adafactor))
    return galore(learning_rate, basis=basis, step=step, **options)


@passes_on(galore)
def galore_adam8bit(
    learning_rate: optax.ScalarOrSchedule,
    *,
    basis: optax.GradientTransformation | None = None,
    block_size: int = 256,
    min_size: int = 4096,
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: Number = 1e-8,
    **options: Unpack[ScaledOptions],
) -> optax.GradientTransformationExtraArgs:
    """GaLore-Adam 8-bit: the projection's moments stored in one byte each.

        M, V <- Q(Adam's of G~ and D(M), D(V)),  G~ = S^T G
        W <- W - lr scale S M^ / (sqrt(V^) + eps)

    with Q to 8-bit codes, block by block, and D back (`quantize_moments`), also for
    leaves of full rank (Dettmers et al. 2022, "8-bit Optimizers via Block-wise
    Quantization"; SARA paper, section 4). State of a matrix: 4mr + 2nr (1 + 4 / b)
    bytes, in blocks of b = block_size / 2 to block_size numbers.

    When to choose it: to save most of the memory that the moments still take, at little
    cost. When not: while you compare methods, since it rounds. Deviation: the released
    code rounds the low-rank update to the weight's dtype, and stores moments by
    bitsandbytes' kernels.

    Args:
      block_size: numbers that share a scale.
      min_size: arrays with fewer numbers are not quantized.
      learning_rate, basis, b1, b2, eps, scale: as in `galore`.
      **options: as in `low_rank_optimizer`.

    Raises:
      ValueError: as `low_rank` does.

    Example:
      >>> tx = lro.recipes.galore_adam8bit(0.01, rank=4)
    """
    adam = quantize_moments(
        optax.scale_by_adam(b1, b2, eps), block_size=block_size, min_size=min_size
    )
    return galore(learning_rate, basis=basis, step=in_subspace(adam), **options)


@passes_on(galore)
def galore_adam_mini(
    learning_rate: optax.ScalarOrSchedule,
    *,
    basis: optax.GradientTransformation | None = None,
    heads: Sequence[tuple[str, int]] = (),
    b1: Number = 0.9,
    b2: Number = 0.95,
    eps: Number = 1e-8,
    **options: Unpack[ScaledOptions],
) -> optax.GradientTransformationExtraArgs:
    """GaLore-Adam-mini: Adam with one second moment per block of the projection.

    `galore` with `scale_by_adam_mini` in the subspace (Zhang et al. 2024, "Adam-mini";
    SARA paper, section 4, with b2 = 0.95). A projected matrix (r, n) has one second
    moment for each of its n columns, or for each head that `heads` names. State of a
    matrix: mr + nr + n numbers.

    When to choose it: to save nearly half of Adam's state in the subspace. When not:
    where the loss must not rise (in the SARA paper's Table 1 it is behind GaLore-Adam).
    Deviations: none that are known; no code is published, and the SARA paper does not
    name the blocks.

    Args:
      heads: pairs (regular expression, size of a head) for query and key projections
        whose output axis is the larger side.
      learning_rate, basis, b1, b2, eps, scale: as in `galore`.
      **options: as in `low_rank_optimizer`.

    Raises:
      ValueError: heads that are projected away or do not fit; and as `low_rank` does.

    Example:
      >>> tx = lro.recipes.galore_adam_mini(0.005, rank=4)
    """
    adam_mini = scale_by_adam_mini(b1, b2, eps, blocks=adam_mini_blocks(heads))
    step = optax.chain(check_heads(heads), in_subspace(adam_mini))
    return galore(learning_rate, basis=basis, step=step, **options)


@passes_on(galore, scale=1.0)
def msgd(
    learning_rate: optax.ScalarOrSchedule,
    *,
    key: Key | None = None,
    basis: optax.GradientTransformation | None = None,
    b1: Number = 0.9,
    **options: Unpack[ScaledOptions],
) -> optax.GradientTransformationExtraArgs:
    """MSGD-SARA: momentum SGD in a sampled subspace, with momentum re-projection.

        M <- S_t^T S_{t-1} M   at a refresh
        M <- b1 M + (1 - b1) S_t^T G_t,    W <- W - lr scale S_t M

    (SARA paper, section 3.3: the method of Theorem 3.4, which converges at O(1 / T + 1
    / sqrt(T)); its beta_1 is 1 - b1 here.) State of a matrix: mr + nr numbers. When to
    choose it: to study convergence, and where SGD trains. When not: for transformers,
    which need Adam's second moment. Use `galore(basis=sara_sample(key))` there.

    Args:
      key: a seed or a typed key for SARA's samples; required unless `basis` is passed.
      basis: another basis rule in place of `sara_sample(key)`.
      b1: decay rate of M.
      learning_rate, scale: as in `galore`.
      **options: as in `low_rank_optimizer`.

    Raises:
      ValueError: neither or both of `key` and `basis`; and as `low_rank` does.

    Example:
      >>> tx = lro.recipes.msgd(0.1, rank=4, key=0)
    """
    rule = one_of(key, basis, sara_sample)
    step = rotate_moments(optax.ema(b1, debias=False))
    return galore(learning_rate, basis=rule, step=step, **options)
