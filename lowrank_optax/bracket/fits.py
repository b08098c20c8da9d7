"""Checks that a state fits the parameters, the rank and the stages."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lowrank_optax.core.aliases import Tree
from lowrank_optax.core.paths import map_with_paths, with_paths

Dtypes = dict[str, jnp.dtype]


def fitted(
    state: optax.OptState, expected: Callable[[], Tree], known: dict[object, Dtypes]
) -> optax.OptState:
    """The state; ValueError that names its first array that has another shape.

    JAX broadcasts some shapes that do not fit, and would train something else. A
    wrapper that does arithmetic on states makes integers of bools, and of codes and
    keys wider ones: they come back as they were.

    Args:
      state: the state.
      expected: makes a state that fits, for its shapes and dtypes alone.
      known: what was found before; an update that is not jitted asks at every step.
    """
    found = _shapes(state)
    key = tuple(found.items())
    if key not in known:
        tree = jax.eval_shape(expected)
        wanted = _shapes(tree)
        for path in [*wanted, *found]:
            if found.get(path) != wanted.get(path):
                raise ValueError(
                    f"the optimizer's state does not fit these parameters: {path} has "
                    f"{_said(found, path)}, and needs {_said(wanted, path)}; restore "
                    "a state of the same rank, method and parameters, or begin with "
                    "tx.init(params)"
                )
        known[key] = {path: x.dtype for path, x in with_paths(tree)}

    def as_it_was(path: str, x: jax.Array) -> jax.Array:
        dtype = known[key][path]
        whole = not jnp.issubdtype(dtype, jnp.inexact)
        return x.astype(dtype) if whole and x.dtype != dtype else x

    return map_with_paths(as_it_was, state)


def check_gradient(updates: optax.Updates, params: optax.Params) -> None:
    """ValueError for a gradient of another shape than its parameter's."""
    found, wanted = _shapes(updates), _shapes(params)
    for path in found:
        if found[path] != wanted.get(path, found[path]):
            raise ValueError(
                f"{path}: a gradient of the shape {found[path]} for a parameter of the "
                f"shape {wanted[path]}; pass the gradient of these parameters"
            )


def _shapes(tree: Tree) -> dict[str, tuple[int, ...]]:
    return {path: np.shape(x) for path, x in with_paths(tree)}


def _said(shapes: dict[str, tuple[int, ...]], path: str) -> str:
    return f"the shape {shapes[path]}" if path in shapes else "no array"
