"""Rows that are due are replaced, one loop for all, and no others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank_optax.core.due import Rows, replace_due

DUE = np.array([[False, True, True, False], [True, False, False, True], [False] * 4])
OLD = np.arange(24.0).reshape(3, 4, 2)
NEW = np.where(DUE[..., None], 10 * OLD + 1, OLD)


def replaced(due, old, factor=10.0, one=1.0):
    """Rows of two equal leaves; one number is closed over, the other is common."""

    def f(x, y, common):
        return {"x": factor * y + common}

    rows = [Rows(due, {"x": old}, old)] * 2
    a, b = replace_due([lambda x, y, c: f(x["x"], y, c)] * 2, rows, jnp.asarray(one))
    return a["x"], b["x"]


def test_in_one_loop():
    for x in jax.jit(replaced)(DUE[0], OLD[0]):
        np.testing.assert_array_equal(x, NEW[0])


@pytest.mark.parametrize("inside", [False, True], ids=["jit of vmap", "vmap of jit"])
def test_under_vmap(inside):
    f = jax.vmap(jax.jit(replaced)) if inside else jax.jit(jax.vmap(replaced))
    for x in f(DUE, OLD):
        np.testing.assert_array_equal(x, NEW)


def test_what_f_closes_over_may_be_batched_or_not():
    factors, ones = np.array([10.0, 20.0, 30.0]), np.array([1.0, 2.0, 3.0])
    own = factors[:, None, None] * OLD + ones[:, None, None]
    x, _ = jax.vmap(replaced)(DUE, OLD, factors, ones)
    np.testing.assert_array_equal(x, np.where(DUE[..., None], own, OLD))
    same, _ = jax.jit(jax.vmap(replaced, (0, 0, None, None)))(DUE, OLD, 10.0, 1.0)
    np.testing.assert_array_equal(same, NEW)


def test_under_two_vmaps():
    f = jax.vmap(jax.vmap(replaced, (0, 0, None, 0)), (0, 0, 0, None))
    due, old = (np.stack([x, x]) for x in (DUE, OLD))
    ones = np.array([1.0, 2.0, 3.0])
    x, _ = f(due, old, np.array([10.0, 20.0]), ones)
    for factor, seen in zip((10.0, 20.0), x, strict=True):
        own = factor * OLD + ones[:, None, None]
        np.testing.assert_array_equal(seen, np.where(DUE[..., None], own, OLD))


def test_rows_that_are_shared_by_all_members():
    x, _ = jax.vmap(replaced, (0, None))(DUE, OLD[0])
    new = np.where(DUE[..., None], 10 * OLD[0] + 1, OLD[0])
    np.testing.assert_array_equal(x, new)
