"""Whether a state fits the parameters, the rank and the stages."""

from collections.abc import Callable

import jax
import numpy as np
import optax

from lowrank_optax.core.aliases import Tree
from lowrank_optax.core.paths import with_paths


def check_state(
    state: optax.OptState, expected: Callable[[], Tree], known: set[object]
) -> None:
    """ValueError that names the first array of a state that has another shape.

    JAX broadcasts some shapes that do not fit, and would train something else.

    Args:
      state: the state.
      expected: makes a state that fits, for its shapes alone.
      known: what was checked before; an update that is not jitted asks at every step.
    """
    found = _shapes(state)
    key = tuple(found.items())
    if key in known:
        return
    wanted = _shapes(jax.eval_shape(expected))
    for path in [*wanted, *found]:
        if found.get(path) != wanted.get(path):
            raise ValueError(
                f"the optimizer's state does not fit these parameters: {path} has "
                f"{_said(found, path)}, and needs {_said(wanted, path)}; restore a "
                "state of the same rank, method and parameters, or begin with "
                "tx.init(params)"
            )
    known.add(key)


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
