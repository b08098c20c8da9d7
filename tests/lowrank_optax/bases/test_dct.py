"""DCT-AdamW: the fixed matrix, the choice of its columns, and a rendering in numpy."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.fft

import lowrank_optax as lro
from lowrank_optax.bases.dct import columns

M, N, R, LR = 6, 10, 2, 0.1


def matrix(m: int) -> np.ndarray:
    """D by SciPy: DCT-III is x -> D^T x."""
    return scipy.fft.dct(np.eye(m), type=3, norm="ortho", axis=0).T


@pytest.mark.parametrize("m", [1, 2, 7, 64])
def test_the_matrix_is_scipys(m: int) -> None:
    with jax.enable_x64(True):
        ours = columns(jnp.arange(m), m, jnp.float64)
    np.testing.assert_allclose(ours, matrix(m), atol=1e-14)


def test_large_matrices_are_orthonormal_in_float32() -> None:
    """Angles reach m pi: multiplied out in float32 they would round to 4e-4."""
    d = columns(jnp.arange(2048), 2048, jnp.float32)
    error = jnp.matmul(d.T, d, precision="highest") - jnp.eye(2048)
    assert float(jnp.abs(error).max()) < 1e-5


def test_the_state_is_r_integers() -> None:
    params = {"w": jnp.ones((3, M, N))}
    tx = lro.recipes.dct_adamw(LR, rank=R, dimension_numbers=lro.STACKED)
    index = optax.tree.get(tx.init(params), "basis")["w"]
    assert index.shape == (3, R)
    assert jnp.issubdtype(index.dtype, jnp.integer)


@pytest.mark.parametrize("feedback", [True, False])
@pytest.mark.parametrize("every", [1, 3])
def test_the_optimizer_is_the_sources(feedback: bool, every: int) -> None:
    random = np.random.default_rng(0)
    grads = random.normal(size=(8, M, N)) * np.linspace(0.5, 2, N)
    b1, b2, eps, decay = 0.9, 0.99, 1e-8, 0.1
    d, w = matrix(M), random.normal(size=(M, N))
    ours, index = np.copy(w), np.zeros(R, int)
    m, v, e = np.zeros((R, N)), np.zeros((R, N)), np.zeros((M, N))
    with jax.enable_x64(True):
        tx: Any = lro.recipes.dct_adamw(
            LR,
            rank=R,
            refresh_every=every,
            feedback=feedback,
            b1=b1,
            b2=b2,
            weight_decay=decay,
            dimension_numbers=None,
        )
        params = {"w": jnp.asarray(ours)}
        state, update, moved = tx.init(params), jax.jit(tx.update), 0
        for t, g in enumerate(grads):
            updates, state = update({"w": jnp.asarray(g)}, state, params)
            params = optax.apply_updates(params, updates)
            a = g + e * feedback
            if t % every == 0:
                last, index = index, np.sort(np.argsort(-np.abs(d.T @ a).sum(1))[:R])
                if t:
                    moved += int((index != last).any())
                    stays = (index[:, None] == last[None]).astype(float)
                    m, v = stays @ m, stays @ v
            low = d[:, index].T @ a
            e = a - d[:, index] @ low
            m, v = b1 * m + (1 - b1) * low, b2 * v + (1 - b2) * low**2
            step = m / (1 - b1 ** (t + 1)) / (np.sqrt(v / (1 - b2 ** (t + 1))) + eps)
            w = (1 - LR * decay) * w - LR * d[:, index] @ step
            assert optax.tree.get(state, "basis")["w"].tolist() == index.tolist()
            # optax computes 1 - b^t in float64 here; rounding of a few products.
            np.testing.assert_allclose(params["w"], w, rtol=1e-9, atol=1e-9)
    assert moved  # or nothing was turned
