"""GrassWalk and GrassJump."""

import jax
import optax

from lowrank_optax.bases.grassmann import grassmann_walk
from lowrank_optax.bases.random import grassmann_jump
from lowrank_optax.core.aliases import Mask
from lowrank_optax.core.layout import (
    TRANSFORMER_MATRICES,
    DimensionNumbers,
    Rank,
    Square,
)
from lowrank_optax.optimizers.assemble import low_rank_optimizer, one_of
from lowrank_optax.recovery.projection import project
from lowrank_optax.recovery.residual import recover_residual
from lowrank_optax.steps.rotation import rotate_moments


def grass_walk(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: Rank = 0.25,
    refresh_every: int = 100,
    key: jax.Array | int | None = None,
    angle: float | jax.Array = 0.3,
    walk_rank: int | None = 1,
    basis: optax.GradientTransformation | None = None,
    scale: float | jax.Array = 1.0,
    limit: float | jax.Array = 1.01,
    b1: float | jax.Array = 0.9,
    b2: float | jax.Array = 0.999,
    eps: float | jax.Array = 1e-8,
    weight_decay: float | jax.Array = 0.0,
    mask: Mask = None,
    dimension_numbers: DimensionNumbers = TRANSFORMER_MATRICES,
    square: Square = "input",
    precision: jax.lax.PrecisionLike = None,
) -> optax.GradientTransformationExtraArgs:
    """GrassWalk: a random walk of S, moments rotated, residual recovered.

    At a refresh S moves along a random geodesic (eq. 4) and Adam's moments turn with
    it (eqs. 7, 8); every step gives the residual back, rescaled (eqs. 9 to 11;
    GrassWalk paper, Algorithm 1). State of a matrix: mr + 2nr + 1 numbers.

    By default one direction turns: section 5 of the paper speaks of "controlled rank-1
    rotations" by which the basis stays near the core subspace, and on the README's 60M
    work one direction (loss 3.939 at 0.3 rad, 3.942 at 1.0) and all (3.936 at 0.3) end
    within the noise. All at 1.0 rad ended at 3.902, nearly a jump's 3.911: a longer
    step explores more, and `walk_rank=None, angle=1.0` is worth a try.

    When to choose it: the basis moves smoothly and needs no gradient, so a refresh is
    cheap. When not: where the gradient's own subspace is worth following;
    then `basis=sara_sample(key)` here.

    Args:
      key: a seed or a typed key for the walk; required unless `basis` is given.
      angle: eta, the largest angle between two bases, in radians. The paper gives no
        value; 0.3 is ours.
      walk_rank: how many directions turn at a refresh, 1 to r; None for all.
      basis: another basis rule in place of the walk.
      scale: on the part inside the subspace; 1 in the paper.
      limit: zeta; the paper gives no value, 1.01 is Fira's.
      learning_rate, rank, refresh_every, b1, b2, eps, weight_decay, mask,
        dimension_numbers, square, precision: as in `galore`.

    Raises:
      ValueError: neither or both of `key` and `basis`; and as `low_rank` does.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> params = {"mlp": {"kernel": jnp.ones((16, 64))}, "norm": jnp.ones(16)}
      >>> tx = lro.grass_walk(0.002, rank=4, refresh_every=100, key=0)
      >>> updates, state = tx.update(params, tx.init(params), params)
    """
    rule = one_of(
        key, basis, lambda key: grassmann_walk(key, angle, walk_rank=walk_rank)
    )
    step = rotate_moments(optax.scale_by_adam(b1, b2, eps))
    back = recover_residual(limit, scale=scale)
    return low_rank_optimizer(
        optax.chain(rule, project(), step, back),
        learning_rate,
        rank=rank,
        refresh_every=refresh_every,
        dimension_numbers=dimension_numbers,
        square=square,
        precision=precision,
        weight_decay=weight_decay,
        mask=mask,
    )


def grass_jump(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: Rank = 0.25,
    refresh_every: int = 100,
    key: jax.Array | int | None = None,
    basis: optax.GradientTransformation | None = None,
    scale: float | jax.Array = 1.0,
    limit: float | jax.Array = 1.01,
    b1: float | jax.Array = 0.9,
    b2: float | jax.Array = 0.999,
    eps: float | jax.Array = 1e-8,
    weight_decay: float | jax.Array = 0.0,
    mask: Mask = None,
    dimension_numbers: DimensionNumbers = TRANSFORMER_MATRICES,
    square: Square = "input",
    precision: jax.lax.PrecisionLike = None,
) -> optax.GradientTransformationExtraArgs:
    """GrassJump: a random S at each refresh, moments rotated, residual recovered.

    As `grass_walk`, with a uniformly random orthonormal S every T steps (GrassWalk
    paper, section 4, Algorithm 1). State of a matrix: mr + 2nr + 1 numbers.

    When to choose it: a refresh that costs one small QR, and the subspace explores
    fastest. When not: without the residual (a random subspace alone misses most of the
    gradient).

    Args:
      key: a seed or a typed key for the jumps; required unless `basis` is given.
      basis: another basis rule in place of the jump.
      learning_rate, rank, refresh_every, scale, limit, b1, b2, eps, weight_decay, mask,
        dimension_numbers, square, precision: as in `grass_walk`.

    Raises:
      ValueError: neither or both of `key` and `basis`; and as `low_rank` does.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> params = {"mlp": {"kernel": jnp.ones((16, 64))}, "norm": jnp.ones(16)}
      >>> tx = lro.grass_jump(0.002, rank=4, refresh_every=100, key=0)
      >>> updates, state = tx.update(params, tx.init(params), params)
    """
    step = rotate_moments(optax.scale_by_adam(b1, b2, eps))
    back = recover_residual(limit, scale=scale)
    return low_rank_optimizer(
        optax.chain(one_of(key, basis, grassmann_jump), project(), step, back),
        learning_rate,
        rank=rank,
        refresh_every=refresh_every,
        dimension_numbers=dimension_numbers,
        square=square,
        precision=precision,
        weight_decay=weight_decay,
        mask=mask,
    )
