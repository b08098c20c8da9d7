"""The optimizer's update without a model, ready to be timed."""

import time
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from models import LlamaConfig, init_params
from train.engine.optimizer import Optimizer, Tree
from train.engine.timing import Steps


class Update(NamedTuple):
    """Steps of the update and its addition to the weights, on random gradients.

    Attributes:
      steps: the steps.
      compile_s: seconds to compile them.
      temporaries: bytes that live during a step of the first kind alone, without the
        gradients.
    """

    steps: Steps
    compile_s: float
    temporaries: int


def update_alone(
    optimizer: Optimizer, model: LlamaConfig, kinds: Sequence[bool]
) -> Update:
    """Compiles an update and draws what it needs."""
    tx = optimizer.tx
    draw = jax.jit(partial(init_params, model))
    params, grads = map(draw, jax.random.split(jax.random.key(0)))
    state = jax.jit(tx.init)(params)

    def update(
        params: Tree, state: Tree, grads: Tree, *, refresh: bool
    ) -> tuple[Tree, Tree]:
        accept = jnp.bool_(True)
        updates, state = tx.update(grads, state, params, refresh=refresh, accept=accept)
        return optax.apply_updates(params, updates), state

    start = time.perf_counter()
    compiled = {
        refresh: jax.jit(partial(update, refresh=refresh), donate_argnums=(0, 1))
        .lower(params, state, grads)
        .compile()
        for refresh in kinds
    }
    compile_s = time.perf_counter() - start

    def take(refresh: bool) -> object:
        nonlocal params, state
        params, state = compiled[refresh](params, state, grads)
        return params

    memory: Any = compiled[kinds[0]].memory_analysis()
    steps = Steps(take, list(kinds), optimizer.refresh_every)
    return Update(steps, compile_s, memory.temp_size_in_bytes if memory else 0)
