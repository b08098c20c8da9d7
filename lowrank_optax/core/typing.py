"""Type aliases of the public signatures."""

from collections.abc import Callable
from typing import Any

import jax
import optax

Key = jax.Array | int
"""A seed, or a typed key."""

Mask = optax.Params | Callable[[optax.Params], Any] | None

Number = float | jax.Array
"""A number that may be traced: `optax.inject_hyperparams` can schedule it."""

Step = int | jax.Array
"""A number of steps that may be traced."""
