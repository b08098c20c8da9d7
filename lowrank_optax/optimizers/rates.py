"""Learning rates and weight decays: numbers or schedules, and finite ones."""

from __future__ import annotations

import functools
import math
import numbers
import operator

import jax
import jax.numpy as jnp
import numpy as np
import optax


def check_rate(name: str, rate: optax.ScalarOrSchedule) -> None:
    """ValueError unless the argument `name` is a finite number or a schedule."""
    if callable(rate) or isinstance(rate, (jax.Array, np.ndarray)):
        return
    if not isinstance(rate, numbers.Real) or not math.isfinite(rate):
        raise ValueError(
            f"{name}={rate!r}: pass a finite number, or a schedule of the step such as "
            "optax.cosine_decay_schedule(1e-3, 10_000)"
        )


def finite_at(step: jax.Array, *rates: optax.ScalarOrSchedule) -> jax.Array | None:
    """Whether all rates are finite at a step; None where numbers alone say so."""
    traced = [rate for rate in rates if callable(rate) or isinstance(rate, jax.Array)]
    values = (rate(step) if callable(rate) else rate for rate in traced)
    flags = [jnp.all(jnp.isfinite(value)) for value in values]
    return functools.reduce(operator.and_, flags) if flags else None
