"""When: bases of the matrices whose turn has come, one at a time."""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from lowrank_optax.bases.batching import Request
from lowrank_optax.bases.refresh import Chosen, Refresh, choose_anew, unmoved
from lowrank_optax.bases.rule import Rule
from lowrank_optax.core.aliases import Tree
from lowrank_optax.core.due import Rows, replace_due
from lowrank_optax.core.frame import Frame, rotation_between
from lowrank_optax.core.linalg import select
from lowrank_optax.core.spread import on_every_device, replicated
from lowrank_optax.core.stage import Clock
from lowrank_optax.core.trees import frames_of


def takes_turns(rule: Rule, frames: Tree) -> bool:
    """Whether each matrix has its own step in the interval, for a rule that refreshes.

    `low_rank(stagger=True)` and `adaptive_refresh` set the Frames' `due`.
    """
    return not rule.once and any(frame.due is not None for frame in frames_of(frames))


def chosen_in_turn(step: Refresh, key: jax.Array | None) -> Chosen:
    """The bases of the last step, and new ones for the matrices that are due.

    One matrix after the other, in place: its choice is the same whether the layers
    come stacked, under `jax.vmap` or one by one, and on any mesh.
    """
    if step.rule.by_path:  # such a rule looks its bases up, for all matrices of a leaf
        request = Request(step.rule, key, step.now)
        return step.each(partial(choose_anew, request, False))
    fs: list[Callable[..., Chosen]] = []
    rows: list[Rows] = []

    def ask(frame: Frame, started: jax.Array, stored: Tree) -> Chosen:
        fs.append(partial(_choose_one, step.rule, frame))
        rows.append(_rows(frame, started, stored))
        return unmoved(frame, started, stored)

    step.each(ask)
    common = {"key": key, "step": step.now.step, "cycle": step.now.cycle}
    done = iter(replace_due(fs, rows, common))

    def answer(frame: Frame, _: jax.Array, stored: Tree) -> Chosen:
        new = jax.tree.map(lambda x: x.reshape(*frame.batch, *x.shape[1:]), next(done))
        return new._replace(rotation=_rotation(step.rule, frame, stored, new))

    return step.each(answer)


def _rotation(rule: Rule, frame: Frame, stored: Tree, new: Chosen) -> jax.Array:
    """S_t^T S_{t-1} of all matrices of a leaf.

    `rotate_moments` computes its own of those that are due; without another reader the
    compiler drops these.
    """
    s, old = (replicated(rule.storage.unpack(frame, x)) for x in (new.stored, stored))
    rotation = rotation_between(s, old, frame.gradient.dtype)
    return select(new.refreshed, rotation, frame.no_rotation())


def _rows(frame: Frame, started: jax.Array, stored: Tree) -> Rows:
    """A leaf's matrices, with one batch axis."""
    count = math.prod(frame.batch)

    def flat(x: jax.Array) -> jax.Array:
        return x.reshape(count, *x.shape[len(frame.batch) :])

    read = {
        # As it is stored, or the loop would get a transposed copy of all layers.
        "gradient": frame.as_stored(frame.gradient),
        "momentum": frame.momentum,
        "tracked": frame.tracked,
        "chosen": frame.chosen,
    }
    read = {name: flat(x) for name, x in read.items() if x is not None}
    if frame.batch or frame.layer is not None:
        first = 0 if frame.layer is None else frame.layer * count
        read["layer"] = first + jnp.arange(count)
    due = jnp.zeros(frame.batch, bool) if frame.due is None else frame.due
    old = unmoved(frame, started, stored)._replace(rotation=())
    return Rows(flat(due), jax.tree.map(flat, old), read)


def _choose_one(
    rule: Rule, leaf: Frame, old: Chosen, read: dict[str, jax.Array], common: Tree
) -> Chosen:
    """The new basis of one matrix of a leaf."""

    def choose(each: tuple[Chosen, dict[str, jax.Array], Tree]) -> Chosen:
        old, read, common = each
        frame = leaf.replace(
            gradient=leaf.as_stored(read["gradient"]),
            momentum=read.get("momentum"),
            tracked=read.get("tracked"),
            chosen=read.get("chosen"),
            # Its random key comes from its number among the leaf's matrices.
            layer=read.get("layer"),
            due=None,
        )
        now = Clock(common["step"], refresh=True, cycle=common["cycle"])
        request = Request(rule, common["key"], now)
        new = choose_anew(request, True, frame, old.started, old.stored)
        return new._replace(rotation=())

    return on_every_device(choose, (old, read, common))
