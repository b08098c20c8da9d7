"""Optimizers without a subspace."""

from __future__ import annotations

from typing import Unpack

import optax

from lowrank_optax.core.aliases import Number
from lowrank_optax.core.rules import Rules, Square
from lowrank_optax.full_rank.normalize import normalize_by_output_rms, trace_matching
from lowrank_optax.full_rank.row_column import scale_by_racs
from lowrank_optax.full_rank.sinkhorn import normalize_by_sinkhorn
from lowrank_optax.full_rank.stabilize import stabilize_gradient
from lowrank_optax.optimizers.assemble import full_rank_optimizer
from lowrank_optax.optimizers.options import FullRankOptions, passes_on
from lowrank_optax.recovery.projection import project, project_back
from lowrank_optax.steps.rest import with_rest
from lowrank_optax.steps.restart import restart_every
from lowrank_optax.steps.subspace import in_subspace

__all__ = ["racs", "scale_sgd", "sink_gd", "stable_spam"]

HEAD = r"(?i)(^|/)(lm_)?(head|logits)(_dense)?(/(kernel|weight|w))?$"

# Embedding and head are matrices too.
WEIGHT_MATRICES: Rules = (
    (HEAD, "matrix"),
    (r"(?i)(^|/)(\w+_)?embed(ding|dings|der|s)?(_?\d+|_\w+)?(/|$)", "matrix"),
    (r"(?i)(^|/)w[tp]e(/|$)", "matrix"),
    ("", "auto"),
)


@passes_on(full_rank_optimizer)
def racs(
    learning_rate: optax.ScalarOrSchedule,
    *,
    iterations: int = 5,
    scale: Number = 0.05,
    limit: Number = 1.01,
    b2: Number = 0.9,
    rest: optax.GradientTransformation | None = None,
    square: Square = "input",
    **options: Unpack[FullRankOptions],
) -> optax.GradientTransformationExtraArgs:
    """RACS: the gradient with its rows and its columns scaled, and no momentum.

        W <- W - lr scale diag(q)^(-1/2) G diag(s)^(-1/2)

    Its norm may grow by at most a factor of `limit` per step. q and s are running means
    of a rank-one fit of the squared gradient (Gong et al. 2025, "Structured Fisher
    Approximation", Algorithm 1; `scale_by_racs`). State of a matrix: m + n + 1 numbers;
    ten sums over the gradient a step, and no product. Published: learning_rate=0.02 and
    the defaults; scale=0.02 at 1.3B.

    When to choose it: as a baseline with next to no state. When not: where microbatches
    are summed in a subspace, since it has none; with small batches, whose noise no
    momentum averages. Deviations: leaves of full rank take Adam's step, as the last
    layer does in the paper: by default embedding, norms and head.

    Args:
      iterations: of the fit.
      scale: alpha, on the matrices' step.
      limit: the step's largest growth from step to step.
      b2: decay rate of q and s, beta in the paper.
      rest: the step for leaves of full rank; `optax.scale_by_adam()` by default.
      square: which side of a square matrix the fit begins with, "input" or "output".
      learning_rate: as in `galore`.
      **options: as in `low_rank_optimizer`.

    Raises:
      ValueError: iterations below 1; and as `full_matrices` does.

    Example:
      >>> tx = lro.recipes.racs(0.02)
    """
    stage = scale_by_racs(limit, scale=scale, decay=b2, iterations=iterations)
    stages = with_rest(stage, rest)
    return full_rank_optimizer(stages, learning_rate, square=square, **options)


@passes_on(full_rank_optimizer, dimension_numbers=WEIGHT_MATRICES)
def scale_sgd(
    learning_rate: optax.ScalarOrSchedule,
    *,
    momentum: str = HEAD,
    b1: Number = 0.9,
    rest: optax.GradientTransformation | None = None,
    **options: Unpack[FullRankOptions],
) -> optax.GradientTransformationExtraArgs:
    """SCALE: SGD with each output's gradient normalized, and momentum on the head.

        W <- W - lr C(G),   C(G)_ij = G_ij / sqrt(mean_i G_ij^2)

    i over the inputs of output j; the head takes C(M), M <- b1 M + (1 - b1) G (Glentis
    et al. 2025, "A Minimalist Optimizer Design for LLM Pretraining";
    `normalize_by_output_rms`, `trace_matching`). State of a matrix: none; of the head
    mn numbers. No product.

    When to choose it: as the baseline with the smallest state (docs/results/memory.md).
    When not: for a low loss. On LLaMA-60M it ended at 4.412, and `galore` at 3.932, one
    run each (docs/results/losses_60m.md). Nor with small batches, whose noise no
    momentum averages.

    Deviations: the paper divides by the norm. This code and the released one, whose
    learning rate is 1e-3, divide by the root mean square. The released code divides by
    at least 1e-8. This code has no such floor, and leaves an output with a zero
    gradient unmoved. As there, embedding and head are matrices, and norms and biases
    take Adam's step.

    Args:
      momentum: a regular expression: the paths of matrices with momentum; by default an
        output head. Without a match, as with tied embeddings, none has.
      b1: decay rate of that momentum.
      rest: the step for leaves of full rank; `optax.scale_by_adam()` by default.
      learning_rate: as in `galore`.
      **options: as in `low_rank_optimizer`; by default embedding and head are matrices
        too.

    Raises:
      ValueError: a `momentum` that is not a regular expression; and as `full_matrices`
        does.

    Example:
      >>> tx = lro.recipes.scale_sgd(5e-4)
    """
    stages = optax.chain(trace_matching(momentum, b1), normalize_by_output_rms())
    return full_rank_optimizer(with_rest(stages, rest), learning_rate, **options)


@passes_on(full_rank_optimizer)
def sink_gd(
    learning_rate: optax.ScalarOrSchedule,
    *,
    iterations: int = 5,
    scale: Number = 0.05,
    rest: optax.GradientTransformation | None = None,
    **options: Unpack[FullRankOptions],
) -> optax.GradientTransformationExtraArgs:
    """SinkGD: SGD with the gradient's rows and columns normalized in turn.

        X = G;   X <- sqrt(n) X / row norms,   X <- sqrt(m) X / column norms,   L times
        W <- W - lr scale X

    (Scetbon et al. 2025, "Gradient Multi-Normalization for Stateless and Scalable LLM
    Training", arXiv 2502.06742, Algorithms 3 and 4; `normalize_by_sinkhorn`.) State of
    a matrix: none; 2 L sums over the gradient a step, and no product.

    When to choose it: as `racs`, without its means; the step does not depend on earlier
    gradients. On LLaMA-60M and 9.8 M tokens it ended at 4.593, and `galore` at 4.535,
    one run each (docs/results/losses_60m.md). When not: with small batches, whose noise
    no momentum averages. Deviations: none that are known; no code is published. The
    defaults, L and scale, are those of public implementations of the paper. As there,
    leaves of full rank take Adam's step: by default embedding, norms and head.

    Args:
      iterations: L, of both normalizations.
      scale: alpha, on the matrices' step.
      rest: the step for leaves of full rank; `optax.scale_by_adam()` by default.
      learning_rate: as in `galore`.
      **options: as in `low_rank_optimizer`.

    Raises:
      ValueError: iterations below 1; and as `full_matrices` does.

    Example:
      >>> tx = lro.recipes.sink_gd(0.01)
    """
    stages = with_rest(normalize_by_sinkhorn(iterations, scale=scale), rest)
    return full_rank_optimizer(stages, learning_rate, **options)


@passes_on(full_rank_optimizer)
def stable_spam(
    learning_rate: optax.ScalarOrSchedule,
    *,
    restart: int = 500,
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: Number = 1e-8,
    **options: Unpack[FullRankOptions],
) -> optax.GradientTransformationExtraArgs:
    """Stable-SPAM: Adam on gradients without spikes, restarted every so many steps.

        G' = G with spikes clipped, rescaled to a steady norm    (`stabilize_gradient`)
        M, V <- Adam's of G', zero after each `restart` steps    (`restart_every`)
        W <- W - lr M^ / (sqrt(V^) + eps)

    (Huang et al. 2025, "Stable-SPAM: How to Train in 4-Bit More Stably than 16-Bit
    Adam", arXiv 2502.17055.) State of a matrix: 2mn + 4 numbers. No product.

    When to choose it: as a baseline of full rank, and where Adam's loss spikes. When
    not: to save memory. `optax.chain(lro.full_rank.stabilize_gradient(),
    lro.galore(...))` has the same gradients and GaLore's memory. Deviations: those of
    `stabilize_gradient`. The released code resets at steps 1000, 2000, ... and can
    decay b1 over the run; here b1 is constant, and 500 steps lie between restarts.

    Args:
      restart: steps from one restart of Adam's moments to the next.
      learning_rate, b1, b2, eps: as in `galore`.
      **options: as in `low_rank_optimizer`.

    Raises:
      ValueError: restart below 1; and as `full_matrices` does.

    Example:
      >>> tx = lro.recipes.stable_spam(1e-3)
    """
    adam = restart_every(optax.scale_by_adam(b1, b2, eps), restart)
    stages = optax.chain(
        stabilize_gradient(),
        project(),
        in_subspace(adam),
        project_back(),
    )
    return full_rank_optimizer(stages, learning_rate, **options)
