"""Gradients without spikes, as a stage and in front of any optimizer; restarts."""

import itertools
import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro

RULES: Any = [("kernel", lro.STACKED), ("", None)]
GALORE = {"rank": 2, "refresh_every": 2, "dimension_numbers": RULES}


def stabilize() -> Any:
    return lro.full_rank.stabilize_gradient(dimension_numbers=RULES)


def tree(seed: int) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    shapes = {"up": (2, 4, 6), "down": (2, 6, 4), "norm": (2, 4)}
    leaves = {k: random.normal(size=s).astype(np.float32) for k, s in shapes.items()}
    return {k: {"kernel" if k != "norm" else "scale": x} for k, x in leaves.items()}


def steps(tx: Any, grads: list[Any], params: Any = None) -> tuple[list[Any], Any]:
    state, update, out = tx.init(grads[0]), jax.jit(tx.update), []
    for g in grads:
        updates, state = update(g, state, params)
        out.append(jax.tree.map(np.asarray, updates))
    return out, state


def spiky() -> list[Any]:
    grads = [tree(seed) for seed in range(4)]
    grads[2]["up"]["kernel"][1, 0, 0] = 1e4
    return grads


def test_each_layer_of_a_stack_is_a_tensor_of_its_own() -> None:
    """In front of GaLore too, all layers together or one after the other."""
    together, state = steps(stabilize(), spiky())
    assert optax.tree.get(state, "largest")["up"]["kernel"].shape == (2,)
    for i in range(2):
        grads = [jax.tree.map(lambda x, i=i: x[i], g) for g in spiky()]
        alone, _ = steps(stabilize(), grads)
        for a, b in zip(together, alone, strict=True):
            for name in ("up", "down"):
                ours, theirs = a[name]["kernel"][i], b[name]["kernel"]
                np.testing.assert_allclose(ours, theirs, rtol=1e-5)

    tx = optax.chain(stabilize(), lro.galore(0.1, **GALORE))
    grads, params = jax.tree.map(jnp.asarray, (spiky()[1:3], tree(9)))
    ours, theirs = (
        steps(each, [{"up": g["up"]} for g in grads], {"up": params["up"]})[0]
        for each in (tx, lro.training.per_layer(tx))
    )
    # Adam's step is 0.1, and float32 rounding of its gradients 1e-6 of them.
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a["up"]["kernel"], b["up"]["kernel"], atol=1e-5)


def test_a_spike_is_clipped_and_its_norm_is_remembered_for_a_while() -> None:
    found, _ = steps(stabilize(), spiky())
    norms = [np.linalg.norm(u["up"]["kernel"][1]) for u in found]
    np.testing.assert_allclose(norms[:2], 1, atol=0.2)
    assert norms[2] < 1.2
    assert np.isfinite(norms[3])


def test_inside_the_bracket_it_is_what_it_is_in_front() -> None:
    back = lro.project_back(0.25)
    adam = lro.in_subspace(optax.scale_by_adam())
    inside = lro.low_rank_optimizer(
        optax.chain(stabilize(), lro.dominant_svd(), lro.project(), adam, back),
        0.1,
        **GALORE,
    )
    in_front = optax.chain(stabilize(), lro.galore(0.1, **GALORE))
    ours, theirs = (steps(tx, spiky(), tree(9))[0] for tx in (inside, in_front))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf])
def test_a_gradient_that_is_zero_or_not_finite_changes_no_average(bad: float) -> None:
    g = tree(0)
    _, before = steps(stabilize(), [g])
    kernel = np.zeros((2, 4, 6), np.float32) if bad == 0 else g["up"]["kernel"].copy()
    kernel[:, 1, 2] = bad  # one entry of each layer is enough
    broken = {**g, "up": {"kernel": kernel}}
    (_, updates), after = steps(stabilize(), [g, broken])
    np.testing.assert_array_equal(updates["up"]["kernel"], broken["up"]["kernel"])
    for x, y in zip(after, before, strict=True):
        np.testing.assert_array_equal(x["up"]["kernel"], y["up"]["kernel"])
        assert (x["norm"]["scale"] != y["norm"]["scale"]).all()


@pytest.mark.slow
def test_one_nan_changes_no_average_as_xla_compiles_it_outside_of_tests() -> None:
    code = """
import jax, jax.numpy as jnp
import lowrank_optax as lro
tx = lro.full_rank.stabilize_gradient(dimension_numbers=[("", None)])
g = {"w": jnp.ones((512, 256))}
_, state = tx.update(g, tx.init(g))
broken = {"w": g["w"].at[3, 5].set(jnp.nan)}
_, after = jax.jit(tx.update)(broken, state)
assert jax.tree.all(jax.tree.map(lambda a, b: bool(a == b), after, state)), after
"""
    plain = {"XLA_FLAGS": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | plain)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_a_gradient_of_any_size_gets_a_norm_of_one(size: float) -> None:
    g = {"bias": jnp.full(7, size), "narrow": {"bias": jnp.ones(3, jnp.bfloat16)}}
    (updates, _), _ = steps(stabilize(), [g, g])
    assert updates["narrow"]["bias"].dtype == jnp.bfloat16
    np.testing.assert_allclose(np.linalg.norm(updates["bias"]), 1, rtol=1e-5)


def test_sums_of_a_gradient_in_a_subspace_are_refused() -> None:
    tx: Any = optax.chain(stabilize(), lro.galore(0.1, **GALORE))
    g = {"up": {"kernel": jnp.ones((4, 6))}}
    low = {"up": {"kernel": jnp.ones((2, 6))}}
    inside = lro.training.layerwise.Inside(low=True)
    with pytest.raises(ValueError, match="needs the full gradient G"):
        tx.update(low, tx.init(g), g, inside=inside)


def test_a_restart_is_a_new_beginning() -> None:
    grads = [jnp.asarray(float(x)) for x in (3, -1, 2, 5, 4)]
    found, state = steps(lro.steps.restart_every(optax.scale_by_adam(), 2), grads)
    again = (steps(optax.scale_by_adam(), grads[i : i + 2])[0] for i in (0, 2, 4))
    np.testing.assert_array_equal(found, [*itertools.chain(*again)])
    assert int(state.count) == 1
    with pytest.raises(ValueError, match="steps must be an int of at least 1"):
        lro.steps.restart_every(optax.scale_by_adam(), 0)
