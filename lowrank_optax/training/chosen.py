"""Which layers of a stack choose their bases in one call at a refresh."""

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.extend.core import get_opaque_trace_state

from lowrank_optax.bracket.inside import Inside
from lowrank_optax.core.aliases import Tree
from lowrank_optax.core.checks import transformation
from lowrank_optax.core.frame import Frame
from lowrank_optax.core.spread import over_devices, spreads
from lowrank_optax.core.trees import count_of, frames_of
from lowrank_optax.training.backward import Load

trace_level = partial(get_opaque_trace_state, convention="nnx")


class ChosenBases(NamedTuple):
    """Bases of all layers that were chosen before the update.

    Attributes:
      by_path: (L, m, r) each.
      complete: whether the update chooses no others, or those in a batch.
    """

    by_path: dict[str, jax.Array]
    complete: bool


def updates_together(extra_args: Mapping[str, object], bases: ChosenBases) -> bool:
    """Whether layers may be updated in a batch: no basis is chosen one by one there."""
    return extra_args.get("refresh") is False or bases.complete


def chosen_together(
    tx: optax.GradientTransformation,
    gradient: optax.Updates,
    state: optax.OptState,
    params: optax.Params | None,
    extra_args: Mapping[str, object],
    inside: Inside,
    load: Load = lambda params: params,
) -> ChosenBases:
    """At a refresh the bases that are best chosen for all layers in one call.

    None where every rule is `batched`: a block of layers then chooses its own in one
    call. On a mesh all bases are chosen here, and each device chooses some layers'.
    """
    if inside.bases:
        return ChosenBases(dict(inside.bases), complete=spreads())
    if extra_args.get("refresh") is not True:
        return ChosenBases({}, complete=False)
    inner = transformation("update_layers()", tx, "lowrank_optax.galore(0.01)")
    layers = jnp.arange(count_of(gradient)), gradient, state, params

    # Only `tx` knows where its basis rule stands, so its whole update is traced; under
    # jit the compiler drops all that the bases do not need.
    def subspaces(layer: Tree) -> list[tuple[Frame, bool]]:
        """The Frames of one layer, and whether their arrays can be taken from there."""
        (i, g, s, stored), seen, level = layer, [], trace_level()

        def record(frames: optax.Updates) -> None:
            # A wrapper may update in a conditional, whose arrays stay in it.
            here = trace_level() == level
            found = (f for f in frames_of(frames) if not f.full_rank and not f.folded)
            seen.extend((f, here) for f in found)

        own = inside.replace(layer=i, record=record)
        inner.update(g, s, load(stored), inside=own, **extra_args)
        return seen

    def of_one(layer: Tree, *, batched: bool) -> dict[str, Tree]:
        found = (f for f, here in subspaces(layer) if here and f.refreshed is not None)
        return {f.path: f.basis for f in found if f.batched == batched}

    def is_batched(layers: Tree) -> dict[str, Tree]:
        return jax.vmap(partial(of_one, batched=True))(layers)

    def all_of_some(layers: Tree, _: Tree) -> dict[str, Tree]:
        in_turn = jax.lax.map(partial(of_one, batched=False), layers)
        return is_batched(layers) | in_turn

    if spreads():
        found = over_devices(all_of_some, layers)
        return ChosenBases(found, complete=bool(found))
    joined: list[bool] = []

    def look(layers: Tree) -> None:
        first = jax.tree.map(lambda x: x[0], layers)
        joined.extend(
            f.refreshed is not None and f.batched for f, _ in subspaces(first)
        )

    jax.eval_shape(look, layers)
    if all(joined):  # each block chooses them in one call
        return ChosenBases({}, complete=bool(joined))
    return ChosenBases(is_batched(layers) if any(joined) else {}, complete=False)
