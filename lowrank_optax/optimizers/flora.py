"""FLora."""

import jax
import optax

from lowrank_optax.bases.random import gaussian
from lowrank_optax.core.layout import (
    TRANSFORMER_MATRICES,
    DimensionNumbers,
    Rank,
    Square,
)
from lowrank_optax.core.typing import Mask
from lowrank_optax.optimizers.assemble import low_rank_optimizer
from lowrank_optax.recovery.projection import project, project_back
from lowrank_optax.steps.rotation import rotate_moments
from lowrank_optax.steps.subspace import in_full_space, per_matrix


def flora(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: Rank = 0.25,
    refresh_every: int = 200,
    key: jax.Array | int,
    b1: float | jax.Array = 0.9,
    scale: float | jax.Array = 1.0,
    weight_decay: float | jax.Array = 0.0,
    mask: Mask = None,
    dimension_numbers: DimensionNumbers = TRANSFORMER_MATRICES,
    square: Square = "input",
    precision: jax.lax.PrecisionLike = None,
) -> optax.GradientTransformationExtraArgs:
    """FLora: momentum compressed by a random projection that is redrawn now and then.

        U = G / sqrt(V),  V Adafactor's factored second moment of G, in full space
        M <- S_t^T S_{t-1} M   at a refresh,    M <- b1 M + (1 - b1) S_t^T U
        W <- W - lr scale S_t M,               S_t Gaussian, from its key

    (Hao et al. 2024, "FLora: Low-Rank Adapters Are Secretly Gradient Compressors",
    section 2.4, with Adafactor as its experiments.) State of a matrix: nr + m + n
    numbers; two products a step.

    When to choose it: a first moment at Adafactor's memory. When not: with a small rank
    and a large rate; a Gaussian projection of rank r is noisy, ||S S^T|| being about
    m / r.

    Deviation: the released optax code projects the transferred momentum with the old
    key both ways; here it goes into the new projection, as the paper writes.

    Args:
      key: a seed or a typed key for the projections.
      b1: decay rate of M.
      scale: on the matrices' step; 1 in the source.
      learning_rate, rank, refresh_every, weight_decay, mask, dimension_numbers,
        square, precision: as in `galore`.

    Raises:
      ValueError: as `low_rank` does.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> params = {"mlp": {"kernel": jnp.ones((16, 64))}, "norm": jnp.ones(16)}
      >>> tx = lro.flora(0.01, rank=4, refresh_every=1000, key=0)
      >>> updates, state = tx.update(params, tx.init(params), params)
    """
    # Any matrix is factored, as the paper has it; optax spares small ones.
    second = optax.scale_by_factored_rms(min_dim_size_to_factor=1)
    before = in_full_space(per_matrix(second))
    step = rotate_moments(optax.ema(b1, debias=False))
    return low_rank_optimizer(
        optax.chain(before, gaussian(key), project(), step, project_back(scale)),
        learning_rate,
        rank=rank,
        refresh_every=refresh_every,
        dimension_numbers=dimension_numbers,
        square=square,
        precision=precision,
        weight_decay=weight_decay,
        mask=mask,
    )
