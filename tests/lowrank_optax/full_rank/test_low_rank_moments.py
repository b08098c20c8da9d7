"""MLorc, LoRA-Pre and MoFaSGD: each matrix by itself, zeros, and where they go."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from tests.helpers.battery import types
from tests.helpers.marks import slow_but
from tests.helpers.stages import normal

M, N, R = 5, 8, 2
MAKE: dict[str, Any] = {
    "mlorc": lro.recipes.mlorc,
    "lora_pre": lro.recipes.lora_pre,
    "mofasgd": lro.recipes.mofasgd,
}
each = pytest.mark.parametrize("name", MAKE)


@functools.cache
def compiled(name: str) -> tuple[Any, Any]:
    """The optimizer and its update of two stacked matrices, m > n."""
    tx = MAKE[name](1.0, rank=R, key=0, dimension_numbers=lro.STACKED)
    return tx, jax.jit(tx.update)


def steps_of(name: str, grads: list[Any]) -> tuple[Any, list[Any]]:
    (tx, update), out = compiled(name), []
    params = {"w": jnp.zeros((2, N, M))}
    states = [tx.init(params)]
    for g in grads:
        updates, state = update({"w": jnp.asarray(g)}, states[-1], params)
        out.append(np.asarray(updates["w"]))
        states.append(state)
    return np.stack(out), states


def stacks(count: int) -> list[Any]:
    return [normal(2, N, M, seed=t) for t in range(count)]


@pytest.mark.parametrize("name", slow_but(["lora_pre", "mofasgd"], MAKE))
def test_layers_step_by_themselves_and_a_transposed_matrix_transposed(
    name: str,
) -> None:
    grads = stacks(4)
    found, _ = steps_of(name, grads)
    turned, _ = steps_of(name, [g[::-1] for g in grads])
    np.testing.assert_array_equal(turned, found[:, ::-1])
    # The layers draw the same numbers, whatever the layer, and in either layout.
    tx = MAKE[name](1.0, rank=R, key=0, dimension_numbers=None)
    update, params = jax.jit(tx.update), {"w": jnp.zeros((M, N))}
    state = tx.init(params)
    for g, theirs in zip(grads, found, strict=True):
        updates, state = update({"w": g[1].T}, state, params)
        # Another program of the same float32 arithmetic, on steps of about one.
        np.testing.assert_allclose(updates["w"], theirs[1].T, atol=2e-4)


@each
def test_a_zero_gradient_binds_no_later_step(name: str) -> None:
    """Zeros for one layer, and gradients for the other all the time."""
    grads = stacks(3)
    zero = [grads[0].at[0].set(0), *grads]
    found, states = steps_of(name, [*zero[:2], 0 * grads[0], *zero[2:]])
    assert np.isfinite(found).all()
    assert not found[0, 0].any()
    assert found[3:].any(axis=(-2, -1)).all()
    floats = [x for x in jax.tree.leaves(states[3]) if x.dtype == jnp.float32]
    assert all(np.isfinite(x).all() for x in floats)
    if name == "mofasgd":  # it has no count
        late, _ = steps_of(name, grads[:1])
        np.testing.assert_array_equal(found[1, 0], late[0, 0])
    if name == "lora_pre":
        for field in ("mu_left", "mu_right", "nu_left", "nu_right"):
            first, second, third, fourth = (
                optax.tree.get(s, field)["w"][0] for s in states[:4]
            )
            np.testing.assert_array_equal(first, second)
            assert (second != third).any()
            np.testing.assert_array_equal(third, fourth)


def test_mofasgd_remembers_gradients_whose_squares_underflow() -> None:
    small = 1e-25 * stacks(1)[0]
    _, states = steps_of("mofasgd", [small])
    sizes = optax.tree.get(states[-1], "sizes")["w"]
    assert (sizes > 0).all()
    norms = np.linalg.norm(small.astype(np.float64), axis=(-2, -1))
    # Of rank 2 of 5, and of what a random V sees.
    assert (np.linalg.norm(np.float64(sizes), axis=-1) > 0.05 * norms).all()


@each
def test_what_is_not_finite_enters_no_state(name: str) -> None:
    g = stacks(1)[0]
    for bad in (jnp.nan, jnp.inf):
        found, states = steps_of(name, [g, g.at[1, 2, 3].set(bad)])
        assert not found[1].any()
        before, after = (s[0].inner_state for s in states[1:])
        jax.tree.map(np.testing.assert_array_equal, before, after)


@each
def test_narrow_gradients_and_the_smallest_shapes(name: str) -> None:
    tx = MAKE[name](1.0, rank=R, key=0, dimension_numbers=None)
    shapes = {"one": (1, 1), "column": (4, 1), "square": (3, 3)}
    params = {k: jnp.ones(s, jnp.bfloat16) for k, s in shapes.items()}
    state = tx.init(params)
    updates, after = jax.jit(tx.update)(params, state, params)
    assert types(updates) == types(params)
    assert types(after) == types(state)
    for x in jax.tree.leaves(updates):
        assert np.isfinite(np.float32(x)).all()
        assert np.any(x)


def test_mofasgd_steps_where_there_is_a_gradient_and_no_further() -> None:
    """A gradient of rank one has one direction, and the next one a second."""
    one, two = (
        np.stack([np.outer(normal(N, seed=t), normal(M, seed=t + 9))] * 2)
        for t in (1, 2)
    )
    found, _ = steps_of("mofasgd", [one, one, one + two])
    sizes = np.linalg.svd(found[:, 0], compute_uv=False) / np.sqrt(N)
    np.testing.assert_allclose(
        sizes[:, :3], [[1, 0, 0], [1, 0, 0], [1, 1, 0]], atol=1e-4
    )
    # And it is the polar factor of what it stores.
    _, states = steps_of("mofasgd", stacks(3))
    u, v = (optax.tree.get(states[-1], k)["w"] for k in ("left", "right"))
    np.testing.assert_allclose(jnp.swapaxes(u, -1, -2) @ u, [np.eye(R)] * 2, atol=1e-5)
    np.testing.assert_allclose(v @ jnp.swapaxes(v, -1, -2), [np.eye(R)] * 2, atol=1e-5)


def test_lora_pre_fits_a_gradient_of_its_rank() -> None:
    g = np.stack([normal(N, R, seed=t) @ normal(R, M, seed=t + 9) for t in (1, 2)])
    _, states = steps_of("lora_pre", [g] * 80)
    b, a, b_v, a_v = states[-1][0].inner_state.inner_state
    # Both averages of 80 equal gradients: 1 - 0.9^80 of it is there.
    np.testing.assert_allclose(b["w"] @ a["w"], np.swapaxes(g, 1, 2), atol=1e-2)
    fit = np.linalg.norm(b_v["w"] @ a_v["w"] - np.abs(np.swapaxes(g, 1, 2)))
    assert fit < 0.5 * np.linalg.norm(g)
