"""Type aliases."""

from collections.abc import Callable
from typing import Any

import jax
import optax

Key = jax.Array | int
"""A seed, or a typed key."""

Mask = optax.Params | Callable[[optax.Params], Any] | None
"""Which leaves decay, as in `optax.add_decayed_weights`."""

Number = float | jax.Array
"""A number that may be traced: `optax.inject_hyperparams` can schedule it."""

Step = int | jax.Array
"""A number of steps that may be traced."""

Structure = Any
"""A `jax.tree_util.PyTreeDef`, which type checkers do not take for a type."""

Tree = Any
"""A pytree; of arrays where nothing else is said."""
