"""The linear algebra of subspaces: products, orthonormal bases, eigenvectors.

Everything runs at the highest matmul precision unless it says otherwise, since a
product in bfloat16 or tf32 loses orthonormality, and takes leading batch axes. A batch
of factorisations is a loop, which keeps its workspace to one matrix: on an H200 a
batched QR took twenty times as long. Eigendecompositions up to `TOGETHER` are the
exception: one does not fill a device.
"""

import functools
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax.lax.linalg import EighImplementation
from jax.typing import DTypeLike

from lowrank_optax.core.aliases import Number
from lowrank_optax.core.loops import per_matrix
from lowrank_optax.core.tall_qr import tall_q

T = TypeVar("T")

# The largest m for which a batch of eigendecompositions is faster in one call than in a
# loop. On an H100, 56 of 512 x 512: 27 ms against 266; 168 of 1024 x 1024: 289 against
# 1,799; of 2048 x 2048 the loop is faster.
TOGETHER = 1024

# The compiler may not simplify across a fence. Otherwise it would rearrange constants,
# divisions and sums differently for one device, for pmap and for a mesh, and bases
# computed from the same numbers would differ by an ulp.
fence = jax.lax.optimization_barrier


EXACT = jax.lax.Precision.HIGHEST
"""float32 products of float32 factors."""

COARSE = jax.lax.Precision.HIGH
"""TF32 on a GPU, three bfloat16 products on a TPU: for a Z of which only G Z counts,
which is in the span of G's columns whatever Z is.
"""


def product(
    a: jax.Array, b: jax.Array, precision: jax.lax.Precision = EXACT
) -> jax.Array:
    """a b."""
    return jnp.matmul(a, b, precision=precision)


def matmul(
    a: jax.Array, b: jax.Array, precision: jax.lax.Precision = EXACT
) -> jax.Array:
    """a b, fenced."""
    a, b = fence((a, b))
    return fence(product(a, b, precision))


def together(f: Callable[[jax.Array], T], x: jax.Array) -> T:
    """`f` on all matrices of x (*batch, m, n) in one call, but in a loop on a CPU.

    LAPACK's batched calls in jaxlib 0.10 hold a thread of XLA's pool while they wait
    for others. As many calls at once as there are cores wait for ever. `per_matrix`
    makes none, even under `jax.vmap`.
    """
    return jax.lax.platform_dependent(
        x, cpu=functools.partial(per_matrix, f), default=f
    )


def transpose(x: jax.Array) -> jax.Array:
    return jnp.swapaxes(x, -1, -2)


def size(x: jax.Array) -> jax.Array:
    """max |x| of each matrix, (*batch, 1, 1)."""
    return jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True)


def largest(x: jax.Array) -> jax.Array:
    """`size`, and 1 for a zero matrix."""
    scale = size(x)
    return jnp.where(scale > 0, scale, 1)


def unit_largest(x: jax.Array) -> jax.Array:
    """x with a largest entry of one, so that small and large ones round alike."""
    return fence(x / largest(x))


def gram(x: jax.Array) -> jax.Array:
    """x^T x: (*batch, m, r) to (*batch, r, r)."""
    return matmul(transpose(x), x)


def orthonormality_error(s: jax.Array) -> jax.Array:
    """max |S^T S - I| over the batch, a scalar."""
    return jnp.max(jnp.abs(minus_identity(gram(s))))


def minus_identity(x: jax.Array) -> jax.Array:
    """x - I, of (*batch, r, r)."""
    return x - jnp.broadcast_to(jnp.eye(x.shape[-1], dtype=x.dtype), x.shape)


def orthonormalize(x: jax.Array) -> jax.Array:
    """An orthonormal basis of the columns' span, (*batch, m, r) with r <= m.

    CholeskyQR2 (Yamamoto et al. 2015, "Roundoff error analysis of the CholeskyQR2
    algorithm"): X = Q R with R from the Cholesky factor of X^T X, done twice. It is
    matrix products almost alone, but breaks down once the condition number passes
    about 1 / sqrt(eps). Such matrices go through two passes with a shifted X^T X first
    (Fukaya et al. 2020, "Shifted Cholesky QR"). If that does not help, X gets noise at
    rounding level, which makes rank-deficient and zero matrices full rank, and eight
    passes with a larger shift. What a matrix goes through does not depend on the
    others.
    """
    return _orthonormalized(x)


@jax.custom_batching.custom_vmap
def _orthonormalized(x: jax.Array) -> jax.Array:
    heights = jnp.max(jnp.abs(x), axis=-2, keepdims=True)
    x = fence(x / jnp.where(heights > 0, heights, 1))  # or squares would underflow
    eps, rounding = float(jnp.finfo(x.dtype).eps), x.shape[-2] ** 0.5
    # Two passes leave an error of a few eps. The Gram matrix that shows it rounds by up
    # to sqrt(m) eps. In float32 50 eps is 6e-6.
    tolerance = max(50, rounding) * eps

    def accurate(q: jax.Array) -> jax.Array:
        # A NaN is not accurate, and is compared by itself: XLA's maximum of NaNs is
        # -inf on a CPU.
        return jnp.all(jnp.abs(minus_identity(gram(q))) < tolerance, axis=(-2, -1))

    def again(state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        count, good, q = state
        start = jax.lax.cond(count == 2, _full_rank, lambda x: x, x)
        # Above the rounding of a sum of m squares, where X was only that.
        shift = jnp.where(count == 2, eps * rounding, eps)
        shifted = jnp.where(count == 2, 8, 2 * count)
        q = select(good, q, _cholesky_passes(start, shifted, shift))
        return count + 1, accurate(q), q

    def plain(x: jax.Array) -> tuple[jax.Array, ...]:
        q = _cholesky_passes(x, shifted=0, shift=eps)
        return jnp.int32(1), accurate(q), q

    def nothing(x: jax.Array) -> tuple[jax.Array, ...]:
        return jnp.int32(0), jnp.zeros(x.shape[:-2], bool), x

    # A loop, and not three times the code, which takes long to compile. For a GPU the
    # plain passes stand before it: there the host waits for the test of a loop whose
    # length the device decides.
    start = jax.lax.platform_dependent(x, cpu=nothing, tpu=nothing, default=plain)
    return jax.lax.while_loop(
        lambda state: (state[0] < 3) & ~jnp.all(state[1]), again, start
    )[2]


def _full_rank(x: jax.Array) -> jax.Array:
    """X plus noise at the level of its columns' rounding."""
    length = jnp.sqrt(column_norms_squared(x))[..., None, :]
    noise = jax.random.normal(jax.random.key(0), x.shape[-2:], x.dtype)
    level = jnp.finfo(x.dtype).eps * jnp.where(length > 0, length, 1)
    return x + level * jnp.broadcast_to(noise, x.shape)


@_orthonormalized.def_vmap
def _(_: int, batched: list[bool], x: jax.Array) -> tuple[jax.Array, bool]:
    """Under `jax.vmap` one more batch axis, so that the loop's test is one number."""
    return _orthonormalized(x), batched[0]


def _cholesky_passes(
    x: jax.Array, shifted: jax.Array | int, shift: jax.Array | float
) -> jax.Array:
    """X <- X R^-1 with R^T R = X^T X + shift trace(X^T X) I, and two without a shift.

    `shifted` is the number of those with one.
    """

    def squares(i: jax.Array, x: jax.Array) -> jax.Array:
        a = gram(x)
        own = jnp.where(i < shifted, shift, 0).astype(x.dtype)
        trace = jnp.trace(a, axis1=-2, axis2=-1)[..., None, None]
        eye = jnp.broadcast_to(jnp.eye(x.shape[-1], dtype=x.dtype), a.shape)
        return a + own * trace * eye

    def solve(i: jax.Array, x: jax.Array) -> jax.Array:
        lower = jnp.linalg.cholesky(squares(i, x))
        return jax.lax.linalg.triangular_solve(lower, x, transpose_a=True, lower=True)

    def invert(i: jax.Array, x: jax.Array) -> jax.Array:
        return matmul(x, transpose(inverse_cholesky(squares(i, x))))

    def passes(step: Callable[..., jax.Array], x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, shifted + 2, step, x)

    return jax.lax.platform_dependent(
        x,
        tpu=functools.partial(passes, invert),
        default=lambda x: together(functools.partial(passes, solve), x),
    )


# For TPUs XLA unrolls a Cholesky factorization, a triangular solve and a QR into code
# that grows with the square of their size, and compiles it for minutes at rank 1024. So
# they are limited to PANEL columns, and what is done twice is a loop.
PANEL = 128


def inverse_cholesky(a: jax.Array) -> jax.Array:
    """L^-1 of A = L L^T, (*batch, r, r), by panels of its rows.

    With X = L^-1 of the rows above, those of a panel i are

        L_i = A_i X^T,  L_ii L_ii^T = A_ii - L_i L_i^T,  X_i = L_ii^-1 (I_i - L_i X).
    """
    r = a.shape[-1]
    width = min(PANEL, r)
    panels = -(-r // width)
    more = jnp.arange(r, panels * width)  # rows and columns of the identity
    around = [(0, 0)] * (a.ndim - 2) + [(0, len(more))] * 2
    a = jnp.pad(a, around).at[..., more, more].set(1)
    eye = jnp.broadcast_to(jnp.eye(width, dtype=a.dtype), (*a.shape[:-2], width, width))

    def step(i: jax.Array, x: jax.Array) -> jax.Array:
        rows = jax.lax.dynamic_slice_in_dim(a, i * width, width, -2)
        own = jax.lax.dynamic_slice_in_dim(rows, i * width, width, -1)
        left = matmul(rows, transpose(x))  # zero from the panel on, as X is
        lower = jnp.linalg.cholesky(own - matmul(left, transpose(left)))
        inverse = jax.lax.linalg.triangular_solve(
            lower, eye, left_side=True, lower=True
        )
        new = -matmul(inverse, matmul(left, x))
        new = jax.lax.dynamic_update_slice_in_dim(new, inverse, i * width, -1)
        return jax.lax.dynamic_update_slice_in_dim(x, new, i * width, -2)

    x = jax.lax.fori_loop(0, panels, step, jnp.zeros_like(a))
    return x[..., :r, :r]


def qr_by_panels(x: jax.Array) -> jax.Array:
    """An orthonormal basis of the columns' span, (m, r), of any matrix with r <= m.

    Gram-Schmidt for panels of columns, each with a Householder QR, three times over:
    what is left of a panel after the first may be rounding alone. A noise of the size
    of rounding gives x what it lacks of rank.
    """
    m, r = x.shape
    panels = -(-r // PANEL)
    width = -(-r // panels)
    noise = jax.random.normal(jax.random.key(0), (m, panels * width), x.dtype)
    x = jnp.pad(x, ((0, 0), (0, panels * width - r)))
    length = jnp.sqrt(jnp.max(jnp.sum(x**2, axis=0)))
    x = x + jnp.finfo(x.dtype).eps * jnp.where(length > 0, length, 1) * noise

    def step(i: jax.Array, q: jax.Array) -> jax.Array:
        panel = jax.lax.dynamic_slice_in_dim(x, i * width, width, 1)
        panel = jax.lax.fori_loop(
            0,
            3,
            lambda _, p: tall_q(p - matmul(q, matmul(transpose(q), p))),
            panel,
        )
        return jax.lax.dynamic_update_slice_in_dim(q, panel, i * width, 1)

    return jax.lax.fori_loop(0, panels, step, jnp.zeros_like(x))[:, :r]


def complement(u: jax.Array) -> jax.Array:
    """The orthogonal complement: (*batch, m, r) orthonormal to (*batch, m, m - r).

    An orthonormal basis of it, by a QR that completes the columns.
    """

    def complete(u: jax.Array) -> jax.Array:
        return jnp.linalg.qr(u, mode="complete")[0]

    def by_panels(u: jax.Array) -> jax.Array:
        m, r = u.shape
        return qr_by_panels(jnp.concatenate([u, jnp.eye(m, dtype=u.dtype)[:, r:]], 1))

    def one(u: jax.Array) -> jax.Array:
        q = jax.lax.platform_dependent(u, tpu=by_panels, default=complete)
        return q[:, u.shape[1] :]

    return per_matrix(one, u)


def polar(x: jax.Array) -> jax.Array:
    """The orthonormal factor O of X = H O: (*batch, r, n), U V^T of X = U S V^T.

    O is the nearest matrix to X with orthonormal rows. It comes from the eigenvectors
    of X X^T, which is r x r. Eigenvalues below eps times the largest are rounding, so
    it runs twice; the first pass leaves no such eigenvalues. In float32 O is
    orthonormal to 1e-5 up to a condition of 1e4, and differs from the exact one by up
    to 40 eps times the condition. A zero X has a zero O. In a direction where X is only
    rounding, O has anything up to one, where an SVD has one.
    """
    eps = jnp.finfo(x.dtype).eps

    def closer(x: jax.Array) -> jax.Array:
        values, vectors = eigh(gram(transpose(x)))
        floor = jnp.maximum(eps * values[..., -1:], jnp.finfo(x.dtype).tiny)
        scaled = vectors / jnp.sqrt(jnp.maximum(values, floor))[..., None, :]
        return matmul(matmul(scaled, transpose(vectors)), x)

    return closer(closer(unit_largest(x)))


def polish(s: jax.Array) -> jax.Array:
    """One Newton-Schulz step, S (3 I - S^T S) / 2, towards the nearest orthonormal.

    It squares an orthonormality error well below one, down to rounding.
    """
    return fence(fence(1.5 * s) - fence(0.5 * matmul(s, gram(s))))


def eigh(a: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues, ascending, and eigenvectors of symmetric (*batch, r, r)."""
    # On a TPU the default (QDWH) takes minutes to compile from size 512 on.
    jacobi = functools.partial(
        jax.lax.linalg.eigh, implementation=EighImplementation.JACOBI
    )

    def factors(a: jax.Array) -> tuple[jax.Array, jax.Array]:
        vectors, values = jax.lax.platform_dependent(
            a, tpu=jacobi, default=jax.lax.linalg.eigh
        )
        return values, vectors

    return (together if a.shape[-1] <= TOGETHER else per_matrix)(factors, a)


def normal(keys: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
    """A standard normal array of `shape` for each of the keys (L,): (L, *shape)."""
    return jax.vmap(lambda key: jax.random.normal(key, shape, dtype))(keys)


def average_weight(gain: jax.Array, count: jax.Array) -> jax.Array:
    """1 - beta^t, the sum of a running average's weights, with gain = 1 - beta.

    By expm1 and log1p, since float32 would round 1 - beta^t away.
    """
    return -jnp.expm1(count * jnp.log1p(-gain))


def select(which: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    """x for the matrices where `which` (*batch,) is True, y for the others."""
    return jnp.where(which.reshape(which.shape + (1,) * (x.ndim - which.ndim)), x, y)


def column_norms_squared(x: jax.Array) -> jax.Array:
    return jnp.sum(jnp.square(x), axis=-2)


def rows_above(x: jax.Array, fraction: Number) -> jax.Array:
    """x with zeros in place of rows with a norm below `fraction` of ||x||_F."""
    return rows_above_by(row_squares(x), x, fraction)


def row_squares(x: jax.Array) -> jax.Array:
    """The squared norm of each row, (*batch, m, 1)."""
    return jnp.sum(jnp.square(x), axis=-1, keepdims=True)


def rows_above_by(squares: jax.Array, x: jax.Array, fraction: Number) -> jax.Array:
    """`rows_above` with `row_squares(x)`."""
    total = jnp.sum(squares, axis=-2, keepdims=True)
    # False for a NaN, which has to reach the check that skips the step.
    return jnp.where(squares < fraction**2 * total, 0, x)


def ratio(a: jax.Array, b: jax.Array, eps: Number) -> jax.Array:
    """a / (b + eps), and 0 where that denominator is 0."""
    b = b + eps
    return jnp.where(b > 0, a / jnp.where(b > 0, b, 1), 0)
