"""A chain of stages to put one's own into, on a small matrix."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lowrank_optax as lro

M, N = 8, 64


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Any:
    x = np.random.default_rng(seed).normal(size=shape) * scale
    return jnp.asarray(x, jnp.float32)


def chain_of(*, basis: Any = None, step: Any = None, back: Any = None) -> Any:
    return optax.chain(
        basis or lro.dominant_svd(),
        lro.project(),
        step or lro.in_subspace(optax.scale_by_adam()),
        back or lro.project_back(),
    )


def run(tx: Any, grads: list[Any], params: Any = None) -> tuple[list[Any], list[Any]]:
    """The updates and the states of each step."""
    state, update, out, states = tx.init(grads[0]), jax.jit(tx.update), [], []
    for g in grads:
        u, state = update(g, state, g if params is None else params)
        out.append(u)
        states.append(state)
    return out, states


def length(x: Any) -> float:
    return float(jnp.linalg.norm(x))
