"""Step: moments of the matrices whose basis is new, one matrix at a time."""

import math
from collections.abc import Callable
from functools import partial

import jax
import optax

from lowrank_optax.core.aliases import Tree
from lowrank_optax.core.due import Rows, replace_due
from lowrank_optax.core.frame import Frame, ProjectedAway, is_frame, rotation_between
from lowrank_optax.core.spread import replicated


def map_due(
    f: Callable[..., jax.Array],
    frames: optax.Updates,
    now: jax.Array,
    moment: Tree,
    *rest: Tree,
) -> Tree:
    """f(frame, moment, *rest) of each matrix with a new basis; the other moments stay.

    Args:
      f: of one matrix; it reads the Frame's rotation and what all of a leaf share.
      frames: a tree of Frames and other leaves.
      now: () bool, whether any is computed.
      moment: a tree of arrays (*batch, r, n).
      rest: trees of further arrays; of one that is larger than a number for each matrix
        f gets all.
    """
    leaves, structure = jax.tree.flatten(frames)
    columns = [structure.flatten_up_to(tree) for tree in (moment, *rest)]
    out = list(columns[0])
    places = [
        i
        for i, frame in enumerate(leaves)
        if is_frame(frame)
        and not frame.full_rank
        and not isinstance(out[i], optax.MaskedNode)
    ]
    fs, rows = [], []
    for i in places:
        frame, m, *others = leaves[i], *(column[i] for column in columns)
        fs.append(partial(_one, f, frame))
        rows.append(_rows(frame, now, m, *others))
    for i, new in zip(places, replace_due(fs, rows), strict=True):
        out[i] = new.reshape(out[i].shape)
    return structure.unflatten(out)


def _rows(frame: Frame, now: jax.Array, m: jax.Array, *others: jax.Array) -> Rows:
    """A leaf's matrices, with one batch axis."""
    count = math.prod(frame.batch)

    def flat(x: jax.Array) -> jax.Array:
        return x.reshape(count, *x.shape[len(frame.batch) :])

    due = frame.need("refreshed") & now
    read = frame.need("basis"), frame.need("previous"), *others
    return Rows(flat(due), flat(m), jax.tree.map(flat, read))


def _one(
    f: Callable[..., jax.Array],
    leaf: Frame,
    m: jax.Array,
    read: tuple[jax.Array, ...],
    _: Tree,
) -> jax.Array:
    new, old, *others = read
    shape, dtype = leaf.gradient.shape[-2:], leaf.gradient.dtype
    frame = leaf.replace(
        gradient=ProjectedAway(leaf.path, shape, dtype),
        rotation=replicated(rotation_between(new, old, dtype)),
    )
    return f(frame, m, *others).astype(m.dtype)
