"""The trees in an optimizer's state that are like the parameters."""

from collections.abc import Callable

import jax
import optax

from lowrank_optax.core.aliases import Tree
from lowrank_optax.core.paths import path_of
from lowrank_optax.core.trees import nothing


def map_like_params(
    f: Callable[[str, jax.Array], Tree],
    inner: optax.GradientTransformation,
    state: optax.OptState,
) -> tuple[Tree, ...]:
    """f(path, array) on the arrays of a state that belong to a parameter.

    Args:
      f: of a parameter's path and an array.
      inner: the transformation whose state it is.
      state: the state.

    Returns:
      One tree for each tree in the state, in its order: `f` in place of the arrays of
      trees that are like the parameters, False in place of all others.
    """
    # optax's way to find these trees: init on a placeholder, and see where it is.
    trees, inside = jax.tree.flatten(inner.init(_PLACEHOLDER), is_leaf=_is_placeholder)
    parts = inside.flatten_up_to(state)

    def of_parameter(keys: jax.tree_util.KeyPath, x: jax.Array) -> Tree:
        return f(path_of(keys), x)

    return tuple(
        jax.tree_util.tree_map_with_path(of_parameter, part)
        if _is_placeholder(tree)
        else jax.tree.map(nothing, part)
        for tree, part in zip(trees, parts, strict=True)
    )


def _placeholder() -> Tree:
    """Returns what `optax.tree_map_params` passes to `init` for the parameters."""
    seen = []
    optax.tree_map_params(lambda tree: seen.append(tree) or tree, lambda x: x, {})
    return seen[0]


_PLACEHOLDER = _placeholder()


def _is_placeholder(x: object) -> bool:
    return isinstance(x, type(_PLACEHOLDER))
