"""Opens a Frame for each matrix leaf, and closes it to an update."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.bracket.finite import at_least_f32
from lowrank_optax.bracket.inside import NOTHING_INSIDE, Inside
from lowrank_optax.bracket.leaf import Leaf, is_leaf
from lowrank_optax.core.aliases import Tree
from lowrank_optax.core.frame import Frame, ProjectedAway, is_frame
from lowrank_optax.core.layout import check_matrix


def open_frames(
    leaves: Tree,
    updates: optax.Updates,
    params: optax.Params | None = None,
    *,
    precision: jax.lax.PrecisionLike,
    inside: Inside = NOTHING_INSIDE,
) -> optax.Updates:
    """The updates with a Frame for each matrix.

    Args:
      leaves: a tree of `Leaf`, the decisions.
      updates: gradients, or S^T G if `inside.low`.
      params: the parameters, read if `inside.low`.
      precision: as in `low_rank`.
      inside: as in `low_rank`.
    """
    opened = functools.partial(_open, precision=precision, inside=inside)
    if inside.low:
        opened = functools.partial(_open_projected, opened)
        return map_leaves(opened, leaves, params, updates)
    return map_leaves(opened, leaves, updates)


def oriented(leaves: Tree, params: optax.Params) -> optax.Params:
    """Arrays in the orientation of the Frames, in float32 or wider."""
    return map_leaves(_oriented, leaves, params)


def close_frames(leaves: Tree, like: optax.Params, out: optax.Updates) -> optax.Updates:
    """The steps of the Frames, in the shapes and dtypes of `like`."""
    return map_leaves(_close, leaves, like, out)


def map_leaves(f: Callable[..., Tree], leaves: Tree, *trees: Tree) -> Tree:
    """`jax.tree.map` over a tree of `Leaf`."""
    return jax.tree.map(f, leaves, *trees, is_leaf=is_leaf)


def _open(
    leaf: Leaf, x: jax.Array, precision: jax.lax.PrecisionLike, inside: Inside
) -> Frame | jax.Array:
    if leaf.layout is None:
        return at_least_f32(x)
    check_matrix(leaf.path, x)
    return Frame(
        gradient=_oriented(leaf, x),
        rank=leaf.rank,
        path=leaf.path,
        columns=leaf.layout.columns,
        transposed=leaf.layout.transposed,
        layer=None if inside.layer is None else jnp.asarray(inside.layer),
        precision=precision,
        given_dtype=x.dtype,
        chosen=inside.bases.get(leaf.path),
    )


def _open_projected(
    opened: Callable[..., Tree], leaf: Leaf, x: jax.Array, low: jax.Array
) -> Frame | jax.Array:
    """The Frame of a parameter x, with S^T G (`low`) and without G.

    The layout of S^T G no longer shows how the leaf is a matrix, so it comes from x.
    """
    if leaf.layout is None:
        return opened(leaf, low)
    like = jax.eval_shape(functools.partial(_oriented, leaf), x)
    # The zeros give the Frame its shape and type; no stage can read them.
    frame = opened(leaf, jnp.zeros_like(x)).replace(
        gradient=ProjectedAway(leaf.path, like.shape, like.dtype),
        given_dtype=low.dtype,
    )
    if low.shape != frame.low_shape:
        raise ValueError(
            f"{leaf.path}: the projected gradient has the shape {low.shape}, and S^T G "
            f"{frame.low_shape}; pass what project_gradient() returned"
        )
    return frame.replace(low=at_least_f32(low))


def _oriented(leaf: Leaf, x: jax.Array) -> jax.Array:
    return at_least_f32(x if leaf.layout is None else leaf.layout.to_matrix(x))


def _close(leaf: Leaf, x: jax.Array, out: Frame | jax.Array) -> jax.Array:
    if leaf.layout is None:
        return jnp.asarray(out).astype(x.dtype)
    if not is_frame(out):
        raise TypeError(
            f"{leaf.path}: a stage returned {type(out).__name__} in place of its "
            "Frame; return frame.replace(...)"
        )
    step = out.need("step")
    return leaf.layout.from_matrix(step).astype(x.dtype)
