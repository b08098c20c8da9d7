"""The layout and rank that `low_rank` decides for each leaf, and its warning."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import jax
import numpy as np
import optax

from lowrank_optax.core.dimensions import DimensionNumbers, specs_of
from lowrank_optax.core.layout import Layout, layout_of
from lowrank_optax.core.paths import map_with_paths
from lowrank_optax.core.rules import Rank, Square, rank_of, side_of


class Leaf(NamedTuple):
    """The decision for one leaf.

    Attributes:
      path: "layers/mlp/up/kernel".
      shape: of the parameter.
      layout: how it is a matrix; None for full rank, by its rule or its shape.
      rank: r, or 0 without a layout.
    """

    path: str
    shape: tuple[int, ...]
    layout: Layout | None
    rank: int

    @property
    def full_rank(self) -> bool:
        """Whether r = m, so that a matrix has full rank because of its rank."""
        return self.layout is not None and self.rank == self.layout.m


def decide_leaves(
    tree: optax.Params,
    dimension_numbers: DimensionNumbers,
    rank: Rank,
    square: Square,
    *,
    sliced: bool = False,
) -> optax.Params:
    """The tree, which has no boxes, with a `Leaf` in place of each leaf.

    `sliced` says that the layers' axis is gone (`Inside.layer`).
    """
    specs = specs_of(dimension_numbers, tree, sliced=sliced)

    def leaf(path: str, x: jax.Array) -> Leaf:
        shape = np.shape(x)
        if (spec := specs[path]) is not None:
            layout = layout_of(path, shape, spec, side_of(square, path))
            if (r := rank_of(rank, path, layout)) is not None:
                return Leaf(path, shape, layout, r)
        return Leaf(path, shape, None, 0)

    return map_with_paths(leaf, tree)


# Only `init` knows the leaves, and optax may have wrapped it. So memory_report runs it
# and collects the decisions from this variable.
_decided: ContextVar[list[Leaf] | None] = ContextVar("decided", default=None)


@contextmanager
def decisions() -> Iterator[list[Leaf]]:
    """Collects the decisions of every `init` inside the block, without warnings."""
    seen: list[Leaf] = []
    token = _decided.set(seen)
    try:
        yield seen
    finally:
        _decided.reset(token)


def collect(leaves: list[Leaf]) -> bool:
    """Adds the decisions to those of the block of `decisions` around; False outside."""
    if (seen := _decided.get()) is None:
        return False
    seen.extend(leaves)
    return True


def warn_of_full_rank(leaves: list[Leaf]) -> None:
    """Warns where a rank is m or more, or nothing is projected."""
    if collect(leaves):
        return
    if leaves and all(len(x.shape) < 2 for x in leaves):
        warnings.warn(
            "low_rank projects nothing: no parameter has two axes, as after "
            "optax.flatten() or ravel_pytree(); pass the parameters as they are",
            stacklevel=3,
        )
    # A matrix of one row is a vector, and has full rank as one.
    matrices = [x for x in leaves if len(x.shape) > 1 and _rows(x) > 1]
    full_rank = [x for x in matrices if x.full_rank]
    projected = sum(x.layout is not None and not x.full_rank for x in leaves)
    if not matrices or (projected and not full_rank):
        return
    why = [f"{x.path} (rank {x.rank} is all of it)" for x in full_rank[:3]]
    why += [f"{x.path} (by its rule)" for x in matrices if x.layout is None][:3]
    warnings.warn(
        f"low_rank projects {projected} of {len(matrices)} matrices; of full rank are "
        f"{', '.join(why)}{', ...' if len(matrices) - projected > len(why) else ''}. "
        "Lower rank, or change dimension_numbers; lowrank_optax.memory_report(tx, "
        "params) lists every parameter",
        stacklevel=3,
    )


def _rows(leaf: Leaf) -> int:
    return min(leaf.shape) if leaf.layout is None else leaf.layout.m


def is_leaf(x: object) -> bool:
    return isinstance(x, Leaf)
