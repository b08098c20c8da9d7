"""Where: columns of one fixed matrix, the discrete cosine transform (DCT-AdamW)."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lowrank_optax.bases.follow import basis_rule, follow
from lowrank_optax.bases.rule import BasisRule, Storage
from lowrank_optax.core import linalg
from lowrank_optax.core.frame import Frame
from lowrank_optax.core.stage import Clock


def dct_columns() -> BasisRule:
    """The r columns of the DCT matrix along which the gradient is longest (DCT-AdamW).

    S_t = D[:, I_t], where I_t has the r indices with the largest sum_j |(D^T G_t)_ij|.
    D_kj = sqrt(2 / m) cos(pi k (2j + 1) / 2m), with the row k = 0 divided by sqrt(2). D
    is orthonormal, and the same for all matrices of one size (Modoranu et al. 2025,
    "FFT-based Dynamic Subspace Selection for Low-Rank Adaptive Optimization of Large
    Language Models"). Nothing is factorized, and the state is r integers. S_t^T S_{t-1}
    selects columns: `rotate_moments` keeps both moments of a column that stays, and
    starts those of a new column at zero.

    Raises:
      ValueError: at update, outside `low_rank`.

    Example:
      >>> stages = optax.chain(lro.bases.dct_columns(), lro.project(),
      ...     lro.rotate_moments(optax.scale_by_adam()), lro.project_back())
    """

    def choose(frame: Frame, _: None, __: Clock) -> jax.Array:
        g = linalg.unit_largest(frame.gradient)
        d = columns(jnp.arange(g.shape[-2]), g.shape[-2], g.dtype)
        lengths = jnp.sum(jnp.abs(linalg.matmul(d.T, g)), axis=-1)
        index = jnp.sort(jax.lax.top_k(lengths, frame.rank)[1], axis=-1)
        return unpack(frame, index)

    def pack(_: Frame, s: jax.Array) -> jax.Array:
        m = s.shape[-2]
        # The indices of the columns: D is orthonormal, so one product is 1, the rest 0.
        d = columns(jnp.arange(m), m, s.dtype)
        return jnp.argmax(jnp.abs(linalg.matmul(d.T, s)), axis=-2)

    def unpack(frame: Frame, index: jax.Array) -> jax.Array:
        return columns(index, frame.basis_shape[-2], frame.gradient.dtype)

    rule = basis_rule(choose)
    return follow(dataclasses.replace(rule.rule, storage=Storage(pack, unpack)))


def columns(index: jax.Array, m: int, dtype: DTypeLike) -> jax.Array:
    """D[:, index]: (*batch, r) integers to (*batch, m, r)."""
    # Of the indices' axes: ranks are promoted explicitly.
    k = jnp.expand_dims(jnp.arange(m), (*range(index.ndim - 1), -1))
    # The cosine has period 4m here. Reduced as integers, no angle is large enough to
    # round.
    angle = (k * (2 * index[..., None, :] + 1) % (4 * m)).astype(dtype)
    scale = jnp.where(k == 0, math.sqrt(1 / m), math.sqrt(2 / m)).astype(dtype)
    return linalg.fence(scale * jnp.cos(angle * (math.pi / (2 * m))))
