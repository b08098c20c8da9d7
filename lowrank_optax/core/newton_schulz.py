"""The polar factor of a matrix by products alone (Newton-Schulz iterations)."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lowrank_optax.core import linalg
from lowrank_optax.core.aligned import pad_matrix

Quintic = tuple[float, float, float]
"""(a, b, c) of the odd polynomial p(x) = a x + b x^3 + c x^5."""

# Muon's (Jordan et al. 2024): steep at zero, and within 0.3 of one after five times,
# for singular values from 3e-3 to one.
MUON: Quintic = (3.4445, -4.7750, 2.0315)

FITTED: tuple[Quintic, ...] = (
    (3.7204, -10.9562, 8.1173),
    (4.1768, -13.8770, 12.7534),
    (3.7235, -7.0583, 4.7225),
)
"""Three quintics, fitted to the spectra of residuals (docs/results/polar_factor.md)."""


def newton_schulz(
    x: jax.Array, iterations: int, dtype: DTypeLike | None = None
) -> jax.Array:
    """About U V^T of X = U diag(s) V^T: (*batch, m, n), m <= n; zero for a zero X.

    Muon's: X <- a X + (b X X^T + c (X X^T)^2) X, from X / ||X||_F. Singular values end
    between about 0.7 and 1.2; very small ones stay below.

    Args:
      x: the matrices.
      iterations: how many steps.
      dtype: of the factors of the products; None for that of X, multiplied at the
        highest precision.
    """
    original, (m, n) = x.dtype, x.shape[-2:]
    x = linalg.unit_largest(x)
    norm = jnp.sqrt(jnp.sum(jnp.square(x), axis=(-2, -1), keepdims=True))
    x = pad_matrix((x / jnp.where(norm > 0, norm, 1)).astype(dtype or original))

    def step(_: int, x: jax.Array) -> jax.Array:
        gram = _product("...ik,...jk->...ij", x, x, dtype)
        return _polynomial(MUON, x, gram, _squared(gram, dtype), dtype)

    return jax.lax.fori_loop(0, iterations, step, x)[..., :m, :n].astype(original)


def polar_of_spectrum(
    x: jax.Array, coefficients: Sequence[Quintic], dtype: DTypeLike | None = None
) -> tuple[jax.Array, jax.Array]:
    """About U V^T of X, by few quintics that are made for spectra like its own.

    X / ||X||_S, where the Schatten norm (sum_i s_i^8)^(1/8) is at least the largest
    singular value, and seldom a tenth more. It costs nothing: with A = X X^T, which
    the first quintic needs anyway, it is ||A^2||_F^(1/4). The Frobenius norm of a
    residual is two to six times as large, which Muon's first steps make up for.

    Args:
      x: (*batch, m, n) with m <= n; its squares must neither over- nor underflow.
      coefficients: of the quintics, in their order.
      dtype: as in `newton_schulz`.

    Returns:
      The factor in the dtype of the products, (*batch, m, n), zero for a zero X; and
      ||X||_F^2, (*batch, 1, 1) in the dtype of X.
    """
    original, (m, n) = x.dtype, x.shape[-2:]
    x = pad_matrix(x.astype(dtype or original))
    squared = jnp.zeros((*x.shape[:-2], 1, 1), original)
    for i, quintic in enumerate(coefficients):
        gram = _product("...ik,...jk->...ij", x, x, dtype)
        if i:
            x = _polynomial(quintic, x, gram, _squared(gram, dtype), dtype)
            continue
        squared = jnp.trace(gram.astype(original), axis1=-2, axis2=-1)[..., None, None]
        # Of trace one, or the eighth powers of a small X would underflow.
        gram = _over(gram.astype(original), squared).astype(x.dtype)
        square = _squared(gram, dtype)
        eighth = jnp.sum(jnp.square(square.astype(original)), (-2, -1), keepdims=True)
        a, b, c = quintic
        root = eighth**0.25  # ||X||_S^2 / ||X||_F^2
        size = jnp.sqrt(squared) * jnp.sqrt(root)
        scaled = [_over(a, size), _over(b, size * root), _over(c, size * root**2)]
        x = _polynomial(scaled, x, gram, square, dtype)
    return x[..., :m, :n], squared


def _polynomial(
    quintic: Sequence[jax.Array | float],
    x: jax.Array,
    gram: jax.Array,
    square: jax.Array,
    dtype: DTypeLike | None,
) -> jax.Array:
    """a X + (b A + c A^2) X."""
    a, b, c = quintic
    wide = jnp.promote_types(x.dtype, jnp.float32)
    polynomial = (b * gram.astype(wide) + c * square.astype(wide)).astype(x.dtype)
    rest = _product("...ij,...jk->...ik", polynomial, x, dtype)
    return (a * x.astype(wide) + rest.astype(wide)).astype(x.dtype)


def _squared(gram: jax.Array, dtype: DTypeLike | None) -> jax.Array:
    return _product("...ij,...jk->...ik", gram, gram, dtype)


def _product(
    spec: str, a: jax.Array, b: jax.Array, dtype: DTypeLike | None
) -> jax.Array:
    """An einsum, at the highest precision where no dtype of its factors is given."""
    return jnp.einsum(spec, a, b, precision="highest" if dtype is None else None)


def _over(a: jax.Array | float, b: jax.Array) -> jax.Array:
    """a / b, and 0 where b is 0."""
    return jnp.where(b > 0, jnp.asarray(a, b.dtype) / jnp.where(b > 0, b, 1), 0)
