"""When: one step of a basis rule, on all Frames of a tree."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.bases.batching import Request
from lowrank_optax.bases.rule import AS_IT_IS, BasisState, Rule
from lowrank_optax.core.aliases import Structure, Tree
from lowrank_optax.core.frame import Frame, is_frame, rotation_between
from lowrank_optax.core.linalg import select
from lowrank_optax.core.spread import replicated
from lowrank_optax.core.stage import Clock, both
from lowrank_optax.core.trees import each_apart, in_turn, map_frames, nothing


class Chosen(NamedTuple):
    """The basis of one leaf, or trees of those of all.

    Attributes:
      started: as in `BasisState`.
      rotation: (*batch, r, r), S_t^T S_{t-1}.
      refreshed: (*batch,) bool, whether it was chosen at this step.
      stored: as in `BasisState.basis`.
    """

    started: Tree
    rotation: Tree
    refreshed: Tree
    stored: Tree


@dataclasses.dataclass(frozen=True)
class Refresh:
    """Applies one rule to one tree at one step.

    Attributes:
      rule: the rule.
      frames: a tree of Frames and other leaves.
      state: the rule's state before the step.
      now: the time.
    """

    rule: Rule
    frames: Tree
    state: BasisState
    now: Clock

    @property
    def due(self) -> bool | jax.Array:
        """() bool: whether all matrices are due for a basis."""
        refresh = self.now.refresh
        return both(refresh, self.now.step == 0) if self.rule.once else refresh

    def wanted(self, due: bool | jax.Array) -> bool | jax.Array:
        """() bool: whether any matrix needs a basis; all do if `due`."""
        if isinstance(self.now.refresh, bool):
            return due
        return due | self._starts()

    def unmoved(self) -> Chosen:
        """The bases of the last step."""
        return self.each(unmoved)

    def chosen(self, key: jax.Array | None) -> Chosen:
        """The bases of a refresh with this key."""
        request = Request(self.rule, key, self.now)
        frames = request.in_batches(self.frames, self._stored, self.state.started)
        batched = dataclasses.replace(self, frames=frames)
        return batched.each(partial(choose_anew, request, self.due))

    def each(self, f: Callable[..., Chosen], *trees: Tree) -> Chosen:
        """Trees of f(frame, started, stored, ...) with the leaves of further trees."""
        flatten = jax.tree.structure(self.frames).flatten_up_to
        columns = flatten(self.state.started), self._stored, *map(flatten, trees)
        return on_subspaces(self.rule, f, self.frames, *columns)

    def with_bases(self, chosen: Chosen) -> optax.Updates:
        """The Frames with their bases set."""
        leaves, structure = jax.tree.flatten(self.frames)

        def one(
            frame: Frame,
            old: Tree,
            new: Tree,
            rotation: jax.Array,
            refreshed: jax.Array,
        ) -> Frame:
            if not is_frame(frame) or frame.full_rank:
                return frame
            unpack = self.rule.storage.unpack
            return frame.replace(
                previous=replicated(unpack(frame, old)),
                basis=replicated(unpack(frame, new)),
                rotation=rotation,
                refreshed=refreshed,
                orthonormal=self.rule.orthonormal,
                batched=self.rule.is_batched(frame),
            )

        new = each_stored(self.rule, structure, chosen.stored)
        columns = map(structure.flatten_up_to, (chosen.rotation, chosen.refreshed))
        return structure.unflatten(map(one, leaves, self._stored, new, *columns))

    @property
    def _stored(self) -> list[Tree]:
        structure = jax.tree.structure(self.frames)
        return each_stored(self.rule, structure, self.state.basis)

    def _starts(self) -> jax.Array:
        """() bool: whether a matrix has its first gradient that is not zero."""
        if not self.rule.from_gradient:
            return jnp.array(False)
        started = map_frames(
            lambda _, b: b,
            self.frames,
            self.state.started,
            plain=lambda *_: jnp.array(True),
        )

        def look() -> jax.Array:
            new = map_frames(
                lambda f, b: jnp.any(~b & f.nonzero()),
                self.frames,
                started,
                plain=nothing,
            )
            return jnp.any(jnp.stack(jax.tree.leaves(new)))

        # Gradients are looked at only until all have started.
        all_started = jnp.all(jnp.stack([jnp.all(b) for b in jax.tree.leaves(started)]))
        return jax.lax.cond(all_started, lambda: jnp.array(False), look)


def unmoved(frame: Frame, started: jax.Array, stored: Tree) -> Chosen:
    """The basis of the last step, of one leaf."""
    return Chosen(started, frame.no_rotation(), jnp.zeros(frame.batch, bool), stored)


def choose_anew(
    request: Request,
    due: bool | jax.Array,
    frame: Frame,
    started: jax.Array,
    stored: Tree,
) -> Chosen:
    """The basis of one leaf, new for those of its matrices that are due or start."""
    rule, (pack, unpack, _) = request.rule, request.rule.storage
    now_started = started | frame.nonzero() if rule.from_gradient else started
    refreshed = due | now_started & ~started
    if frame.due is not None:
        refreshed |= frame.due
    old = unpack(frame, stored)
    s = frame.chosen
    if s is None:
        s = request.of_leaf(frame, stored, started)
    stays = ~refreshed
    if rule.storage is not AS_IT_IS:
        # A rule may return the old basis. Packing it again would round it again, and so
        # move it; a matrix whose basis is the same keeps its stored numbers.
        stays |= jnp.all(s == old, axis=tuple(range(len(frame.batch), s.ndim)))
    new = jax.tree.map(lambda x, y: select(stays, x, y), stored, pack(frame, s))
    # The rotation is of the unpacked bases, which are what the moments were taken in;
    # replicated, so that its sums round the same way on every sharding.
    rotation = rotation_between(
        replicated(unpack(frame, new)), replicated(old), frame.gradient.dtype
    )
    return Chosen(
        now_started, select(refreshed, rotation, frame.no_rotation()), refreshed, new
    )


def on_subspaces(
    rule: Rule,
    f: Callable[..., Chosen],
    frames: optax.Updates,
    *columns: Sequence[Tree],
) -> Chosen:
    """Trees of f(frame, ...), with a list of further arguments in each column.

    Leaves without a subspace have `nothing`.
    """
    inside = jax.tree.structure(Chosen(0, 0, 0, rule.storage.like))
    leaves, structure = jax.tree.flatten(frames)

    def one(leaf: Tree, *row: Tree) -> Chosen:
        if not is_frame(leaf) or leaf.full_rank:
            return inside.unflatten([nothing() for _ in range(inside.num_leaves)])
        return f(leaf, *row)

    return in_turn(structure, inside, [*map(one, leaves, *columns)])


def each_stored(rule: Rule, structure: Structure, basis: Tree) -> list[Tree]:
    """The stored basis of each leaf, in a list."""
    return each_apart(structure, jax.tree.structure(rule.storage.like), basis)
