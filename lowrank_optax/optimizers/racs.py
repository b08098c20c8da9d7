"""RACS, row and column scaled SGD: no subspace."""

import jax
import optax

from lowrank_optax.core.layout import TRANSFORMER_MATRICES, DimensionNumbers, Square
from lowrank_optax.core.typing import Mask
from lowrank_optax.full_rank.row_column import scale_rows_and_columns
from lowrank_optax.optimizers.assemble import whole_optimizer
from lowrank_optax.steps.rest import with_rest


def racs(
    learning_rate: optax.ScalarOrSchedule,
    *,
    iterations: int = 5,
    scale: float | jax.Array = 0.05,
    limit: float | jax.Array = 1.01,
    b2: float | jax.Array = 0.9,
    rest: optax.GradientTransformation | None = None,
    weight_decay: float | jax.Array = 0.0,
    mask: Mask = None,
    dimension_numbers: DimensionNumbers = TRANSFORMER_MATRICES,
    square: Square = "input",
) -> optax.GradientTransformationExtraArgs:
    """RACS: the gradient with its rows and its columns scaled, and no momentum.

    W <- W - lr scale diag(q)^(-1/2) G diag(s)^(-1/2), its norm limited to grow by
    `limit` a step, q and s running means of a rank-one fit of the squared gradient
    (Gong et al. 2025, "Structured Fisher Approximation", Algorithm 1; equations in
    `scale_rows_and_columns`). It has no subspace, and no rank. State of a matrix:
    m + n + 1 numbers; ten sums over the gradient a step, and no product.

    When to choose it: next to no state, as a baseline for what has more. When not:
    where micro-batches are summed in a subspace, for there is none; with small batches,
    whose noise no momentum averages.

    Leaves of full rank take Adam's step, as the last layer does in the paper: so
    embedding, norms and head do by default. Published: learning_rate=0.02 and the
    defaults; scale=0.02 at 1.3B.

    Args:
      iterations: of the fit.
      scale: alpha, on the matrices' step.
      limit: the step's largest growth from step to step.
      b2: decay rate of q and s, beta in the paper.
      rest: the step for leaves of full rank; `optax.scale_by_adam()` by default.
      square: which side of a square matrix the fit begins with, its "input" or its
        "output" axis (`low_rank`).
      learning_rate, weight_decay, mask, dimension_numbers: as in `galore`.

    Raises:
      ValueError: iterations below 1; and as `whole_matrices` does.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> params = {"mlp": {"kernel": jnp.ones((16, 64))}, "norm": jnp.ones(16)}
      >>> tx = lro.racs(0.02)
      >>> updates, state = tx.update(params, tx.init(params), params)
    """
    stage = scale_rows_and_columns(limit, scale=scale, decay=b2, iterations=iterations)
    return whole_optimizer(
        with_rest(stage, rest),
        learning_rate,
        weight_decay=weight_decay,
        mask=mask,
        dimension_numbers=dimension_numbers,
        square=square,
    )
