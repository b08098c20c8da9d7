"""The QR of a tall matrix by blocks of rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank_optax.core.tall_qr import tall_q


@pytest.mark.parametrize(
    ("m", "n", "block"),
    [(256, 4, 32), (256, 4, 9), (96, 8, 40), (97, 8, 40), (64, 16, 32), (8, 8, 4)],
)
def test_it_is_the_q_of_one_qr_up_to_signs(m, n, block):
    x = np.random.default_rng(0).standard_normal((m, n), np.float32)
    q = np.asarray(jax.jit(tall_q, static_argnums=1)(x, block))
    np.testing.assert_allclose(q.T @ q, np.eye(n), atol=1e-5)
    expected = np.asarray(jnp.linalg.qr(x)[0])
    signs = np.sign(np.sum(q * expected, axis=0))
    np.testing.assert_allclose(q * signs, expected, atol=1e-5)


@pytest.mark.parametrize("rank", [0, 2])
def test_columns_are_orthonormal_whatever_the_rank(rank):
    rng = np.random.default_rng(1)
    x = rng.standard_normal((256, rank)) @ rng.standard_normal((rank, 8))
    x[:64] = 0  # whole blocks
    q = np.asarray(tall_q(jnp.asarray(x, jnp.float32), 32))
    np.testing.assert_allclose(q.T @ q, np.eye(8), atol=1e-5)
    np.testing.assert_allclose(q @ (q.T @ x), x, atol=1e-4)
