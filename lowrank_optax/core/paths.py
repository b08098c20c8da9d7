"""The paths of a tree's leaves, the same in every kind of container."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import jax

from lowrank_optax.core.aliases import Tree

IsLeaf = Callable[[Any], bool]


def path_of(keys: jax.tree_util.KeyPath) -> str:
    """A leaf's path as rules see it: "layers/mlp/up/kernel"."""
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def unboxed(tree: Tree) -> Tree:
    """The tree with arrays in place of Flax's boxes: `nnx.Variable`, `nn.Partitioned`.

    A box has its array in a field `value`, which is no part of the parameter's name:
    `flax.nnx.Optimizer` passes boxes to `init`, and their arrays to `update`.
    """
    return jax.tree.map(_content, tree, is_leaf=_is_box)


def boxed(tree: Tree, like: Tree) -> Tree:
    """The inverse of `unboxed`: the leaves of a tree in the boxes of `like`."""
    return jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(tree))


def with_paths(tree: Tree, is_leaf: IsLeaf | None = None) -> list[tuple[str, Any]]:
    """The leaves with their paths."""
    rows = jax.tree_util.tree_leaves_with_path(unboxed(tree), is_leaf)
    return [(path_of(keys), leaf) for keys, leaf in rows]


def by_path(tree: Tree) -> dict[str, Any]:
    """The leaves by their paths; ValueError where two have the same one."""
    rows = with_paths(tree)
    leaves = dict(rows)
    if len(leaves) < len(rows):
        counts = Counter(path for path, _ in rows)
        twice = [path for path, count in counts.items() if count > 1]
        raise ValueError(
            f"two parameters have the path {twice[0]}, which selects rules and random "
            "keys; rename one of them"
        )
    return leaves


def map_with_paths(
    f: Callable[..., Tree], tree: Tree, *rest: Tree, is_leaf: IsLeaf | None = None
) -> Tree:
    """`jax.tree.map` of f(path, leaf, ...); a box comes back with the new content."""

    def one(keys: jax.tree_util.KeyPath, x: Tree, *others: Tree) -> Tree:
        new = f(path_of(keys), _content(x), *map(_content, others))
        if not _is_box(x):
            return new
        return jax.tree.structure(x, is_leaf=lambda y: y is not x).unflatten([new])

    def ends(x: object) -> bool:
        return _is_box(x) or (is_leaf is not None and is_leaf(x))

    return jax.tree_util.tree_map_with_path(one, tree, *rest, is_leaf=ends)


def _content(x: Tree) -> Tree:
    """The content of a box; x itself if it is none."""
    if not _is_box(x):
        return x
    (content,) = jax.tree.leaves(x, is_leaf=lambda y: y is not x)
    return content


def _is_box(x: object) -> bool:
    """Whether x is one of Flax's boxes, told by name, since Flax is not imported."""
    boxes = {"Variable", "AxisMetadata"}
    return any(
        c.__name__ in boxes and c.__module__.split(".")[0] == "flax"
        for c in type(x).__mro__
    )
