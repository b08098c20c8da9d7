"""A layer whose backward pass uses its weight gradient and stores no weights."""

from collections.abc import Callable

import jax

from lowrank_optax.core.aliases import Tree

Load = Callable[[Tree], Tree]


def in_backward(
    apply: Callable[..., Tree], load: Load, use: Callable[[jax.Array, Tree, Tree], None]
) -> Callable[..., Tree]:
    """layer(i, layers, x, *inputs) to y, whose backward pass calls `use`.

    `use` gets i, `layers` (whose `params` are references) and the gradient of layer i.
    """

    @jax.custom_vjp
    def layer(index: jax.Array, layers: Tree, x: Tree, *inputs: Tree) -> Tree:
        return apply(load(read(layers.params, index)), x, *inputs)

    def forward(
        index: jax.Array, layers: Tree, x: Tree, *inputs: Tree
    ) -> tuple[Tree, tuple[Tree, ...]]:
        weights = load(read(layers.params, index))
        y, pull = jax.vjp(apply, weights, x, *inputs)
        # The backward pass reads the weights from the references. Residuals that hold
        # them would be a copy of all layers.
        residuals, without = _take_out(pull, weights)
        return y, (index, layers, residuals, jax.tree_util.Partial(without))

    def backward(saved: tuple[Tree, ...], cotangent: Tree) -> tuple[Tree, ...]:
        index, layers, residuals, without = saved
        weights = load(read(layers.params, index))
        gradient, *others = without(residuals, weights)(cotangent)
        use(index, layers, gradient)
        return None, None, *others

    layer.defvjp(forward, backward)
    return layer


def _take_out(pull: Tree, weights: Tree) -> tuple[list[jax.Array], Callable[..., Tree]]:
    """The arrays in a pullback that are not weights, and how to restore it."""
    saved, structure = jax.tree.flatten(pull)
    places = {id(w): i for i, w in enumerate(jax.tree.leaves(weights))}
    where = [places.get(id(x)) for x in saved]
    residuals = [x for x, i in zip(saved, where, strict=True) if i is None]

    def put_in(residuals: list[jax.Array], weights: Tree) -> Tree:
        rest, leaves = iter(residuals), jax.tree.leaves(weights)
        return structure.unflatten(
            next(rest) if i is None else leaves[i] for i in where
        )

    return residuals, put_in


def read(tree: Tree, index: jax.Array | int) -> Tree:
    """Reads one layer from a tree of arrays or references."""
    return jax.tree.map(lambda x: x[index], tree)


def write(refs: Tree, index: jax.Array, values: Tree) -> None:
    def put(ref: Tree, value: jax.Array) -> None:
        ref[index] = value

    jax.tree.map(put, refs, values)
