"""Where: what all basis rules share."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from lowrank_optax.bases.batching import choose, choose_in_batches, is_batched
from lowrank_optax.bases.rule import BasisRule, BasisState, Choose, Rule
from lowrank_optax.core import linalg
from lowrank_optax.core.frame import Frame, are_coordinates, is_frame
from lowrank_optax.core.keys import canonical_key, check_key, split
from lowrank_optax.core.linalg import Decomposition, select, transpose
from lowrank_optax.core.sharding import shard_basis, shard_batch
from lowrank_optax.core.spread import replicated
from lowrank_optax.core.stage import Clock, both, branch, timed_stage
from lowrank_optax.core.trees import each_apart, frames_of, in_turn, map_frames, nothing


def basis_rule(
    choose: Choose,
    key: jax.Array | int | None = None,
    *,
    orthonormal: bool = True,
    coordinates: bool = False,
    svd_until: int | jax.Array = 0,
    decomposition: Decomposition | None = None,
    from_gradient: bool = True,
) -> BasisRule:
    """A basis rule from a function that chooses S_t at a refresh.

    Sets `basis`, `refreshed` and `rotation` = S_t^T S_{t-1} of each Frame. The basis
    before the first refresh is the first r coordinates.

    A matrix whose gradient has been zero so far (behind a projection that starts at
    zero, say) has no subspace to choose: whatever a refresh takes then is replaced at
    its first gradient that is not zero, be a refresh due there or not. So no rule is
    anchored to directions that mean nothing. (Where the caller says when to refresh, it
    is replaced at the first refresh that he asks for from there on.)

    Args:
      choose: from a Frame of L matrices (gradient G_t (L, m, n), basis S_{t-1}
        (L, m, r), momentum (L, r, n) or None; L = 1 for a single matrix), L keys
        (None without `key`) and the `Clock` to S_t (L, m, r), orthonormal also for a
        zero or a rank-deficient gradient. It treats each matrix by itself: on a mesh it
        is asked with some of a leaf's, or of several leaves of one shape.
        `linalg.per_matrix` or `jax.vmap` make it from a function of one matrix.
      key: a seed or a typed key.
      orthonormal: False for a rule whose bases are not. Stages that need S^T S = I then
        refuse it.
      coordinates: True for a rule that returns (L, r) distinct integers, the
        coordinates that are S's columns; products with S are then gathers.
      svd_until: before this step, and for a matrix's first gradient that is not zero,
        S = U[:, :r] of G, and only then what `choose` says; 0 leaves all to `choose`.
      decomposition: of those G, "svd", "gram" or None, as in `dominant_svd`.
      from_gradient: False for a rule that does not look at gradients, to which it does
        not matter whether they are zero.

    Raises:
      ValueError: a key that is neither an int nor typed, another decomposition; at
        update, outside `low_rank`.

    Example:
      >>> # Keeps the first singular vector, and samples the rest by singular value.
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> def top_and_sample(frame, keys, clock):
      ...     u, s = lro.stages.left_singular(frame.gradient)
      ...     rest = 1 + lro.stages.sample_indices(keys, s[:, 1:], frame.rank - 1)
      ...     index = jnp.concatenate([jnp.zeros_like(rest[:, :1]), rest], axis=1)
      ...     return jnp.take_along_axis(u, index[:, None, :], axis=-1)
      >>> tx = lro.galore(0.01, rank=4, refresh_every=200,
      ...     basis=lro.basis_rule(top_and_sample, key=0))
    """
    linalg.check_full(decomposition)
    return follow(
        Rule(
            choose=choose,
            key=None if key is None else check_key(key),
            orthonormal=orthonormal,
            coordinates=coordinates,
            svd_until=svd_until,
            decomposition=decomposition,
            from_gradient=from_gradient,
        )
    )


class Chosen(NamedTuple):
    """The basis of one leaf, or trees of those of all.

    Attributes:
      started: as in `BasisState`.
      rotation: (*batch, r, r), S_t^T S_{t-1}.
      refreshed: (*batch,) bool, whether it was chosen at this step.
      stored: as in `BasisState.basis`.
    """

    started: Any
    rotation: Any
    refreshed: Any
    stored: Any


def follow(rule: Rule) -> BasisRule:
    """The stage that follows a rule."""

    def init(params: optax.Params) -> BasisState:
        key = None if rule.key is None else canonical_key(rule.key)

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
        if all(frame.full_rank for frame in frames_of(frames)):
            return frames, state
        due = both(now.refresh, now.step == 0) if rule.once else now.refresh

        def refresh(state: BasisState) -> tuple[BasisState, Chosen]:
            key, sub = split(state.rng_key)

            def anew(frame: Frame, started: jax.Array, stored: Any) -> Chosen:
                return choose_anew(rule, frame, started, stored, sub, now, due)

            stored = each_stored(rule, jax.tree.structure(frames), state.basis)
            asked = choose_in_batches(rule, frames, stored, state.started, sub, now)
            chosen = on_subspaces(rule, anew, asked, state)
            return BasisState(key, chosen.stored, chosen.started), chosen

        def keep(state: BasisState) -> tuple[BasisState, Chosen]:
            return state, on_subspaces(rule, unmoved, frames, state)

        # One predicate for all matrices: a cond for each, with a factorisation in it,
        # would make the host wait for the device as often.
        wanted = due
        if not isinstance(now.refresh, bool):
            wanted |= starts(rule, frames, state.started)
        new, chosen = branch(wanted, refresh, keep, state)
        return with_bases(rule, frames, state.basis, new.basis, chosen), new

    made = BasisRule(*timed_stage(init, update))
    made.rule = rule
    return made


def on_subspaces(
    rule: Rule,
    f: Callable[..., Chosen],
    frames: optax.Updates,
    state: BasisState | None = None,
    *trees: Any,
) -> Chosen:
    """Trees of f(frame, started, stored, *others), or of f(frame) without a state.

    Where there is no subspace they have `nothing`.
    """
    inside = jax.tree.structure(Chosen(0, 0, 0, rule.storage.like))
    leaves, structure = jax.tree.flatten(frames)
    rows: list[tuple[Any, ...]] = [()] * len(leaves)
    if state is not None:
        stored = each_stored(rule, structure, state.basis)
        started, *others = map(structure.flatten_up_to, (state.started, *trees))
        rows = [*zip(started, stored, *others, strict=True)]

    def one(leaf: Any, row: tuple[Any, ...]) -> Chosen:
        if not is_frame(leaf) or leaf.full_rank:
            return inside.unflatten([nothing() for _ in range(inside.num_leaves)])
        return f(leaf, *row)

    return in_turn(structure, inside, [*map(one, leaves, rows)])


def each_stored(rule: Rule, structure: Any, basis: Any) -> list[Any]:
    """What is kept of each leaf's basis, in a list."""
    return each_apart(structure, jax.tree.structure(rule.storage.like), basis)


def with_bases(
    rule: Rule, frames: optax.Updates, old: Any, new: Any, chosen: Chosen
) -> optax.Updates:
    """The Frames with their bases set."""
    leaves, structure = jax.tree.flatten(frames)
    rows = zip(
        leaves,
        each_stored(rule, structure, old),
        each_stored(rule, structure, new),
        structure.flatten_up_to(chosen.rotation),
        structure.flatten_up_to(chosen.refreshed),
        strict=True,
    )
    return structure.unflatten(
        frame
        if not is_frame(frame) or frame.full_rank
        else frame.replace(
            previous=replicated(rule.storage.unpack(frame, before)),
            basis=replicated(rule.storage.unpack(frame, after)),
            rotation=rotation,
            refreshed=refreshed,
            orthonormal=rule.orthonormal,
            batched=is_batched(rule, frame),
        )
        for frame, before, after, rotation, refreshed in rows
    )


def unmoved(frame: Frame, started: jax.Array, stored: Any) -> Chosen:
    return Chosen(started, frame.no_rotation(), jnp.zeros(frame.batch, bool), stored)


def rotation_between(new: jax.Array, old: jax.Array, dtype: DTypeLike) -> jax.Array:
    """S_t^T S_{t-1}, (*batch, r, r)."""
    if are_coordinates(new):
        return (new[..., :, None] == old[..., None, :]).astype(dtype)
    return jnp.matmul(transpose(new), old, precision="highest")


def starts(rule: Rule, frames: optax.Updates | Frame, started: Any) -> jax.Array:
    """() bool: whether a matrix has its first gradient that is not zero."""
    if not rule.from_gradient:
        return jnp.array(False)
    started = map_frames(
        lambda _, b: b, frames, started, plain=lambda *_: jnp.array(True)
    )

    def look() -> jax.Array:
        new = map_frames(
            lambda f, b: jnp.any(~b & f.nonzero()), frames, started, plain=nothing
        )
        return jnp.any(jnp.stack(jax.tree.leaves(new)))

    # Gradients are looked at only until all have started.
    all_started = jnp.all(jnp.stack([jnp.all(b) for b in jax.tree.leaves(started)]))
    return jax.lax.cond(all_started, lambda: jnp.array(False), look)


def choose_anew(
    rule: Rule,
    frame: Frame,
    started: jax.Array,
    stored: Any,
    key: jax.Array | None,
    now: Clock,
    due: bool | jax.Array,
) -> Chosen:
    """The basis of one leaf, for those of its matrices that are due or just begin."""
    pack, unpack, _ = rule.storage
    now_started = started | frame.nonzero() if rule.from_gradient else started
    refreshed = due | now_started & ~started
    old = unpack(frame, stored)
    s = frame.chosen
    if s is None:
        s = choose(rule, frame, stored, started, key, now)
    new = pack(frame, s)
    # A rule may keep its basis at a refresh; to round it again would move it.
    stays = ~refreshed | jnp.all(s == old, axis=tuple(range(len(frame.batch), s.ndim)))
    new = jax.tree.map(lambda x, y: select(stays, x, y), stored, new)
    # Whole, as everything that uses S: the same bits on every sharding.
    rotation = rotation_between(
        replicated(unpack(frame, new)), replicated(old), frame.gradient.dtype
    )
    return Chosen(
        now_started, select(refreshed, rotation, frame.no_rotation()), refreshed, new
    )
