"""Left singular vectors: all of them, the leading ones, and those of a sketch."""

from typing import Literal

import jax
import jax.numpy as jnp

from lowrank_optax.core import linalg
from lowrank_optax.core.linalg import matmul, orthonormalize, per_matrix, transpose

Decomposition = Literal["svd", "gram", "randomized", "iterate"]

ONE_CALL = 2048
"""Up to this m all sketches of a refresh are one call; it copies all gradients."""

OVERSAMPLING = 8
"""Columns of a sketch beyond the rank (Halko, Martinsson and Tropp 2011, section 4)."""


def left_singular(
    g: jax.Array, decomposition: Decomposition | None = None
) -> tuple[jax.Array, jax.Array]:
    """All m left singular vectors and values of G, (*batch, m, n) with m <= n.

    Args:
      g: the matrix.
      decomposition: "svd", a thin SVD; "gram", the eigenvectors of G G^T, much faster
        on an accelerator, where singular values under sqrt(eps) times the largest
        are rounding; None: "svd" on a CPU, "gram" elsewhere, chosen when the
        program is lowered.

    Returns:
      U (*batch, m, m) orthonormal, each column's largest entry positive, and the
      singular values (*batch, m), descending and not negative.

    Raises:
      ValueError: another decomposition.

    Example:
      >>> u, s = lro.stages.left_singular(jnp.diag(jnp.array([1.0, 3.0])))
      >>> u.shape, [round(float(x), 3) for x in s]
      ((2, 2), [3.0, 1.0])
    """

    def one_svd(g: jax.Array) -> tuple[jax.Array, jax.Array]:
        # LAPACK's SVD never returns from an Inf, and does from a NaN.
        g = jnp.where(jnp.isfinite(g), g, jnp.nan)
        u, s, _ = jnp.linalg.svd(g, full_matrices=False)
        return u, s

    def svd(g: jax.Array) -> tuple[jax.Array, jax.Array]:
        return per_matrix(one_svd, g)

    def by_gram(g: jax.Array) -> tuple[jax.Array, jax.Array]:
        scale = linalg.largest(g)
        values, vectors = linalg.eigh(linalg.gram(transpose(g / scale)))
        s = scale[..., 0] * jnp.sqrt(jnp.maximum(values, 0))
        return vectors[..., ::-1], s[..., ::-1]

    check_full(decomposition)

    def factors(g: jax.Array) -> tuple[jax.Array, jax.Array]:
        if decomposition is None:
            u, s = jax.lax.platform_dependent(g, cpu=svd, default=by_gram)
        else:
            u, s = svd(g) if decomposition == "svd" else by_gram(g)
        return fix_signs(u), s

    return factors(g) if g.shape[-2] <= linalg.TOGETHER else per_matrix(factors, g)


def leading(
    g: jax.Array,
    rank: int,
    decomposition: Decomposition | None = None,
    keys: jax.Array | None = None,
    old: jax.Array | None = None,
) -> jax.Array:
    """The r leading left singular vectors of G: (*batch, m, r).

    Args:
      g: (*batch, m, n) with m <= n.
      rank: r <= m.
      decomposition: as in `left_singular`, or two power steps and a Rayleigh-Ritz
        step: "randomized" from G's product with a Gaussian matrix (Halko, Martinsson
        and Tropp 2011, algorithms 4.3 and 5.1), "iterate" from the old basis.
      keys: one key per matrix, (*batch,), for those two.
      old: (*batch, m, r), for "iterate".
    """
    if decomposition not in ("randomized", "iterate"):
        return left_singular(g, decomposition)[0][..., :rank]
    if keys is None:
        raise ValueError(f"decomposition={decomposition!r} draws a sketch: pass a key")
    if (old is None) == (decomposition == "iterate"):
        raise ValueError('the old basis is for decomposition="iterate", which needs it')
    m, n = g.shape[-2:]
    width = min(rank + OVERSAMPLING, m)

    def sketched(g: jax.Array, keys: jax.Array, *old: jax.Array) -> jax.Array:
        g = linalg.unit_largest(g)
        if old:
            q = jnp.concatenate([*old, _gaussian(keys, m, width - rank, g)], axis=-1)
        else:
            sketch = matmul(g, _gaussian(keys, n, width, g), linalg.COARSE)
            q = orthonormalize(sketch)
        return ritz(g, power_steps(g, q), rank)

    args = (keys,) if old is None else (keys, old)
    return sketched(g, *args) if m <= ONE_CALL else per_matrix(sketched, g, *args)


def power_steps(g: jax.Array, q: jax.Array, count: int = 2) -> jax.Array:
    """Q <- orthonormal basis of G G^T Q, `count` times: (*batch, m, w).

    All products except the last are coarse. The result is still in the span of G's
    columns, up to float32's rounding.
    """
    for left in reversed(range(count)):
        z = matmul(transpose(g), q, linalg.COARSE)
        q = orthonormalize(matmul(g, z, linalg.COARSE if left else linalg.EXACT))
    return q


def ritz(g: jax.Array, q: jax.Array, rank: int) -> jax.Array:
    """The best r of span(Q) as left singular vectors of G: (*batch, m, r)."""
    inner, _ = left_singular(matmul(transpose(q), g), "gram")
    return fix_signs(matmul(q, inner[..., :rank]))


def _gaussian(keys: jax.Array, rows: int, columns: int, like: jax.Array) -> jax.Array:
    x = linalg.normal(keys.reshape(-1), (rows, columns), like.dtype)
    return linalg.fence(x.reshape(*like.shape[:-2], rows, columns))


def check_full(decomposition: Decomposition | None) -> None:
    """ValueError for a decomposition that computes only some singular vectors."""
    if decomposition not in (None, "svd", "gram"):
        raise ValueError(
            f"decomposition={decomposition!r} computes no full set of singular "
            'vectors; choose "svd", "gram" or None'
        )


def fix_signs(u: jax.Array) -> jax.Array:
    """Makes each column's entry of largest magnitude positive.

    A singular vector is defined up to its sign; a fixed choice keeps moments that are
    not rotated meaningful while the subspace stands still.
    """
    largest = jnp.take_along_axis(
        u, jnp.argmax(jnp.abs(u), axis=-2, keepdims=True), axis=-2
    )
    return u * jnp.where(largest < 0, -1, 1).astype(u.dtype)
