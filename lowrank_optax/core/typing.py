"""Type aliases of the public signatures."""

from collections.abc import Callable
from typing import Any

import jax
import optax

Mask = optax.Params | Callable[[optax.Params], Any] | None


Number = float | jax.Array
