"""Where: recorded bases, to compare optimizers on one trajectory of subspaces."""

import dataclasses
from typing import cast

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.bases.follow import basis_rule, follow
from lowrank_optax.bases.rule import BasisRule, BasisState
from lowrank_optax.core.frame import Frame
from lowrank_optax.core.paths import with_paths
from lowrank_optax.core.stage import Clock, stage
from lowrank_optax.core.trees import frames_of


def replay(bases: optax.Params, *, orthonormal: bool = True) -> BasisRule:
    """Takes the k-th of these bases at the k-th refresh.

    Compares two optimizers on one trajectory of subspaces, since singular vectors are
    defined up to their sign.

    Args:
      bases: a tree like the parameters with (K, *batch, m, r) at each matrix leaf, in
        the orientation of the Frame (m <= n). After K refreshes the last one stays.
        Other leaves are not read.
      orthonormal: whether the bases are orthonormal.

    Raises:
      ValueError: for a matrix that has no bases, or bases of another shape.

    Example:
      >>> stages = optax.chain(
      ...     lro.bases.replay({"w": jnp.eye(4, 2)[None]}), lro.project(),
      ...     lro.in_subspace(optax.identity()), lro.project_back())
      >>> tx = lro.low_rank(stages, rank=2, refresh_every=1)
      >>> g = {"w": jnp.ones((4, 6))}
      >>> tx.update(g, tx.init(g))[0]["w"][:, 0].tolist()
      [1.0, 1.0, 0.0, 0.0]
    """
    by_path = dict(with_paths(bases))

    def bases_of(path: str, shape: tuple[int, ...]) -> jax.Array:
        if path not in by_path:
            raise ValueError(
                f"{path}: replay() has no bases of this matrix; add {shape}"
            )
        s = jnp.asarray(by_path[path])
        if s.shape[1:] != shape or not s.shape[0]:
            raise ValueError(
                f"{path}: replay() has bases of shape {s.shape}; "
                f"pass (K, {', '.join(map(str, shape))})"
            )
        return s

    def choose(frame: Frame, _: None, clock: Clock) -> jax.Array:
        s = jnp.asarray(by_path[frame.path], frame.gradient.dtype)
        return jnp.take(s, clock.cycle, 0, mode="clip").reshape(frame.basis_shape)

    plain = basis_rule(choose, orthonormal=orthonormal, from_gradient=False)
    rule = follow(dataclasses.replace(plain.rule, by_path=True))

    def init(params: optax.Params) -> BasisState:
        for frame in frames_of(params):
            if not frame.full_rank:
                bases_of(frame.path, frame.basis_shape)
        return cast(BasisState, rule.init(params))

    made = BasisRule(*stage(init, rule.update))
    made.rule = rule.rule
    return made
