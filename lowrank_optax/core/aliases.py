"""Type aliases."""

from collections.abc import Callable
from typing import Any

import jax
import optax

Mask = optax.Params | Callable[[optax.Params], Any] | None
"""Which leaves decay, as in `optax.add_decayed_weights`."""

Number = float | jax.Array

Tree = Any
"""A pytree; of arrays where nothing else is said."""
