"""When: basis rules that choose a basis once the old one captures too little."""

import dataclasses
from functools import partial
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import DTypeLike

from lowrank_optax.bases.follow import follow
from lowrank_optax.bases.redrawn import Redrawn
from lowrank_optax.bases.rule import BasisState, never, rule_of
from lowrank_optax.core.aliases import Number, Tree
from lowrank_optax.core.checks import check_count, check_fraction
from lowrank_optax.core.frame import Frame, ProjectedAway
from lowrank_optax.core.linalg import ratio, row_squares, unit_largest
from lowrank_optax.core.sharding import shard_basis, shard_batch
from lowrank_optax.core.spread import replicated
from lowrank_optax.core.stage import Clock, both, check_no_turns, timed_stage
from lowrank_optax.core.trees import (
    frames_of,
    map_subspaces,
    nothing,
    update_frames,
)


class AdaptiveRefreshState(NamedTuple):
    """State of `adaptive_refresh`; all but the rule's are trees like the parameters.

    Attributes:
      rule_state: the rule's.
      path: D (*batch, m, k), the sum of the unit gradients since the last look.
      stale: (*batch,) bool, whether the basis is replaced at the next look.
      chosen: (*batch,) int32, bases chosen so far.
    """

    rule_state: BasisState
    path: Tree
    stale: Tree
    chosen: Tree


def adaptive_refresh(
    rule: optax.GradientTransformation,
    *,
    threshold: Number = 0.5,
    columns: int = 32,
) -> optax.GradientTransformationExtraArgs:
    """Refreshes a basis once it captures too little of the gradients' path (Lotus).

    With C the gradient at k of its columns, over the T steps from one look to the next,

        D = sum_t C_t / ||C_t||_F,    rho = ||S^T D||_F / ||D||_F

    rho is the part of the accumulated gradient that the subspace captures. At a look,
    every T = `refresh_every` steps, each matrix with rho below `threshold` gets a new
    basis (Miao et al. 2026, "Lotus", arXiv 2602.01233, whose path efficiency this is).
    All get one at the first step. Each matrix of a stacked kernel has its own D, mk + 2
    numbers, and is refreshed independently, as with `low_rank(stagger=True)`. One
    product of S with k columns a step.

    Deviations: the paper's D has all n columns, which would be as much state as a
    momentum. Here it has k, spread over all n at uneven distances, so that they do not
    fall on one feature of each head. The paper also draws each basis by a randomized
    SVD; here any rule does, such as `dominant_svd(decomposition="randomized")`. A rule
    that counts refreshes (`correlation_aware`, `replay`) counts looks.

    Args:
      rule: a basis rule that stores orthonormal bases.
      threshold: gamma, of rho, in [0, 1]; 0 keeps the first bases.
      columns: k, capped at n.

    Raises:
      ValueError: columns below 1; a threshold outside [0, 1]; a stage that is not a
        basis rule, `gaussian`, `quantize_basis`, or `frozen`; at init, inside
        `low_rank(stagger=True)`; at update, outside `low_rank`, and with gradients
        summed in the subspace.

    Example:
      >>> tx = lro.galore(0.01, rank=4, refresh_every=50,
      ...     basis=lro.bases.adaptive_refresh(lro.dominant_svd(), threshold=0.5))
    """
    check_count("columns", columns)
    check_fraction("threshold", threshold)
    inside = rule_of(rule, "adaptive_refresh()")
    if isinstance(rule, Redrawn) or inside.once or not inside.orthonormal:
        raise ValueError(
            "adaptive_refresh() replaces stored orthonormal bases; gaussian(), "
            "quantize_basis() and basis_rule(orthonormal=False) have none, and "
            "frozen() never replaces its own"
        )
    # Not batched: few of a kernel's matrices get a basis at a look.
    rule = follow(dataclasses.replace(inside, batched=never))

    def no_path(frame: Frame) -> jax.Array:
        k = min(columns, frame.gradient.shape[-1])
        dtype = jnp.promote_types(frame.gradient.dtype, jnp.float32)
        return shard_basis(frame, jnp.zeros((*frame.basis_shape[:-1], k), dtype))

    def zeros(dtype: DTypeLike, frame: Frame) -> jax.Array:
        return shard_batch(frame, jnp.zeros(frame.batch, dtype))

    def init(params: optax.Params) -> AdaptiveRefreshState:
        check_no_turns(
            params,
            "adaptive_refresh()",
            "adaptive_refresh() decides for each matrix: leave one of the two out",
        )
        first = no_path, partial(zeros, bool), partial(zeros, jnp.int32)
        trees = (map_subspaces(f, params, other=nothing) for f in first)
        return AdaptiveRefreshState(cast(BasisState, rule.init(params)), *trees)

    def update(
        frames: optax.Updates, state: AdaptiveRefreshState, now: Clock
    ) -> tuple[optax.Updates, AdaptiveRefreshState]:
        if all(frame.full_rank for frame in frames_of(frames)):
            return frames, state

        def turn(frame: Frame, stale: jax.Array) -> Frame:
            return frame.replace(due=both(now.refresh, stale))

        if now.refresh is not False:
            frames = map_subspaces(turn, frames, state.stale)
        start = now._replace(refresh=both(now.refresh, now.step == 0))
        old: Tree = state.rule_state
        frames, made = rule.update(frames, old, clock=start)
        rule_state = _key_of_refreshes(now.refresh, cast(BasisState, made), old)
        move = partial(_moved, threshold, now.refresh)
        frames, *new = update_frames(move, frames, *state[1:])
        return frames, AdaptiveRefreshState(rule_state, *new)

    return timed_stage(init, update)


def _key_of_refreshes(
    looks: bool | jax.Array, new: BasisState, old: BasisState
) -> BasisState:
    """The rule's new state, its key split at looks and where a matrix starts.

    Matrices that take turns split it at every step.
    """
    if new.rng_key is None or old.rng_key is None or isinstance(looks, bool):
        return new
    pairs = zip(*map(jax.tree.leaves, (new.started, old.started)), strict=True)
    starts = jnp.any(jnp.stack([jnp.any(a != b) for a, b in pairs]))
    return new._replace(rng_key=jnp.where(looks | starts, new.rng_key, old.rng_key))


def _moved(
    threshold: Number,
    looks: bool | jax.Array,
    frame: Frame,
    path: jax.Array,
    stale: jax.Array,
    chosen: jax.Array,
) -> tuple[Tree, ...]:
    """Returns a leaf and its `AdaptiveRefreshState` after a step."""
    if frame.full_rank:
        return frame, path, stale, chosen
    if isinstance(frame.gradient, ProjectedAway):
        raise ValueError(
            f"{frame.path}: adaptive_refresh() follows the full gradient, but "
            "gradients are summed in the subspace; leave it out, or sum full gradients"
        )
    seen = frame.gradient[..., spread_columns(frame.gradient.shape[-1], path.shape[-1])]
    # Replicated, so that sums, and what they decide, are the same on every sharding. Of
    # unit size, or squares of small numbers would underflow.
    seen = unit_largest(replicated(seen).astype(path.dtype))
    path = jnp.where(looks, 0, path) + ratio(seen, jnp.sqrt(_squares(seen)), 0)
    whole = replicated(path)
    stale = _squares(frame.down(whole)) < threshold**2 * _squares(whole)
    return frame, path, stale[..., 0, 0], chosen + frame.need("refreshed")


def spread_columns(n: int, k: int) -> np.ndarray:
    """The k of n columns j with the least j phi mod 1, spread by the golden ratio."""
    return np.sort(np.argsort(np.arange(n) * (5**0.5 - 1) / 2 % 1)[:k])


def _squares(x: jax.Array) -> jax.Array:
    return jnp.sum(row_squares(x), axis=-2, keepdims=True)
