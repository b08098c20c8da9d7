"""Where: basis rules, as stages that choose a basis at a refresh."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.bases.in_turn import chosen_in_turn, takes_turns
from lowrank_optax.bases.refresh import Chosen, Refresh, on_subspaces, unmoved
from lowrank_optax.bases.rule import BasisRule, BasisState, Choose, Rule
from lowrank_optax.core import singular
from lowrank_optax.core.aliases import Key, Step
from lowrank_optax.core.frame import Frame
from lowrank_optax.core.keys import check_key, split, stored_key
from lowrank_optax.core.sharding import shard_basis, shard_batch
from lowrank_optax.core.singular import Decomposition
from lowrank_optax.core.stage import Clock, branch, check_only_rule, timed_stage
from lowrank_optax.core.trees import frames_of


def basis_rule(
    choose: Choose,
    key: Key | None = None,
    *,
    orthonormal: bool = True,
    coordinates: bool = False,
    svd_until: Step = 0,
    decomposition: Decomposition | None = None,
    from_gradient: bool = True,
) -> BasisRule:
    """Builds a basis rule from a function that chooses S_t at a refresh.

    The rule sets `basis`, `refreshed` and `rotation` = S_t^T S_{t-1} of each Frame. The
    basis before the first refresh is the first r coordinates. A matrix whose gradient
    has been zero so far gets its basis at its first nonzero gradient
    (docs/concepts/refresh.md).

    Args:
      choose: from a Frame of L matrices (gradient G_t (L, m, n), basis S_{t-1}
        (L, m, r), momentum (L, r, n) or None), L keys (None without `key`) and the
        `Clock` to S_t (L, m, r), orthonormal also for a zero or rank-deficient
        gradient. It treats each matrix by itself: L is any part of a leaf's matrices,
        or of several leaves'. `linalg.per_matrix` or `jax.vmap` make it from a function
        of one matrix.
      key: a seed or a typed key.
      orthonormal: False for a rule whose bases are not orthonormal. Stages that need
        S^T S = I then raise.
      coordinates: True for a rule that returns (L, r) distinct integers, the
        coordinates that are S's columns; products with S are then gathers.
      svd_until: before this step, and for a matrix's first nonzero gradient, S is
        U[:, :r] of G in place of what `choose` returns.
      decomposition: of those G, "svd", "gram" or None, as in `dominant_svd`.
      from_gradient: False for a rule that does not read gradients.

    Raises:
      ValueError: a `choose` that is no function, a key that is neither an int nor
        typed, another decomposition; at update, outside `low_rank` or after another
        basis rule.

    Example:
      >>> # Keeps the first singular vector, and samples the rest by singular value.
      >>> def top_and_sample(frame, keys, clock):
      ...     u, s = lro.stages.left_singular(frame.gradient)
      ...     rest = 1 + lro.stages.sample_indices(keys, s[:, 1:], frame.rank - 1)
      ...     index = jnp.concatenate([jnp.zeros_like(rest[:, :1]), rest], axis=1)
      ...     return jnp.take_along_axis(u, index[:, None, :], axis=-1)
      >>> tx = lro.galore(0.01, rank=4, refresh_every=200,
      ...     basis=lro.basis_rule(top_and_sample, key=0))
    """
    singular.check_full(decomposition)
    if not callable(choose):
        raise ValueError(
            f"basis_rule() needs a function choose(frame, keys, clock), not {choose!r}"
        )
    return follow(
        Rule(
            choose=choose,
            key=None if key is None else check_key(key),
            orthonormal=orthonormal,
            coordinates=coordinates,
            svd_until=svd_until,
            decomposition=decomposition,
            from_gradient=from_gradient,
            reads_gradient=from_gradient,
        )
    )


def changed(made: BasisRule, **fields: Any) -> BasisRule:
    """The stage of the same rule with other fields of `Rule`."""
    return follow(dataclasses.replace(made.rule, **fields))


def follow(rule: Rule) -> BasisRule:
    """The stage of a rule."""

    def init(params: optax.Params) -> BasisState:
        key = None if rule.key is None else stored_key(rule.key)

        def first(frame: Frame) -> Chosen:
            started = jnp.full(frame.batch, not rule.from_gradient)
            stored = rule.storage.pack(frame, rule.first(frame))
            if not rule.coordinates:
                stored = jax.tree.map(partial(shard_basis, frame), stored)
            return unmoved(frame, shard_batch(frame, started), stored)

        chosen = on_subspaces(rule, first, params)
        return BasisState(key, chosen.stored, chosen.started)

    def update(
        frames: optax.Updates, state: BasisState, now: Clock
    ) -> tuple[optax.Updates, BasisState]:
        check_only_rule(frames)
        if all(frame.full_rank for frame in frames_of(frames)):
            return frames, state
        step = Refresh(rule, frames, state, now)

        def with_key(
            choose: Callable[[jax.Array | None], Chosen],
        ) -> tuple[jax.Array | None, Chosen]:
            if state.rng_key is None or rule.key is None:  # a rule that draws nothing
                return None, choose(None)
            key, sub = split(state.rng_key, rule.key)
            return key, choose(sub)

        def otherwise() -> tuple[jax.Array | None, Chosen]:
            if takes_turns(rule, frames):
                return with_key(partial(chosen_in_turn, step))
            return state.rng_key, step.unmoved()

        # One predicate for all matrices: a conditional for each, with a factorization
        # in it, would make the host wait for the device once for each matrix.
        key, chosen = branch(
            step.wanted(step.due), lambda: with_key(step.chosen), otherwise
        )
        return step.with_bases(chosen), BasisState(key, chosen.stored, chosen.started)

    made = BasisRule(*timed_stage(init, update))
    made.rule = rule
    return made
