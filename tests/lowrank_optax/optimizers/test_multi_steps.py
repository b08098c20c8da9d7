"""`optax.MultiSteps` over mini-batches of which one is bad."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro

PARAMS = {"matrix": jnp.zeros((6, 10)), "vector": jnp.zeros(5)}
METHODS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "galore": lro.galore,
    "grass_jump": partial(lro.grass_jump, key=0),
    "ldadam": lro.ldadam,
}


def gradients(count: int) -> list[dict[str, jax.Array]]:
    draw = np.random.default_rng(0)
    return [
        jax.tree.map(lambda p: jnp.asarray(draw.normal(size=p.shape), p.dtype), PARAMS)
        for _ in range(count)
    ]


def bad(leaf: str, value: float) -> dict[str, jax.Array]:
    gradient = gradients(1)[0]
    return {**gradient, leaf: gradient[leaf].at[..., 1].set(value)}


def steps(
    name: str, given: Sequence[optax.Updates], **options: Any
) -> tuple[list[optax.Updates], optax.MultiStepsState]:
    """The updates that are not zero, and the last state."""
    every = {} if name == "ldadam" else {"refresh_every": 3}
    inner = METHODS[name](0.1, rank=2, dimension_numbers=None, **every)
    tx = optax.MultiSteps(inner, 2, **options)
    state, update, taken = tx.init(PARAMS), jax.jit(tx.update), []
    for gradient in given:
        updates, state = update(gradient, state, PARAMS)
        if any(np.asarray(x).any() for x in jax.tree.leaves(updates)):
            taken.append(updates)
    return taken, state


@pytest.mark.parametrize(
    ("name", "leaf", "value"),
    [
        *((name, "matrix", np.nan) for name in METHODS),
        ("galore", "matrix", np.inf),
        ("galore", "vector", np.nan),
    ],
)
def test_a_bad_mini_batch_is_left_out(name: str, leaf: str, value: float) -> None:
    given = gradients(8)
    expected, _ = steps(name, given)
    with_bad = [*given[:3], bad(leaf, value), *given[3:]]
    found, state = steps(name, with_bad, should_skip_update_fn=optax.skip_not_finite)
    assert len(found) == len(expected) == 4
    assert state.gradient_step == 4
    assert optax.tree.get(state.inner_opt_state, "skipped") == 0
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_without_that_every_later_step_is_skipped() -> None:
    """Of optax's own doing; the page on skipped steps says so."""
    given = [*gradients(2), bad("matrix", np.nan), *gradients(9)]
    found, state = steps("galore", given)
    assert len(found) == 1
    assert optax.tree.get(state.inner_opt_state, "skipped") >= 5
