"""Rows that are due, replaced one by one in a loop that `jax.vmap` does not batch."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from lowrank_optax.core.aliases import Tree
from lowrank_optax.core.loops import in_groups, merged, opened


class Rows(NamedTuple):
    """The rows of one leaf, its matrices; all arrays have them along their first axis.

    Attributes:
      due: (L,) bool, which rows are replaced.
      replaced: a tree of arrays (L, ...).
      read: a tree of arrays (L, ...), what a new row is computed from.
    """

    due: jax.Array
    replaced: Tree
    read: Tree


def replace_due(
    fs: Sequence[Callable[..., Tree]], leaves: Sequence[Rows], common: Tree = ()
) -> list[Tree]:
    """`replaced` of each leaf, with row i <- f(row i, what is read of it) where due.

        while any row is due:  i = the first;  row i <- f(row i, read row i, common)

    A loop whose length the device decides: it costs nothing for rows that are not due,
    and works in place. `jax.vmap` would run it for all of its batch as often as for the
    one with most rows; here it runs one loop over the rows of all.

    Args:
      fs: of each leaf, f(replaced, read, common) to the new row; may close over arrays.
      leaves: the leaves' rows.
      common: a tree of arrays that every f gets.

    Example:
      >>> rows = Rows(jnp.array([False, True]), jnp.zeros(2), jnp.ones(2))
      >>> replace_due([lambda x, y, _: x + y], [rows])[0].tolist()
      [0.0, 1.0]
    """
    if not leaves:
        return []
    # What f closes over may be batched, so it is passed by the side of `common`.
    pairs = [
        opened(f, _row(x.replaced, 0), _row(x.read, 0), common)
        for f, x in zip(fs, leaves, strict=True)
    ]
    calls = [f for f, _ in pairs]
    shared = common, [closed_over for _, closed_over in pairs]
    shared = jax.tree.map(lambda x: jnp.asarray(x)[None], shared)

    @custom_vmap
    def run(leaves: list[Rows], shared: Tree) -> list[Tree]:
        return _loops(calls, leaves, *shared)

    @run.def_vmap
    def _(size: int, batched: Tree, leaves: list[Rows], shared: Tree) -> Tree:
        flat = jax.tree.map(lambda x, b: merged(x, size, b), leaves, batched[0])
        own = jax.tree.map(lambda x, b: in_groups(x, size, b), shared, batched[1])
        new = jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), run(flat, own))
        return new, jax.tree.map(lambda _: True, new)

    return run(list(leaves), shared)


def _loops(
    fs: list[Callable[..., Tree]],
    leaves: list[Rows],
    common: Tree,
    closed_over: list[Tree],
) -> list[Tree]:
    def of_leaf(f: Callable[..., Tree], rows: Rows, own: Tree, state: Tree) -> Tree:
        def one(state: tuple[jax.Array, Tree]) -> tuple[jax.Array, Tree]:
            left, replaced = state
            i = jnp.argmax(left)
            group, more = jax.tree.map(lambda x: x[i * len(x) // len(left)], own)
            new = f(_row(replaced, i), _row(rows.read, i), group, more)
            put = jax.tree.map(lambda x, y: x.at[i].set(y), replaced, new)
            return left.at[i].set(False), put

        return jax.lax.while_loop(lambda state: jnp.any(state[0]), one, state)

    def all_leaves(states: list[Tree]) -> list[Tree]:
        rows = zip(fs, leaves, closed_over, states, strict=True)
        return [of_leaf(f, x, (common, own), state) for f, x, own, state in rows]

    def any_left(states: list[Tree]) -> jax.Array:
        return jnp.any(jnp.concatenate([left for left, _ in states]))

    # The host waits for a loop's test. The outer loop is one test for all leaves, where
    # nothing is due; it runs once where something is.
    states = [(x.due, x.replaced) for x in leaves]
    done = jax.lax.while_loop(any_left, all_leaves, states)
    return [replaced for _, replaced in done]


def _row(tree: Tree, i: jax.Array | int) -> Tree:
    return jax.tree.map(lambda x: x[i], tree)
