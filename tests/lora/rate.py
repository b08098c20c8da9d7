"""A learning rate that is a number in the state: one program serves all rates."""

import dataclasses
from typing import Any

import jax
import optax

from train.config.config import Config
from train.engine.optimizer import Optimizer

RATE = "step_size"


def unit_rate(run: Config) -> Config:
    """The same run with a peak of 1."""
    optimizer = dataclasses.replace(run.optimizer, learning_rate=1.0)
    return dataclasses.replace(run, optimizer=optimizer)


def scaled_by_rate(optimizer: Optimizer) -> Optimizer:
    """Multiplies the method's steps by a number in its state, 1 at the start.

    Every method's last stage multiplies by the learning rate, decay of weights
    included.
    """
    rate = optax.inject_hyperparams(optax.scale)(**{RATE: 1.0})
    return dataclasses.replace(optimizer, method=optax.chain(optimizer.method, rate))


def with_rate(state: Any, rate: float) -> Any:
    """A first state with another rate than 1; each array stays on its devices."""

    def put(path: jax.tree_util.KeyPath, x: jax.Array) -> jax.Array:
        is_rate = jax.tree_util.keystr(path[-1:], simple=True) == RATE
        return x * rate if is_rate else x

    return jax.tree_util.tree_map_with_path(put, state)
