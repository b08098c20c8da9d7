"""A fixed basis and gradient, to try ways back to full space on."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lowrank_optax as lro

M, N, R, LIMIT = 8, 12, 3, 1.01
rng = np.random.default_rng(0)
BASIS = np.linalg.qr(rng.normal(size=(M, R)))[0].astype(np.float32)
GRADIENT = rng.normal(size=(M, N)).astype(np.float32)


def bracket(back: Any, inner: Any = None, rule: Any = None) -> Any:
    """A fixed basis, `inner` in it, and a way back."""
    stages = optax.chain(
        rule or lro.bases.replay({"w": BASIS[None]}),
        lro.project(),
        lro.in_subspace(inner or optax.scale_by_adam()),
        back,
    )
    return lro.low_rank(
        stages, rank=R, refresh_every=1000, dimension_numbers=lro.STACKED
    )


def run(tx: Any, gradients: Any) -> Any:
    """Updates and states of a (K, ...) stack of gradients."""

    def step(state: Any, g: Any) -> Any:
        updates, state = tx.update({"w": g}, state)
        return state, (updates["w"], state)

    def scan(gs: Any) -> Any:
        return jax.lax.scan(step, tx.init({"w": gs[0]}), gs)[1]

    return jax.jit(scan)(jnp.asarray(gradients))


def norm_of(state: Any) -> Any:
    return np.asarray(optax.tree.get(state, "norm")["w"])
