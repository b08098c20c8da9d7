"""Where: a basis that is drawn again at every step, from a key in the state."""

from functools import partial

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.bases.rule import BasisRule, BasisState, Rule
from lowrank_optax.core.aliases import Tree
from lowrank_optax.core.frame import Frame, rotation_between
from lowrank_optax.core.keys import split, stored_key, typed_key
from lowrank_optax.core.sharding import shard_batch
from lowrank_optax.core.spread import replicated
from lowrank_optax.core.stage import (
    Clock,
    both,
    branch,
    check_no_turns,
    check_only_rule,
    timed_stage,
)
from lowrank_optax.core.trees import frames_of, map_subspaces, nothing


class Redrawn(BasisRule):
    """A basis rule whose state holds the key of the last refresh and no bases."""


def redraw(rule: Rule) -> Redrawn:
    """The stage that draws S at every step, by a rule that looks at keys alone.

    Its `BasisState.basis` is the data of one key for all matrices.
    """

    def update(
        frames: optax.Updates, state: BasisState, now: Clock
    ) -> tuple[optax.Updates, BasisState]:
        check_only_rule(frames)
        if all(frame.full_rank for frame in frames_of(frames)):
            return frames, state
        due = both(now.refresh, now.step == 0) if rule.once else now.refresh
        basis = partial(_drawn, rule, now)

        def rotation(frame: Frame, drawn: Tree) -> jax.Array:
            new, old = basis(frame, drawn), basis(frame, state.basis)
            return rotation_between(new, old, frame.gradient.dtype)

        def refresh() -> tuple[Tree, ...]:
            assert rule.key is not None, "a rule that draws has a key"
            assert state.rng_key is not None
            key, sub = split(state.rng_key, rule.key)
            drawn = jax.random.key_data(sub)
            rotated = partial(rotation, drawn=drawn)
            return key, drawn, map_subspaces(rotated, frames, other=nothing)

        def stay() -> tuple[Tree, ...]:
            rotations = map_subspaces(Frame.no_rotation, frames, other=nothing)
            return state.rng_key, state.basis, rotations

        key, drawn, rotations = branch(due, refresh, stay)
        new = map_subspaces(
            lambda f, rotation: f.replace(
                previous=basis(f, state.basis),
                basis=basis(f, drawn),
                rotation=rotation,
                refreshed=jnp.full(f.batch, due),
                orthonormal=rule.orthonormal,
            ),
            frames,
            rotations,
        )
        return new, BasisState(key, drawn, state.started)

    made = Redrawn(*timed_stage(partial(_first_state, rule), update))
    made.rule = rule
    return made


def _first_state(rule: Rule, params: optax.Params) -> BasisState:
    assert rule.key is not None, "a rule that draws has a key"
    if not rule.once:
        check_no_turns(
            params,
            "gaussian()",
            "it stores one key for all of them, and a new key takes no time: leave out "
            "stagger, or use gaussian(key, stored=True)",
        )
    key = stored_key(rule.key)
    started = map_subspaces(
        lambda f: shard_batch(f, jnp.ones(f.batch, bool)), params, other=nothing
    )
    # A copy: one buffer in two places of a state could not be donated.
    return BasisState(key, jnp.copy(key), started)


def _drawn(rule: Rule, now: Clock, frame: Frame, stored: Tree) -> jax.Array:
    """S of one leaf, (*batch, m, r)."""
    assert rule.key is not None, "a rule that draws has a key"
    s = rule.choose(frame, frame.keys(typed_key(stored, rule.key)), now)
    return replicated(s.reshape(frame.basis_shape))
