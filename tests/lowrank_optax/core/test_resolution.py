"""A residual of rounding size."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from tests.helpers.stages import M, N, chain_of, normal, run


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("noise", [0.0, 1e-7, 1e-5])
def test_a_first_gradient_of_low_rank_does_not_hold_the_residual_back(
    dtype: str, noise: float
) -> None:
    """The limiter let it grow from rounding, 1 % a step: 300 steps late."""
    with jax.enable_x64(dtype == "float64"):
        low = normal(M, 3) @ normal(3, N, seed=1)
        first = jnp.asarray(low + noise * normal(M, N, seed=2), dtype)
        grads = [{"w": first}] + [
            {"w": jnp.asarray(normal(M, N, seed=s), dtype)} for s in (3, 4)
        ]
        tx = lro.low_rank(
            chain_of(back=lro.recover_residual()), rank=3, refresh_every=100
        )
        updates, states = run(tx, grads)
        s = np.float64(optax.tree.get(states[0], "basis")["w"])
        outside = np.float64(updates[1]["w"]) - s @ (s.T @ np.float64(updates[1]["w"]))
    if dtype == "float64" and noise:  # that is no rounding there
        assert np.linalg.norm(outside) < 0.1
    else:
        assert np.linalg.norm(outside) > 1.0
