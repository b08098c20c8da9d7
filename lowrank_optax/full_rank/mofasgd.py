"""Step: the polar factor of a momentum that is stored as a low-rank SVD (MoFaSGD)."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.core.aliases import Key, Number
from lowrank_optax.core.frame import Frame
from lowrank_optax.core.keys import check_key
from lowrank_optax.core.linalg import (
    largest,
    matmul,
    orthonormalize,
    polar,
    row_squares,
    rows_above,
    select,
    transpose,
)
from lowrank_optax.core.sharding import shard_batch
from lowrank_optax.core.singular import left_singular
from lowrank_optax.core.spread import replicated
from lowrank_optax.core.stage import check_first, frame_stage
from lowrank_optax.full_rank.factors import left_zeros, random_right


class MomentumFactorsState(NamedTuple):
    """State of `scale_by_mofasgd`; False at leaves of full rank.

    Attributes:
      left: U, (*batch, m, r); zero before the first gradient that is not zero.
      sizes: sigma, (*batch, r), descending.
      right: V^T, (*batch, r, n).
    """

    left: optax.Params
    sizes: optax.Params
    right: optax.Params


def scale_by_mofasgd(
    decay: Number = 0.95, *, key: Key
) -> optax.GradientTransformationExtraArgs:
    """The polar factor of a momentum U diag(sigma) V^T of rank r (MoFaSGD).

        [U, G V] = P R_U,    [V, G^T U] = Q R_V
        C = R_U [decay diag(sigma) - U^T G V, I; I, 0] R_V^T      (2r, 2r)
        C ~ U'' diag(sigma) V''^T, its r leading singular triplets
        U <- P U'',    V <- Q V'',    step = U V^T

    P C Q^T is decay U diag(sigma) V^T plus the part of G in the tangent space of the
    matrices of rank r, U U^T G + G V V^T - U U^T G V V^T (Mahdavinia and Mahdavi 2025,
    "Low-rank Momentum Factorization for Memory Efficient Training", Algorithm 1). No
    array of momentum is formed. Use it alone inside `full_matrices(rank=r)` or
    `low_rank`. The step's singular values are one, and zero where those of C are only
    rounding.

    U is sharded as a basis is, and V^T as G is along n.

    Deviations: U begins as zero and V at random, so that the first step is that of a
    sketch of G; the released code begins with the SVD of the weights. The released code
    can also divide the step by sigma, and add the part of G outside of U and V. A zero
    gradient leaves U and V.

    Args:
      decay: beta, the decay rate of the momentum.
      key: a seed or a typed key for the first V.

    Raises:
      ValueError: a key that is neither an int nor typed; at update, without a bracket.

    Example:
      >>> stages = optax.chain(lro.full_rank.scale_by_mofasgd(key=0),
      ...     lro.recovery.scale_by_shape(0.2))
      >>> tx = lro.full_rank.full_matrices(lro.steps.with_rest(stages), rank=2)
      >>> state = tx.init({"w": jnp.ones((6, 8))})
      >>> optax.tree.get(state, "sizes")["w"].shape
      (2,)
    """
    check_key(key)

    def no_sizes(frame: Frame) -> jax.Array:
        zeros = jnp.zeros((*frame.batch, frame.rank), frame.gradient.dtype)
        return shard_batch(frame, zeros)

    def one(
        frame: Frame, left: jax.Array, sizes: jax.Array, right: jax.Array
    ) -> tuple[Frame, jax.Array, jax.Array, jax.Array]:
        check_first(frame, "step")
        G, product = frame.gradient, partial(jnp.matmul, precision=frame.precision)
        U, V = replicated(left), transpose(right)
        GV, GU = replicated(product(G, V)), transpose(product(transpose(U), G))
        P, Q = _basis(U, GV), _basis(V, GU)
        PU, VQ = matmul(transpose(P), U), matmul(transpose(V), Q)
        middle = decay * sizes[..., None] * VQ - matmul(matmul(transpose(U), GV), VQ)
        C = matmul(PU, middle + matmul(transpose(GU), Q))
        C = C + matmul(matmul(transpose(P), GV), VQ)
        inner = left_singular(C)[0][..., : frame.rank]
        # Rows that are only rounding would be as long as others in the polar factor.
        size = largest(C)  # or squares of small entries underflow
        rows = matmul(transpose(inner), C / size)
        rows = rows_above(rows, 64 * float(jnp.finfo(rows.dtype).eps))
        turn = polar(rows)
        step = product(matmul(P, inner), matmul(turn, transpose(Q)))
        lengths, nonzero = size * jnp.sqrt(row_squares(rows)), frame.nonzero()
        return (
            frame.replace(step=step),
            select(nonzero, matmul(P, inner), left),
            select(nonzero, lengths[..., 0], decay * sizes),
            select(nonzero, matmul(_completed(turn), transpose(Q)), right),
        )

    right = partial(random_right, key=key)
    return frame_stage(MomentumFactorsState, one, left_zeros, no_sizes, right)


def _basis(u: jax.Array, x: jax.Array) -> jax.Array:
    """An orthonormal basis of the columns of U and X, (*batch, m, min(2r, m))."""
    m, r = u.shape[-2:]
    if 2 * r >= m:
        return jnp.broadcast_to(jnp.eye(m, dtype=u.dtype), (*u.shape[:-2], m, m))
    x = x - matmul(u, matmul(transpose(u), x))
    length = jnp.max(jnp.abs(x), axis=-2, keepdims=True)
    x = x / jnp.where(length > 0, length, 1)
    return orthonormalize(jnp.concatenate([u, x], axis=-1))


def _completed(o: jax.Array) -> jax.Array:
    """O (*batch, r, k) with orthonormal rows in place of zero rows, which come last."""
    return transpose(orthonormalize(transpose(o)))
