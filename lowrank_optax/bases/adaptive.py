"""When: basis rules that choose a basis once the old one misses where training goes."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from lowrank_optax.bases.redrawn import Redrawn
from lowrank_optax.bases.rule import rule_of
from lowrank_optax.core.aliases import Number, Tree
from lowrank_optax.core.checks import check_count
from lowrank_optax.core.frame import Frame
from lowrank_optax.core.linalg import ratio, row_squares, unit_largest
from lowrank_optax.core.sharding import shard_basis, shard_batch
from lowrank_optax.core.spread import replicated
from lowrank_optax.core.stage import Clock, both, check_no_turns, timed_stage
from lowrank_optax.core.trees import (
    map_frames,
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

    rule_state: optax.OptState
    path: Tree
    stale: Tree
    chosen: Tree


def adaptive_refresh(
    rule: optax.GradientTransformation,
    *,
    threshold: Number = 0.5,
    columns: int = 32,
) -> optax.GradientTransformationExtraArgs:
    """Refreshes a basis once it keeps too little of the path of the gradients (Lotus).

    With C the gradient at k of its columns, over the T steps from one look to the next,

        D = sum_t C_t / ||C_t||_F,    rho = ||S^T D||_F / ||D||_F

    rho is the part of the gradients' path that the subspace keeps. At a look, every T =
    `refresh_every` steps, each matrix with rho below `threshold` gets a new basis (Miao
    et al. 2026, "Lotus", arXiv 2602.01233, whose path efficiency this is). All get one
    at the first step. Each matrix of a stacked kernel has its own D, mk + 2 numbers,
    and takes its turn by itself, as with `low_rank(stagger=True)`. One product of S
    with k columns a step.

    Deviations: the paper's D has all n columns, which would be as much state as a
    momentum. Here it has k, evenly spaced. The paper also draws each basis by a
    randomized SVD; here any rule does, such as
    `dominant_svd(decomposition="randomized")`.

    Args:
      rule: a basis rule that stores orthonormal bases.
      threshold: gamma, of rho, in [0, 1]. With 1 every look chooses new bases, and with
        0 none does.
      columns: k, at most all n.

    Raises:
      ValueError: columns below 1; a stage that is no basis rule, `gaussian`,
        `quantize_basis`, or `frozen`; at init, inside `low_rank(stagger=True)`; at
        update, outside `low_rank`, and with gradients summed in the subspace.

    Example:
      >>> tx = lro.galore(0.01, rank=4, refresh_every=50,
      ...     basis=lro.bases.adaptive_refresh(lro.dominant_svd(), threshold=0.5))
    """
    check_count("columns", columns)
    inside = rule_of(rule, "adaptive_refresh()")
    if isinstance(rule, Redrawn) or inside.once or not inside.orthonormal:
        raise ValueError(
            "adaptive_refresh() replaces stored orthonormal bases; wrap a rule other "
            "than gaussian() and quantize_basis(), which have none, and frozen(), "
            "which chooses only one"
        )
    rule = optax.with_extra_args_support(rule)

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
            "it gives each matrix its turn by itself: leave out either",
        )
        return AdaptiveRefreshState(
            rule_state=rule.init(params),
            path=map_frames(no_path, params, plain=nothing),
            stale=map_frames(partial(zeros, bool), params, plain=nothing),
            chosen=map_frames(partial(zeros, jnp.int32), params, plain=nothing),
        )

    def update(
        frames: optax.Updates, state: AdaptiveRefreshState, now: Clock
    ) -> tuple[optax.Updates, AdaptiveRefreshState]:
        def turn(frame: Frame, stale: jax.Array) -> Frame:
            return frame.replace(due=both(now.refresh, stale))

        if now.refresh is not False:
            frames = map_subspaces(turn, frames, state.stale)
        first = now._replace(refresh=both(now.refresh, now.step == 0))
        frames, rule_state = rule.update(frames, state.rule_state, clock=first)
        move = partial(_moved, threshold, now.refresh)
        frames, *new = update_frames(move, frames, *state[1:])
        return frames, AdaptiveRefreshState(rule_state, *new)

    return timed_stage(init, update)


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
    k, n = path.shape[-1], frame.gradient.shape[-1]
    # Replicated, so that sums, and what they decide, are the same on every sharding.
    seen = replicated(frame.gradient[..., jnp.arange(k) * n // k])
    seen = unit_largest(seen.astype(path.dtype))  # or squares of small ones underflow
    path = jnp.where(looks, 0, path) + ratio(seen, jnp.sqrt(_squares(seen)), 0)
    whole = replicated(path)
    stale = _squares(frame.down(whole)) < threshold**2 * _squares(whole)
    return frame, path, stale[..., 0, 0], chosen + frame.need("refreshed")


def _squares(x: jax.Array) -> jax.Array:
    return jnp.sum(row_squares(x), axis=-2, keepdims=True)
