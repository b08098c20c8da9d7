"""GrassWalk and GrassJump."""

from __future__ import annotations

from typing import Unpack

import optax

from lowrank_optax.bases.grassmann import grassmann_walk
from lowrank_optax.bases.random import grassmann_jump
from lowrank_optax.core.aliases import Key, Number
from lowrank_optax.optimizers.assemble import low_rank_optimizer, one_of
from lowrank_optax.optimizers.options import Options, passes_on
from lowrank_optax.recovery.projection import project
from lowrank_optax.recovery.residual import recover_residual
from lowrank_optax.steps.rotation import Outside, rotate_moments


@passes_on(low_rank_optimizer, refresh_every=100)
def grass_jump(
    learning_rate: optax.ScalarOrSchedule,
    *,
    key: Key | None = None,
    basis: optax.GradientTransformation | None = None,
    scale: Number = 1.0,
    limit: Number = 1.01,
    outside: Outside = "zero",
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: Number = 1e-8,
    **options: Unpack[Options],
) -> optax.GradientTransformationExtraArgs:
    """GrassJump: a random S at each refresh, moments rotated, residual recovered.

        S uniformly random, S^T S = I;  M, V <- rotated by S_t^T S_{t-1}  at a refresh
        G~ = S^T G,  M, V <- Adam's of G~,  O = M^ / (sqrt(V^) + eps)
        W <- W - lr (scale S O + (G - S G~) diag(||O_:,i|| / ||G~_:,i||))

    the last term, the residual, limited in its norm's growth (GrassWalk paper, section
    4, Algorithm 1, eqs. 7 to 11; `rotate_moments`, `recover_residual`). State of a
    matrix: mr + 2nr + 1 numbers.

    When to choose it: the subspace explores fastest, and a refresh after the first step
    costs one small QR. S_0 are singular vectors of the first gradient. When not:
    without the residual, since a random subspace alone misses most of the gradient. Nor
    with eq. 8 and frequent refreshes. On LLaMA-60M, with 40 steps between them and 9.8
    M tokens, it ended at 4.701 +- 0.056, and without rotation at 4.505 +- 0.018. There
    `outside="alike"` ended 0.030 +- 0.011 below no rotation. With 100 steps and 39 M
    tokens, eq. 8 ended at 3.911 and "alike" at 3.980, one run each
    (docs/results/ablations.md).

    Deviations: none that are known; no code is published. After a thousand zero
    gradients, steps are several times as large as at first, as with AdamW: V has
    decayed, and its bias correction is over.

    Args:
      key: a seed or a typed key for the jumps; required unless `basis` is passed.
      basis: another basis rule in place of the jump.
      scale: on the part inside the subspace; 1 in the paper.
      limit: zeta; the paper names no value, 1.01 is Fira's.
      outside: what V is outside of the last subspace, "zero" as in eq. 8, or "alike"
        (`rotate_moments`).
      learning_rate, b1, b2, eps: as in `galore`.
      **options: as in `low_rank_optimizer`.

    Raises:
      ValueError: neither or both of `key` and `basis`; and as `low_rank` does.

    Example:
      >>> tx = lro.grass_jump(0.002, rank=4, key=0)
    """
    step = rotate_moments(optax.scale_by_adam(b1, b2, eps), outside=outside)
    back = recover_residual(limit, scale=scale)
    stages = optax.chain(one_of(key, basis, grassmann_jump), project(), step, back)
    return low_rank_optimizer(stages, learning_rate, **options)


@passes_on(low_rank_optimizer, refresh_every=100)
def grass_walk(
    learning_rate: optax.ScalarOrSchedule,
    *,
    key: Key | None = None,
    angle: Number = 0.3,
    walk_rank: int | None = 1,
    basis: optax.GradientTransformation | None = None,
    scale: Number = 1.0,
    limit: Number = 1.01,
    outside: Outside = "zero",
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: Number = 1e-8,
    **options: Unpack[Options],
) -> optax.GradientTransformationExtraArgs:
    """GrassWalk: `grass_jump` with a random walk of S in place of the jump.

    At a refresh S moves along a random geodesic (eq. 4; GrassWalk paper, Algorithm 1;
    `grassmann_walk`). State of a matrix: mr + 2nr + 1 numbers.

    When to choose it: the basis moves smoothly. After the first step it needs no
    gradient, so that a refresh is cheap. When not: where the gradient's own subspace is
    worth following. Pass `basis=sara_sample(key)` there.

    Deviations: the paper names neither angle nor directions. By default one direction
    moves, since section 5 speaks of "controlled rank-1 rotations". On LLaMA-60M
    (docs/results/losses_60m.md) one direction (loss 3.936 at 0.3 rad, 3.942 at 1.0) and
    all (3.936 at 0.3) end within the noise. All at 1.0 rad end at 3.902, near a jump's
    3.911: a longer step explores more, and `walk_rank=None, angle=1.0` is worth a try.

    Args:
      key: a seed or a typed key for the walk; required unless `basis` is passed.
      angle: eta, the largest angle between two bases, in radians; 0.3 is ours.
      walk_rank: how many directions move at a refresh, 1 to r; None for all.
      basis: another basis rule in place of the walk.
      scale, limit, outside: as in `grass_jump`.
      learning_rate, b1, b2, eps: as in `galore`.
      **options: as in `low_rank_optimizer`.

    Raises:
      ValueError: as `grass_jump` does.

    Example:
      >>> tx = lro.grass_walk(0.002, rank=4, key=0)
    """
    rule = one_of(
        key, basis, lambda key: grassmann_walk(key, angle, walk_rank=walk_rank)
    )
    return grass_jump(
        learning_rate,
        basis=rule,
        scale=scale,
        limit=limit,
        outside=outside,
        b1=b1,
        b2=b2,
        eps=eps,
        **options,
    )
