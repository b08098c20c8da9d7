"""Alice, and without tracking Alice-0."""

import jax
import optax

from lowrank_optax.bases.switching import switch_basis, track_gram
from lowrank_optax.core.layout import (
    TRANSFORMER_MATRICES,
    DimensionNumbers,
    Rank,
    Square,
)
from lowrank_optax.core.typing import Mask
from lowrank_optax.optimizers.assemble import low_rank_optimizer, one_of
from lowrank_optax.recovery.compensation import compensate_columns
from lowrank_optax.recovery.projection import project
from lowrank_optax.recovery.published import scale_by_uncorrected_adam
from lowrank_optax.steps.rest import with_rest
from lowrank_optax.steps.subspace import in_subspace


def alice(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: Rank = 0.25,
    refresh_every: int = 200,
    key: jax.Array | int | None = None,
    keep: float = 0.3125,
    basis: optax.GradientTransformation | None = None,
    scale: float | jax.Array = 0.3,
    residual_scale: float | jax.Array = 0.4,
    limit: float | jax.Array = 1.01,
    b1: float | jax.Array = 0.9,
    b2: float | jax.Array = 0.9,
    b3: float | jax.Array | None = 0.999,
    eps: float | jax.Array = 1e-8,
    rest: optax.GradientTransformation | None = None,
    weight_decay: float | jax.Array = 0.0,
    mask: Mask = None,
    dimension_numbers: DimensionNumbers = TRANSFORMER_MATRICES,
    square: Square = "input",
    precision: jax.lax.PrecisionLike = None,
) -> optax.GradientTransformationExtraArgs:
    """Alice: leading directions and a draw of the others, the lost part normalised.

    W <- W - lr scale (S M / sqrt(V) + residual_scale C): at a refresh S keeps the
    leading directions of a power step and draws the others from its complement; Adam's
    moments are left as they are; and C is what the projection lost, each column over
    its running norm (Gong et al. 2025, "Towards Efficient Optimizer Design for LLM via
    Structured Fisher Approximation with a Low-Rank Extension", Algorithm 4; equations
    in `switch_basis`, `track_gram` and `compensate_columns`). `b3=None` is Alice-0,
    whose basis follows the gradient of the refresh alone. State of a matrix: mr + 2nr +
    n + 1 numbers, and r^2 with tracking; two products a step.

    When to choose it: where the head is trained so too, for the lowest losses that its
    paper reports of low-rank methods, most of it by the compensation (its Table 5); a
    refresh without an SVD. When not: where micro-batches are summed in the subspace,
    for it needs the gradient; without tuning, for it has the most numbers of all.

    As in the paper M and V are not corrected for bias, and no weight is decayed; eps is
    ours, which has none. Leaves of full rank take Adam's step (0.9, 0.999, corrected),
    as they do in its experiments; the paper does not say with which learning rate, and
    here it is `learning_rate`. So embedding, norms and head do by default.

    Published, 60M to 350M: learning_rate=0.02, refresh_every=200, and the defaults;
    1.3B: scale=0.25, residual_scale=0.2.

    Args:
      key: a seed or a typed key for the draws; required unless `basis` is given.
      keep: how many directions stay, an int or a fraction of the rank (`switch_basis`).
      basis: another basis rule in place of the switch; only `switch_basis` follows what
        is tracked.
      scale: alpha, on the matrices' step.
      residual_scale: alpha_c, on the lost part besides.
      limit: the largest growth of the lost part's norm from step to step.
      b1: decay rate of M, and of the lost part's column norms.
      b3: decay rate of the running mean of G~ G~^T; None for none.
      rest: the step for leaves of full rank; `optax.scale_by_adam()` by default.
      learning_rate, rank, refresh_every, b2, eps, weight_decay, mask,
        dimension_numbers, square, precision: as in `galore`.

    Raises:
      ValueError: neither or both of `key` and `basis`; another `keep` than
        `switch_basis` takes; and as `low_rank` does.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> params = {"mlp": {"kernel": jnp.ones((16, 64))}, "norm": jnp.ones(16)}
      >>> tx = lro.alice(0.02, rank=4, refresh_every=200, key=0)
      >>> updates, state = tx.update(params, tx.init(params), params)
    """
    rule = one_of(key, basis, lambda key: switch_basis(key, keep=keep))
    where = optax.chain(rule, project())
    if b3 is not None:
        where = track_gram(where, decay=b3)
    step = in_subspace(scale_by_uncorrected_adam(b1, b2, eps))
    back = compensate_columns(
        limit, scale=scale, residual_scale=residual_scale, decay=b1
    )
    return low_rank_optimizer(
        with_rest(optax.chain(where, step, back), rest),
        learning_rate,
        rank=rank,
        refresh_every=refresh_every,
        dimension_numbers=dimension_numbers,
        square=square,
        precision=precision,
        weight_decay=weight_decay,
        mask=mask,
    )
