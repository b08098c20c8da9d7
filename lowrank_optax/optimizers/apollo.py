"""APOLLO and APOLLO-Mini."""

import jax
import optax

from lowrank_optax.bases.random import gaussian
from lowrank_optax.core.aliases import Mask
from lowrank_optax.core.layout import (
    TRANSFORMER_MATRICES,
    DimensionNumbers,
    Rank,
    Square,
)
from lowrank_optax.optimizers.assemble import low_rank_optimizer, one_of
from lowrank_optax.recovery.projection import project
from lowrank_optax.recovery.published import Variant, arithmetic_of
from lowrank_optax.recovery.scaling import scale_gradient
from lowrank_optax.steps.subspace import in_subspace


def apollo(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: Rank = 0.25,
    refresh_every: int = 200,
    key: jax.Array | int | None = None,
    basis: optax.GradientTransformation | None = None,
    scale: float | jax.Array = 1.0,
    limit: float | jax.Array = 1.01,
    b1: float | jax.Array = 0.9,
    b2: float | jax.Array = 0.999,
    eps: float | jax.Array | None = None,
    weight_decay: float | jax.Array = 0.0,
    mask: Mask = None,
    dimension_numbers: DimensionNumbers = TRANSFORMER_MATRICES,
    square: Square = "input",
    precision: jax.lax.PrecisionLike = None,
    variant: Variant = "paper",
) -> optax.GradientTransformationExtraArgs:
    """APOLLO: the gradient, each channel scaled as Adam scales it in a random subspace.

    W <- W - lr sqrt(scale) G diag(phi), phi_i = ||G~^O_:,i|| / ||G~_:,i||, its norm
    limited to grow by `limit` a step, G~ = S^T G with S Gaussian (Zhu et al. 2025,
    "APOLLO"; equations in `scale_gradient`). State of a matrix: 2nr + 1 numbers, for S
    is drawn from its key at every step; one product a step.

    When to choose it: no basis in the state, no factorisation, one product. When not:
    where the gradient's directions themselves should be preconditioned: the step is
    the raw gradient's, column by column; then `grass_jump`.

    `variant="published"` is apollo-torch 1.0.3 step for step, up to its bases (it
    seeds torch's generator): as for `fira`, bias correction on the step size, eps
    1e-6, the limiter on uncorrected norms. It also keeps the moments when the
    projection is redrawn, as this does.

    Args:
      key: a seed or a typed key for the projections; required unless `basis` is given.
      basis: another basis rule; `gaussian(key, stored=True)` keeps S in the state.
      scale: alpha; its root multiplies the step.
      limit: zeta, the step's largest growth from step to step.
      learning_rate, rank, refresh_every, b1, b2, eps, weight_decay, mask,
        dimension_numbers, square, precision, variant: as in `galore`.

    Raises:
      ValueError: neither or both of `key` and `basis`; an unknown variant; and as
        `low_rank` does.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> params = {"mlp": {"kernel": jnp.ones((16, 64))}, "norm": jnp.ones(16)}
      >>> tx = lro.apollo(0.01, rank=4, refresh_every=200, key=0)
      >>> updates, state = tx.update(params, tx.init(params), params)
    """
    arithmetic = arithmetic_of(variant)
    step = in_subspace(arithmetic.adam(b1, b2, eps))
    back = scale_gradient(limit, scale=scale, variant=variant)
    return low_rank_optimizer(
        optax.chain(one_of(key, basis, gaussian), project(), step, back),
        learning_rate,
        rank=rank,
        refresh_every=refresh_every,
        dimension_numbers=dimension_numbers,
        square=square,
        precision=precision,
        after=arithmetic.after(learning_rate, weight_decay, mask, b1, b2),
    )


def apollo_mini(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: Rank = 1,
    refresh_every: int = 200,
    key: jax.Array | int | None = None,
    basis: optax.GradientTransformation | None = None,
    scale: float | jax.Array = 128.0,
    limit: float | jax.Array = 1.01,
    b1: float | jax.Array = 0.9,
    b2: float | jax.Array = 0.999,
    eps: float | jax.Array | None = None,
    weight_decay: float | jax.Array = 0.0,
    mask: Mask = None,
    dimension_numbers: DimensionNumbers = TRANSFORMER_MATRICES,
    square: Square = "input",
    precision: jax.lax.PrecisionLike = None,
    variant: Variant = "paper",
) -> optax.GradientTransformationExtraArgs:
    """APOLLO-Mini: `apollo` at rank 1, with one factor for the whole matrix.

    W <- W - lr sqrt(scale) phi G, phi = ||G~^O||_F / ||G~||_F (Zhu et al. 2025,
    "APOLLO", equations in `scale_gradient`). State of a matrix: 2n + 1 numbers; one
    product of rank one a step.

    When to choose it: SGD's memory. When not: where `apollo` fits, which scales the
    channels apart.

    Args:
      rank: r, 1 in the source.
      key, basis, limit: as in `apollo`.
      scale: alpha, 128 in the source; its root multiplies the step.
      learning_rate, refresh_every, b1, b2, eps, weight_decay, mask, dimension_numbers,
        square, precision, variant: as in `galore`.

    Raises:
      ValueError: as `apollo` does.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> params = {"mlp": {"kernel": jnp.ones((16, 64))}, "norm": jnp.ones(16)}
      >>> tx = lro.apollo_mini(0.01, refresh_every=200, key=0)
      >>> updates, state = tx.update(params, tx.init(params), params)
    """
    arithmetic = arithmetic_of(variant)
    step = in_subspace(arithmetic.adam(b1, b2, eps))
    back = scale_gradient(limit, per="matrix", scale=scale, variant=variant)
    return low_rank_optimizer(
        optax.chain(one_of(key, basis, gaussian), project(), step, back),
        learning_rate,
        rank=rank,
        refresh_every=refresh_every,
        dimension_numbers=dimension_numbers,
        square=square,
        precision=precision,
        after=arithmetic.after(learning_rate, weight_decay, mask, b1, b2),
    )
