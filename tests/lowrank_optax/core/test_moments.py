"""Which optimizer states have moments that can be rotated."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from tests.helpers.stages import M, N, chain_of, normal, run


@pytest.mark.parametrize(
    "inner",
    [optax.scale_by_adamax(), optax.scale_by_yogi(), optax.contrib.scale_by_adopt()],
    ids=["adamax", "yogi", "adopt"],
)
def test_rotation_refuses_what_is_no_average_of_squares(inner: Any) -> None:
    g = {"w": normal(M, N), "b": normal(3)}

    def bracket(step: Any) -> Any:
        return lro.low_rank(chain_of(step=step), rank=3, refresh_every=2)

    init = bracket(lro.rotate_moments(inner)).init
    for make in (init, jax.jit(init), functools.partial(jax.eval_shape, init)):
        with pytest.raises(ValueError, match="no running average of squared gradients"):
            make(g)
    # The advice is good.
    for step in (lro.rotate_moments(inner, moments="first"), lro.in_subspace(inner)):
        updates, _ = run(bracket(step), [g] * 4)
        assert np.isfinite(updates[-1]["w"]).all()


@pytest.mark.parametrize(
    "inner",
    [
        optax.scale_by_adam(),
        optax.scale_by_adam(0.0, 0.0),
        optax.scale_by_adam(nesterov=True, mu_dtype=jnp.bfloat16),
        optax.scale_by_radam(),
        lro.steps.per_matrix(optax.scale_by_adam()),
        lro.quantize_moments(optax.scale_by_adam(), min_size=1),
        optax.inject_hyperparams(optax.scale_by_adam)(b2=optax.constant_schedule(0.99)),
    ],
    ids=["adam", "b2 = 0", "nadam", "radam", "per_matrix", "8 bits", "injected"],
)
def test_rotation_takes_what_is_one(inner: Any) -> None:
    tx = lro.low_rank(chain_of(step=lro.rotate_moments(inner)), rank=3, refresh_every=2)
    updates, _ = run(tx, [{"w": normal(M, N, seed=s)} for s in range(4)])
    assert np.isfinite(updates[-1]["w"]).all()


def test_rotation_takes_decay_rates_that_are_traced() -> None:
    """They are known when the program runs, and not looked at."""

    def updates_at(b2: Any) -> list[Any]:
        step = lro.rotate_moments(optax.scale_by_adam(b2=b2))
        tx = lro.low_rank(chain_of(step=step), rank=3, refresh_every=1)
        g = {"w": jnp.asarray(normal(M, N))}
        first, state = tx.update(g, tx.init(g))
        return [first, tx.update(g, state)[0]]

    ours, theirs = jax.jit(updates_at)(0.9), updates_at(0.9)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4), ours, theirs)


def test_eq_8_goes_by_the_decay_rates_of_now() -> None:
    """A b2 changed by hand in inject_hyperparams' state was not seen."""
    grads = [{"w": normal(M, N, seed=s)} for s in range(5)]
    bases = {"w": jnp.stack([jnp.linalg.qr(normal(M, 3, seed=s))[0] for s in (1, 2)])}

    def bracket(inner: Any) -> Any:
        step = lro.rotate_moments(inner)
        return lro.low_rank(
            chain_of(basis=lro.bases.replay(bases), step=step), rank=3, refresh_every=4
        )

    # Four steps at b2 = 0.9; the fifth turns V, with 0.99.
    injected = bracket(optax.inject_hyperparams(optax.scale_by_adam)(b2=0.9))
    _, states = run(injected, grads[:4])
    state = optax.tree.set(states[-1], b2=jnp.float32(0.99))
    updates, _ = jax.jit(injected.update)(grads[4], state)
    _, states = run(bracket(optax.scale_by_adam(b2=0.9)), grads[:4])
    expected, _ = jax.jit(bracket(optax.scale_by_adam(b2=0.99)).update)(
        grads[4], states[-1]
    )
    # inject_hyperparams keeps 0.99 in float32: 1 - b2 to 1e-6.
    np.testing.assert_allclose(updates["w"], expected["w"], rtol=1e-5, atol=1e-6)
