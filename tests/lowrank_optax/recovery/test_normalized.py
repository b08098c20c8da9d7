"""COSMOS's parts: its basis, its step, its way back, on what can go wrong."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro

RULES = [("stack", lro.STACKED), ("", "matrix")]


def cosmos(**options: Any) -> Any:
    options = {"rank": 2, "dimension_numbers": RULES, "scale": 0.5, **options}
    return lro.recipes.cosmos(1.0, **options)


def normal(seed: int, *shape: int) -> Any:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def last(tx: Any, grads: list[Any]) -> tuple[Any, Any]:
    """The last update, as numpy, and the last state."""
    params = jax.tree.map(jnp.zeros_like, grads[0])
    state, update, updates = tx.init(params), jax.jit(tx.update), None
    for g in grads:
        updates, state = update(g, state, params)
    return jax.tree.map(np.asarray, updates), state


def test_each_matrix_is_by_itself_and_has_the_same_size() -> None:
    """In a stack, with a layer a million times larger; and alone, on its side."""
    grads = []
    for seed in (1, 2):
        stack = normal(seed, 2, 4, 7) * np.float32([[[1.0]], [[1e-6]]])
        grads.append({"stack": stack, "zero": 0 * stack[0].T})
    found, state = last(cosmos(), grads)
    assert not found.pop("zero").any()
    for x in jax.tree.leaves(found):
        # Float32: the mean of up to 28 squares.
        np.testing.assert_allclose(np.sqrt(np.mean(x**2, (-2, -1))), 0.5, rtol=1e-5)
    # Bfloat16 products in another layout round in another order.
    alone, _ = last(cosmos(), [{"w": g["stack"][1].T} for g in grads])
    np.testing.assert_allclose(alone["w"].T, found["stack"][1], atol=2e-2)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))


def test_a_bad_gradient_leaves_no_trace_and_a_zero_one_is_left_behind() -> None:
    g = {"w": normal(3, 4, 7)}
    _, before = last(cosmos(), [g])
    for bad in (np.nan, np.inf):
        update, after = last(cosmos(), [g, {"w": g["w"] * np.float32(bad)}])
        assert not update["w"].any()
        jax.tree.map(np.testing.assert_array_equal, after[0][3], before[0][3])
    found, _ = last(cosmos(), [{"w": 0 * g["w"]}] * 2 + [g])
    wanted, _ = last(cosmos(), [g])
    # Zeros leave M = V = Q~ = 0; the count for the bias correction scales what is
    # normalized anyway, and M against V.
    cosine = np.vdot(found["w"], wanted["w"]) / np.vdot(wanted["w"], wanted["w"])
    assert cosine > 0.98


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_gradient_of_less_rank_than_the_basis_moves_along_itself(dtype: Any) -> None:
    """Directions of S in which G is rounding have a V of nothing."""
    u, v = normal(0, 6, 1), normal(1, 1, 9)
    g = {"w": jnp.asarray(u @ v, dtype)}
    found, _ = last(cosmos(rank=3), [g, g, g])
    step = np.float32(found["w"])
    along = u @ (u.T @ step) / (u.T @ u)
    # Bfloat16 has 3 digits.
    assert np.linalg.norm(step - along) < 0.02 * np.linalg.norm(step)


def test_the_basis_turns_to_the_leading_eigenvectors_of_the_mean() -> None:
    """Gradients have one covariance; seen after some steps of orthogonal iteration."""
    q, _ = np.linalg.qr(normal(0, 8, 8))
    sizes = np.float32([5, 3, 1, 0.5, 0.4, 0.3, 0.2, 0.1])
    grads = [{"w": (q * sizes) @ normal(seed, 8, 40)} for seed in range(1, 12)]
    _, state = last(cosmos(b3=0.9), grads)
    found = optax.tree.get_all_with_path(state, "basis")[0][1]["w"]
    overlap = np.abs(q[:, :2].T @ np.asarray(found))
    # The mean of eleven gradients of 40 columns is its covariance to a few percent.
    np.testing.assert_allclose(overlap, np.eye(2), atol=0.1)


def test_full_rank_is_adams_step_of_that_size() -> None:
    g = {"w": normal(0, 3, 5)}
    with pytest.warns(UserWarning, match="full rank"):
        found, _ = last(cosmos(rank=3, b1=0.9, b2=0.95), [g])
    # Adam's first step is the sign.
    np.testing.assert_allclose(found["w"], -0.5 * np.sign(g["w"]), rtol=1e-5)


def test_mistakes_name_the_matrix_and_what_to_do() -> None:
    step = lro.steps.scale_by_full_momentum()
    g = {"w": jnp.ones((4, 6))}

    def run(*stages: Any) -> None:
        tx: Any = lro.low_rank(optax.chain(*stages), rank=2, refresh_every=1)
        jax.eval_shape(tx.update, g, jax.eval_shape(tx.init, g))

    with pytest.raises(ValueError, match=r"w: the Frame has no `low` yet"):
        run(lro.dominant_svd(), step)
    back = lro.recovery.normalized_spectral_residual()
    with pytest.raises(ValueError, match=r"w: normalized_spectral_residual.*orthonorm"):
        run(lro.bases.gaussian(0), lro.project(), step, back)
    with pytest.raises(ValueError, match="dtype=float16"):
        lro.recovery.normalized_spectral_residual(dtype=jnp.float16)
