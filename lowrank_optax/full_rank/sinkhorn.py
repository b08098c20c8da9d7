"""Step: matrices of full rank, rows and columns normalized in turn (SinkGD)."""

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.core.aliases import Number
from lowrank_optax.core.checks import check_count
from lowrank_optax.core.frame import Frame
from lowrank_optax.core.linalg import ratio
from lowrank_optax.core.stage import check_first, stateless_stage


def normalize_by_sinkhorn(
    iterations: int = 5, *, scale: Number = 1.0
) -> optax.GradientTransformation:
    """Normalizes the gradient's rows and columns in turn (SinkGD).

    `iterations` times from X = G, (m, n):

        X_ij <- X_ij / sqrt(mean_j X_ij^2),    rows of norm sqrt(n)
        X_ij <- X_ij / sqrt(mean_i X_ij^2),    columns of norm sqrt(m)
        step = scale X

    (Scetbon et al. 2025, "Gradient Multi-Normalization for Stateless and Scalable LLM
    Training", arXiv 2502.06742, Algorithm 3, SR-Sinkhorn.) The root mean square entry
    of X is 1. Rows lie along the smaller side. There is no state and no product. Use
    the stage alone inside `full_matrices` or `low_rank`.

    X is diag(p) G diag(q), and only p and q are iterated. A row or a column whose
    gradient is zero does not move.

    Args:
      iterations: of both normalizations, L; 5 in the paper.
      scale: a factor on the step.

    Raises:
      ValueError: iterations below 1.

    Example:
      >>> tx = lro.full_rank.full_matrices(
      ...     lro.full_rank.normalize_by_sinkhorn())
      >>> g = jnp.array([[1.0, 30.0], [2.0, -60.0]])   # signs, times a rank-one matrix
      >>> tx.update(g, tx.init(g))[0].round(3).tolist()
      [[1.0, 1.0], [1.0, -1.0]]
    """
    check_count("iterations", iterations)

    def one(frame: Frame) -> Frame:
        check_first(frame, "step")
        G = frame.gradient
        # The first iteration takes any factor off a row. With a largest entry of 1 in
        # each, no row's squares underflow.
        size = jnp.max(jnp.abs(G), axis=-1, keepdims=True)
        G = G / jnp.where(size > 0, size, 1)
        q = jnp.ones_like(G[..., :1, :])
        p = q[..., :1]
        for _ in range(iterations):
            p = _inverse(_rms(G * q, axis=-1))
            q = _inverse(_rms(G * p, axis=-2))
        return frame.replace(step=jnp.multiply(scale, p) * G * q)

    return stateless_stage(one)


def _rms(x: jax.Array, axis: int) -> jax.Array:
    return jnp.sqrt(jnp.mean(jnp.square(x), axis=axis, keepdims=True))


def _inverse(x: jax.Array) -> jax.Array:
    """1 / x, and 0 where x is 0."""
    return ratio(jnp.ones_like(x), x, 0.0)
