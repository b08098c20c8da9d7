"""The gradient in the subspace: rows that are rounding."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from tests.helpers.stages import chain_of, normal, run

M, N, K, RANK, STEPS = 16, 48, 2, 8, 7
LEFT = np.random.default_rng(0).normal(size=(M, K))
Q = np.linalg.qr(LEFT)[0]
RIGHT = np.random.default_rng(1).normal(size=(K, N))
OPTIONS: dict[str, Any] = {"rank": RANK, "dimension_numbers": None}
# A basis of singular vectors that the step, the rotation or the rule could leave.
METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    "galore": (lro.galore, {"refresh_every": 3}),
    "sara": (lro.galore, {"refresh_every": 3, "basis": lro.sara_sample(key=0)}),
    "gram": (lro.galore, {"basis": lro.dominant_svd(decomposition="gram")}),
    "adafactor": (lro.recipes.galore_adafactor, {}),
    "8-bit": (lro.recipes.galore_adam8bit, {"min_size": 1}),
    "galore_2": (lro.recipes.galore_2, {"key": 0, "refresh_every": 3}),
    "frugal": (lro.frugal, {"refresh_every": 3}),
    "fira": (lro.fira, {"refresh_every": 3}),
    "ldadam": (lro.ldadam, {}),
    "spectral_adam": (lro.spectral_adam, {"refresh_every": 3}),
    "subtrack": (lro.recipes.subtrack, {"refresh_every": 3}),
    "golore": (lro.recipes.golore, {"key": 0, "switch_step": 9, "refresh_every": 3}),
    "alice": (lro.recipes.alice, {"key": 0, "refresh_every": 3, "keep": 1.0}),
    "sumo": (lro.recipes.sumo, {"refresh_every": 3}),
    "coap": (lro.recipes.coap, {"refresh_every": 3}),
}
# Methods whose residual of a gradient in bfloat16 is what that rounded.
LINEAR_REST = {"fira", "subtrack", "sumo"}


def gradients(dtype: Any, size: float = 1.0) -> list[jax.Array]:
    """Of rank two, in the columns of Q."""
    return [
        jnp.asarray(
            size * LEFT @ (RIGHT + 0.3 * np.random.default_rng(t).normal(size=(K, N))),
            dtype,
        )
        for t in range(STEPS)
    ]


def outside(update: jax.Array) -> float:
    x = np.float64(update)
    return float(np.linalg.norm(x - Q @ (Q.T @ x)) / np.linalg.norm(x))


def last_update(tx: Any, grads: list[Any]) -> jax.Array:
    return run(tx, grads)[0][-1]["w"]


@pytest.mark.parametrize("size", [1.0, 1e-2])
@pytest.mark.parametrize("name", METHODS)
def test_a_gradient_of_lower_rank_moves_weights_along_its_columns(
    name: str, size: float
) -> None:
    """Surplus directions held rounding, and took up to nine tenths of the step."""
    make, options = METHODS[name]
    tx = make(1.0, **OPTIONS | options)
    grads = [{"w": g} for g in gradients(jnp.float32, size)]
    assert outside(last_update(tx, grads)) < 1e-5


@pytest.mark.parametrize("name", [x for x in METHODS if x not in LINEAR_REST])
def test_nor_does_what_bfloat16_rounds_of_a_gradient(name: str) -> None:
    make, options = METHODS[name]
    tx = make(1.0, **OPTIONS | options)
    found = last_update(tx, [{"w": g} for g in gradients(jnp.bfloat16)])
    # The update itself is rounded to bfloat16, which is 1.5e-3.
    assert outside(found) < 2e-3


def test_each_layer_of_a_stack_by_itself() -> None:
    tx = lro.galore(1.0, rank=RANK, dimension_numbers=lro.STACKED)
    grads = [
        {"w": jnp.stack([g, 1e-6 * g, normal(M, N, seed=9)])}
        for g in gradients(jnp.float32)
    ]
    found = last_update(tx, grads)
    assert outside(found[0]) < 1e-5
    assert outside(found[1]) < 1e-5
    assert outside(found[2]) > 0.5


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_same_of_gradients_summed_in_the_subspace(dtype: Any) -> None:
    tx = lro.galore(1.0, refresh_every=100, **OPTIONS)
    grads = [{"w": g} for g in gradients(dtype)]
    params: Any = {"w": jnp.zeros((M, N))}
    updates: Any = None
    state = tx.init(params)
    for t in range(0, 6, 2):
        how: dict[str, Any] = {"refresh": t == 0}
        first, second = grads[t : t + 2]
        one = lro.training.project_gradient(tx, first, state, params, **how)
        two = lro.training.project_gradient(
            tx, second, state, params, bases=one.bases, **how
        )
        low = jax.tree.map(lambda a, b: (a + b) / 2, one.low, two.low)
        updates, state = lro.training.update_projected(
            tx, one._replace(low=low), state, params, **how
        )
    assert outside(updates["w"]) < 1e-3


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_other_rows_keep_their_bits(dtype: Any) -> None:
    seen: list[jax.Array] = []

    def see(frame: lro.stages.Frame) -> lro.stages.Frame:
        seen.extend([frame.need("low"), frame.down(frame.gradient)])
        return frame

    keep = optax.stateless(lambda frames, _: lro.stages.map_frames(see, frames))
    step = optax.chain(keep, lro.in_subspace(optax.scale_by_adam()))
    tx = lro.low_rank(chain_of(step=step), rank=RANK, refresh_every=1)
    # A condition of 1e3, which is what gradients have, and columns of all sizes.
    size = jnp.geomspace(1, 1e-3, M)[:, None] * jnp.geomspace(1, 1e-9, N)
    g = {"w": (normal(M, N) * size).astype(dtype)}
    tx.update(g, tx.init(g))
    np.testing.assert_array_equal(seen[0], seen[1])
    assert bool(jnp.all(jnp.any(seen[0] != 0, axis=-1)))


def test_a_row_that_is_not_finite_is_seen() -> None:
    tx = lro.galore(1.0, **OPTIONS)
    g = {"w": normal(M, N)}
    _, state = tx.update(g, tx.init(g), g)
    for bad in (jnp.nan, jnp.inf):
        updates: Any
        updates, new = tx.update({"w": g["w"].at[3, 5].set(bad)}, state, g)
        assert int(optax.tree.get(new, "skipped")) == 1
        assert not np.any(updates["w"])


def test_a_moment_that_turns_into_a_row_without_a_second_one() -> None:
    """`moments="first"` leaves V; M / (sqrt(0) + eps) was a step of 1e7."""
    tx = lro.recipes.golore(1.0, key=0, switch_step=99, refresh_every=3, **OPTIONS)
    other = np.random.default_rng(5).normal(size=(M, K))
    late = jnp.asarray(other @ RIGHT, jnp.float32)
    found = last_update(tx, [{"w": g} for g in [*gradients(jnp.float32)[:3], late]])
    assert float(jnp.max(jnp.abs(found))) < 40
