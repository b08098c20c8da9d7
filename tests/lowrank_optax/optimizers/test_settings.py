"""JAX's settings and schedules that are not numbers, for every optimizer.

Shapes suffice: both branches of a refresh are traced.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from tests.helpers.battery import ALL, KINDS, RATE, build, close, full_tree, types
from tests.helpers.marks import slow_but
from tests.helpers.stages import chain_of, normal, run


def state_after_a_step(tx: Any, params: Any) -> tuple[Any, Any]:
    """What the state is before and after a step."""
    state = jax.eval_shape(tx.init, params)
    updates, after = jax.eval_shape(tx.update, params, state, params)
    assert types(updates) == types(params)
    return types(state), types(after)


@pytest.mark.parametrize("name", slow_but(KINDS, ALL))
def test_no_rank_is_promoted_and_64_bits_change_no_state(name: str) -> None:
    tx, params = build(name, weight_decay=lambda step: 0.1 * step), full_tree()
    with jax.numpy_rank_promotion("raise"), jax.enable_x64(True):
        before, after = state_after_a_step(tx, params)
    assert before == after
    dtypes = [x.dtype for x in jax.tree.leaves(before)]
    wide = [x for x in dtypes if jnp.issubdtype(x, jnp.floating) and x != jnp.float32]
    assert not wide


STEPS: dict[str, Any] = {
    "in_subspace": lro.in_subspace,
    "reset": lro.reset_moments,
    "rotate": lro.rotate_moments,
    "first": lambda inner: lro.rotate_moments(inner, moments="first"),
    "per_matrix": lambda inner: lro.rotate_moments(lro.steps.per_matrix(inner)),
    "quantize": lambda inner: lro.in_subspace(lro.quantize_moments(inner, min_size=1)),
    "polar": lambda inner: lro.in_subspace(
        optax.chain(inner, lro.steps.scale_by_polar_factor("svd"))
    ),
}


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("name", STEPS)
def test_a_first_moment_of_another_dtype_keeps_it(name: str, x64: bool) -> None:
    """`mu_dtype` of optax; a state of another type would compile again."""
    step = STEPS[name](optax.scale_by_adam(mu_dtype=jnp.bfloat16))
    stages = chain_of(basis=lro.grassmann_jump(0), step=step)
    numbers = [("layers", lro.STACKED), ("", "matrix")]
    tx = lro.low_rank(stages, rank=2, refresh_every=2, dimension_numbers=numbers)
    params = {"matrix": normal(4, 6), "layers": normal(2, 6, 4)}
    with jax.enable_x64(x64), jax.numpy_rank_promotion("raise"):
        before, after = state_after_a_step(tx, params)
    assert before == after
    if name != "quantize":
        assert any(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(before))


@pytest.mark.parametrize("name", ["galore", "galore_published", "racs"])
def test_weight_decay_follows_a_schedule(name: str) -> None:
    params = {"matrix": normal(4, 6), "vector": normal(3)}
    grads = [{"matrix": normal(4, 6, seed=t), "vector": normal(3)} for t in range(4)]
    values = [0.1, 0.3, 0.0, 0.2]
    tx = build(name, weight_decay=lambda step: jnp.asarray(values)[step])
    found, _ = run(tx, grads, params)
    plain, _ = run(build(name), grads, params)
    for update, step, value in zip(found, plain, values, strict=True):
        # The released packages decay the weights after their step.
        last = step if "published" in name else optax.tree.zeros_like(step)
        decayed = jax.tree.map(
            lambda u, w, x, value=value: u - RATE * value * (w + x), step, params, last
        )
        close(update, decayed, 1e-5 * RATE)


@pytest.mark.parametrize("rate", ["learning_rate", "weight_decay"])
@pytest.mark.parametrize("name", ["galore", "galore_published", "racs"])
def test_a_step_at_a_rate_that_is_not_finite_is_skipped(name: str, rate: str) -> None:
    """All weights became NaN, and `skipped` stayed 0."""

    def schedule(step: jax.Array) -> jax.Array:
        return jnp.where(step == 2, jnp.nan, 0.1)

    tx: Any = build(name, **{rate: schedule})
    params = {"matrix": normal(4, 6), "vector": normal(3)}
    state, update = tx.init(params), jax.jit(tx.update)
    for step in range(5):
        before = state
        accept = {"accept": jnp.array(True)} if step == 3 else {}
        updates, state = update(params, state, params, **accept)
        assert int(optax.tree.get(state, "skipped")) == max(0, step - 1)
        assert np.any(updates["matrix"]) == (step < 2)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(updates))
        if step >= 2:
            same = [x[0]._replace(skipped=0) for x in (before, state)]
            jax.tree.map(np.testing.assert_array_equal, *same)
            jax.tree.map(np.testing.assert_array_equal, before[1:], state[1:])


def test_rates_that_are_numbers_cost_nothing() -> None:
    params = {"w": jnp.ones((4, 6))}
    text = []
    for rate in (0.1, lambda _: 0.1):
        tx = lro.galore(rate, rank=2, dimension_numbers=None)
        made = jax.make_jaxpr(tx.update)(params, tx.init(params), params)
        text.append(str(made).count("is_finite"))
    assert text[1] == text[0] + 1


@pytest.mark.parametrize("bad", ["a", None, float("nan"), float("inf"), [0.1]])
def test_a_rate_that_is_none_is_refused(bad: Any) -> None:
    for name in ("learning_rate", "weight_decay"):
        for method in ("galore", "galore_published", "racs"):
            with pytest.raises(ValueError, match=f"{name}=.*a finite number, or a sch"):
                build(method, **{name: bad})
