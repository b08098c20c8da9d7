"""Conditionals that `jax.vmap` leaves whole."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank_optax.core.loops import cond_any

X = np.arange(6.0).reshape(3, 2)


def chosen(which: Any, x: Any, shift: Any, taken: list[str] | None = None) -> jax.Array:
    """2 x + shift or -x, and the names of the branches that ran."""

    def then() -> jax.Array:
        jax.debug.callback(lambda: taken is None or taken.append("then"))
        return 2 * x + shift

    def otherwise() -> jax.Array:
        jax.debug.callback(lambda: taken is None or taken.append("otherwise"))
        return -x

    return cond_any(which, then, otherwise)


@pytest.mark.parametrize("flags", [[0, 0, 0], [0, 1, 0], [1, 1, 1]])
@pytest.mark.parametrize("jitted", [False, True])
def test_all_calls_of_vmap_decide_together(flags: list[int], jitted: bool) -> None:
    taken: list[str] = []
    f = jax.vmap(lambda which, x: chosen(which, x, 10.0, taken))
    got = (jax.jit(f) if jitted else f)(jnp.array(flags, bool)[:, None], jnp.array(X))
    jax.effects_barrier()
    np.testing.assert_array_equal(got, 2 * X + 10 if any(flags) else -X)
    assert {*taken} == {"then" if any(flags) else "otherwise"}


def test_what_is_not_batched_stays_one() -> None:
    """Each of flag, array and closed-over number is batched alone, and twice over."""
    x, no, shift = jnp.array(X), jnp.array([False]), jnp.array([1.0, 2.0])
    two = jnp.array([[False], [True]])
    for which, axes, expected in (
        (two, (0, None, None), np.stack([2 * X + 7] * 2)),
        (no, (None, 0, None), -X),
        (~no, (None, None, 0), 2 * X + np.array([1.0, 2.0])[:, None, None]),
    ):
        number = shift if axes[2] == 0 else jnp.array(7.0)
        np.testing.assert_array_equal(
            jax.vmap(chosen, in_axes=axes)(which, x, number), expected
        )
    nested = jax.vmap(jax.vmap(chosen, (None, 0, None)), (0, None, None))
    np.testing.assert_array_equal(nested(two, x, 7.0), np.stack([2 * X + 7] * 2))
