"""The extra argument by which layer-wise code reaches the `low_rank` inside a chain."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

from lowrank_optax.core.aliases import Tree
from lowrank_optax.core.sharding import on_auto_axes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Inside:
    """The extra argument `inside` of `low_rank(...).update`, for code of this package.

    An extra argument passes through `optax.chain`, `optax.masked` and the like, which
    a method of the transformation would not.

    Attributes:
      layer: which layer of a stack the parameters are, for its random keys; None where
        all layers are there.
      layers: how many layers that stack has.
      bases: bases that were chosen before the update, by path.
      low: whether the updates are S^T G already.
      record: called with the tree of Frames after the stages; leaves without a Frame
        are gradients.
    """

    layer: int | jax.Array | None = None
    layers: int | None = dataclasses.field(default=None, metadata={"static": True})
    bases: Mapping[str, jax.Array] = dataclasses.field(
        default_factory=dict[str, jax.Array]
    )
    low: bool = dataclasses.field(default=False, metadata={"static": True})
    record: Callable[[optax.Updates], None] | None = dataclasses.field(
        default=None, metadata={"static": True}
    )

    def replace(self, **changes: Any) -> "Inside":
        return dataclasses.replace(self, **changes)


NOTHING_INSIDE = Inside()


def auto_update(update: Callable[..., tuple[Tree, Tree]]) -> Callable[..., Tree]:
    """A transformation's `update`, `on_auto_axes`."""

    def on_any_mesh(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        *,
        inside: Inside = NOTHING_INSIDE,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        # S^T G has not the shape of the update that is made of it.
        like = params if inside.low else updates
        return on_auto_axes(
            update,
            *(updates, state, params),
            like=(like, state),
            inside=inside,
            **extra_args,
        )

    return on_any_mesh
