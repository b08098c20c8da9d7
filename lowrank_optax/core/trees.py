"""Trees of Frames and plain leaves."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.core.aliases import Structure, Tree
from lowrank_optax.core.frame import Frame, is_frame


def map_frames(
    f: Callable[..., Tree],
    tree: optax.Updates | Frame,
    *rest: Tree,
    plain: Callable[..., Tree] = lambda leaf, *_: leaf,
) -> Tree:
    """`jax.tree.map` with `f` on Frames and `plain` (the identity) on other leaves.

    Example:
      >>> negate = optax.stateless(lambda frames, params: lro.stages.map_frames(
      ...     lambda frame: frame.replace(low_step=-frame.low_step), frames))
    """
    return jax.tree.map(
        lambda x, *xs: f(x, *xs) if is_frame(x) else plain(x, *xs), tree, *rest
    )


def map_subspaces(
    f: Callable[..., Tree],
    tree: optax.Updates,
    *rest: Tree,
    other: Callable[..., Tree] = lambda leaf, *_: leaf,
) -> Tree:
    """`map_frames` with `f` on Frames below full rank, `other` on all other leaves."""

    def one(frame: Frame, *xs: Tree) -> Tree:
        return other(frame, *xs) if frame.full_rank else f(frame, *xs)

    return map_frames(one, tree, *rest, plain=other)


def nothing(*_: Tree) -> jax.Array:
    """The state of a leaf that needs none: () bool, False.

    An array instead of an `optax.MaskedNode`, so that every tree in the state has one
    array for each parameter, which `flax.nnx.Optimizer` needs, and
    `optax.tree_map_params` with further trees.
    """
    return jnp.zeros([], jnp.bool_)


def frames_of(tree: optax.Updates) -> list[Frame]:
    """The Frames of a tree, in its order."""
    return [x for x in jax.tree.leaves(tree) if is_frame(x)]


def update_frames(
    f: Callable[..., tuple[Tree, ...]], tree: optax.Updates, *states: optax.OptState
) -> tuple[Tree, ...]:
    """`f(frame, its states...) -> (frame, states...)` on every Frame.

    As many trees come back as went in. Other leaves and their states stay.

    Example:
      >>> def shrink(frame, factor):  # the body of a stage's update, with its state
      ...     return frame.replace(low_step=factor * frame.low_step), factor / 2
      >>> lro.stages.update_frames(shrink, {"bias": jnp.ones(2)}, {"bias": False})[1]
      {'bias': False}
    """
    leaves, structure = jax.tree.flatten(tree)
    columns = leaves, *map(structure.flatten_up_to, states)
    rows = [f(*row) if is_frame(row[0]) else row for row in zip(*columns, strict=True)]
    return tuple(
        structure.unflatten([row[i] for row in rows]) for i in range(len(columns))
    )


def in_turn(structure: Structure, inside: Structure, parts: list[Tree]) -> Tree:
    """A tree of structure `inside` whose leaves are trees of structure `structure`.

    Transposes a list of trees of structure `inside`, one for each leaf of `structure`.
    """
    rows = [inside.flatten_up_to(part) for part in parts]
    return inside.unflatten(
        structure.unflatten([row[i] for row in rows]) for i in range(inside.num_leaves)
    )


def each_apart(
    structure: Structure, inside: Structure, tree: optax.OptState
) -> list[Tree]:
    """The inverse of `in_turn`: the tree of structure `inside` of each leaf."""
    columns = map(structure.flatten_up_to, inside.flatten_up_to(tree))
    rows = zip(*columns, strict=True) if inside.num_leaves else ()
    return [inside.unflatten(row) for row in rows] or [
        inside.unflatten([]) for _ in range(structure.num_leaves)
    ]


def squared_norm(tree: Tree) -> jax.Array:
    """The sum of the squares of all entries, () float32, summed in float32."""
    leaves = (x.astype(jnp.float32) for x in jax.tree.leaves(tree))
    return sum((jnp.sum(jnp.square(x)) for x in leaves), jnp.float32(0))


def count_of(tree: Tree) -> int:
    """The number of layers; ValueError where leaves differ in it."""
    counts = {x.shape[:1] for x in jax.tree.leaves(tree)}
    if len(counts) != 1 or () in counts:
        raise ValueError(
            "all leaves of stacked layers need the same first axis, the layers; found "
            f"{sorted(counts)}; move other leaves out of this tree"
        )
    ((count,),) = counts
    return count
