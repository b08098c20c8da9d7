"""Step: matrices of full rank, rows and columns scaled (RACS)."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.core import linalg
from lowrank_optax.core.aliases import Number
from lowrank_optax.core.checks import check_count, check_limit
from lowrank_optax.core.frame import Frame
from lowrank_optax.core.sharding import zeros_along
from lowrank_optax.core.stage import check_first, frame_stage
from lowrank_optax.recovery.limiter import LARGEST_FALL, limit_growth, no_norm_yet


class RowColumnState(NamedTuple):
    """State of `scale_by_racs`; False at leaves of full rank.

    Attributes:
      rows: q, (*batch, m).
      columns: s, (*batch, n).
      norm: ||G^||_F of the last step that did not fall below a fifth, after the
        limiter, (*batch,); negative before the first step.
    """

    rows: optax.Params
    columns: optax.Params
    norm: optax.Params


def scale_by_racs(
    limit: Number = 1.01,
    *,
    scale: Number = 1.0,
    decay: Number = 0.9,
    iterations: int = 5,
) -> optax.GradientTransformationExtraArgs:
    """Divides the gradient by the root of a rank-one fit of its squares (RACS).

    `iterations` times from q = 1, with the entrywise square G^2:

        s = (G^2)^T q / ||q||^2,    q = G^2 s / ||s||^2

    converges to the leading singular pair of G^2, so that q s^T fits it. Then

        s_t = decay s_{t-1} + (1 - decay) s,    q_t = decay q_{t-1} + (1 - decay) q
        G^ = diag(q_t)^(-1/2) G diag(s_t)^(-1/2)
        if ||G^_t|| > zeta ||G^_{t-1}||:   G^_t <- G^_t zeta ||G^_{t-1}|| / ||G^_t||
        step = scale G^

    (Gong et al. 2025, "Structured Fisher Approximation", section 4, Algorithm 1.) As in
    the paper, neither average is corrected for bias: the first step is 1 / (1 - decay)
    times as large as later ones. Use it alone inside `full_matrices` or `low_rank`.

    Deviations: a row or column whose gradients were all zero does not move. A zero
    gradient changes neither q nor s. A G^ of less than a fifth of the last norm leaves
    the norm that limits the next step unchanged; in the paper one small gradient limits
    hundreds of steps.

    Args:
      limit: zeta, the largest growth of the step's norm from step to step.
      scale: alpha.
      decay: beta, the decay rate of q and s.
      iterations: number of iterations of the fit, 5 in the paper.

    Raises:
      ValueError: iterations below 1.

    Example:
      >>> tx = lro.full_rank.full_matrices(
      ...     lro.steps.with_rest(lro.full_rank.scale_by_racs()))
    """
    check_count("iterations", iterations)
    check_limit(limit)

    def one(
        frame: Frame, rows: jax.Array, columns: jax.Array, last: jax.Array
    ) -> tuple[Frame, jax.Array, jax.Array, jax.Array]:
        check_first(frame, "step")
        G = frame.gradient
        nonzero = jnp.any(G != 0, axis=(-2, -1))[..., None]
        q, s = fitted(G, iterations)
        rows = jnp.where(nonzero, decay * rows + (1 - decay) * q, rows)
        columns = jnp.where(nonzero, decay * columns + (1 - decay) * s, columns)
        scaled = (
            _inverse_root(rows)[..., None] * G * _inverse_root(columns)[..., None, :]
        )
        norm = jnp.sqrt(jnp.sum(jnp.square(scaled), axis=(-2, -1)))
        factor, norm = limit_growth(
            jnp.ones_like(norm)[..., None], norm, last, limit, fall=LARGEST_FALL
        )
        step = jnp.multiply(scale, factor)[..., None] * scaled
        return frame.replace(step=step), rows, columns, norm

    rows, columns = (partial(zeros_along, axis=axis) for axis in (-2, -1))
    return frame_stage(RowColumnState, one, rows, columns, no_norm_yet)


def fitted(g: jax.Array, iterations: int) -> tuple[jax.Array, jax.Array]:
    """Returns q (*batch, m) and s (*batch, n); zeros for a zero gradient."""
    # Scaled to a largest entry of 1: on the way s is of fourth order in G, and would
    # overflow or underflow.
    size = linalg.largest(g)
    squares = jnp.square(g / size)
    q = jnp.ones(g.shape[:-1], g.dtype)
    s = jnp.zeros((*g.shape[:-2], g.shape[-1]), g.dtype)
    for _ in range(iterations):
        # Sums instead of matrix products, which may round to bfloat16.
        s = _over_norm(jnp.sum(squares * q[..., None], axis=-2), q)
        q = _over_norm(jnp.sum(squares * s[..., None, :], axis=-1), s)
    return q, s * jnp.square(size[..., 0])


def _over_norm(x: jax.Array, by: jax.Array) -> jax.Array:
    """x / ||by||^2, and zeros where ||by|| is zero."""
    norm = jnp.sum(jnp.square(by), axis=-1, keepdims=True)
    return jnp.where(norm > 0, x / jnp.where(norm > 0, norm, 1), 0)


def _inverse_root(x: jax.Array) -> jax.Array:
    """x^(-1/2), and 0 where x is 0."""
    return jnp.where(x > 0, 1 / jnp.sqrt(jnp.where(x > 0, x, 1)), 0)
