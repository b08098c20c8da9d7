"""Step: moments stored as low-rank factors (MLorc)."""

import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.core.aliases import Key
from lowrank_optax.core.checks import transformation
from lowrank_optax.core.frame import Frame
from lowrank_optax.core.keys import canonical_key, check_key
from lowrank_optax.core.layout import STACKED, layout_of
from lowrank_optax.core.like_params import map_like_params
from lowrank_optax.core.linalg import largest, orthonormalize, transpose
from lowrank_optax.core.moments import register_storage
from lowrank_optax.core.paths import path_of
from lowrank_optax.core.rules import Rank, check_rank, rank_of
from lowrank_optax.core.sharding import (
    low_zeros,
    on_auto_axes,
    shard_basis,
    shard_batch,
)
from lowrank_optax.core.spread import replicated
from lowrank_optax.core.stage import stage
from lowrank_optax.core.trees import nothing


class FactoredState(NamedTuple):
    """State of `factor_moments`.

    Attributes:
      rng_key: (2,) uint32, the data of a threefry key for the next sketches.
      inner_state: the inner transformation's state, with L (*batch, m, r) in place of
        every factored moment M = L R.
      right: R (*batch, r, n), in a tree for each tree of the inner state, in its order;
        False for an array that is not factored.
      nonnegative: (*batch,) bool, whether M had no negative number; as `right`.
    """

    rng_key: jax.Array
    inner_state: optax.OptState
    right: tuple[optax.Params, ...]
    nonnegative: tuple[optax.Params, ...]


class Factors(NamedTuple):
    """A moment as it is stored; see `FactoredState`."""

    left: jax.Array
    right: jax.Array
    nonnegative: jax.Array


def factor_moments(
    inner: optax.GradientTransformation,
    rank: Rank,
    *,
    key: Key,
    precision: jax.lax.PrecisionLike = None,
) -> optax.GradientTransformationExtraArgs:
    """Stores `inner`'s moments as low-rank factors, M ~ L R (MLorc).

    At each step, with M_- the negative entries of L R, and X (n, r) Gaussian:

        M <- L R;  where M had no negative entry, M_ij <- mean |M_-| for M_ij < 0
        update, M <- inner(G, M)
        L <- orth(M M^T orth(M X)),  R <- L^T M

    (Shen et al. 2025, "MLorc", Algorithm 1; L R is the randomized SVD of the released
    code, with one power step and no more columns than the rank.) The step is `inner`'s,
    on the full gradient. A matrix stores r (m + n) numbers for each moment; during a
    step there is all of M, with `per_layer` that of one layer. L is sharded along m, or
    r, over all mesh axes that shard M, and R as M is along n. Use it inside
    `full_step`, or inside `in_subspace`.

    The moments are the arrays of `inner`'s state that belong to a parameter. Their last
    two axes are the matrix. Axes before them are layers, which share X. An array stays
    as it is if it has fewer axes, or if r (m + n) >= m n.

    Deviations: the released code stores the singular values and vectors of L R. It
    replaces the negative numbers of Adam's second moment alone; here those of any
    moment that had none when it was stored.

    Args:
      inner: any optax transformation, such as `optax.scale_by_adam()`, whose moments
        begin as constants, as all of optax's do.
      rank: r, an int, a fraction of the smaller side, or rules by path (`low_rank`).
      key: a seed or a typed key for X, which is drawn at every step.
      precision: of the products with M, as `jax.lax.dot_general` takes it.

    Raises:
      ValueError: a rank below 1, a path that no rule covers, or a key that is neither
        an int nor typed.

    Example:
      >>> tx = lro.steps.factor_moments(optax.scale_by_adam(), rank=4, key=0)
      >>> state = tx.init({"w": jnp.ones((64, 512)), "b": jnp.ones(512)})
      >>> optax.tree.get(state, "mu")["w"].shape, state.right[-1]["w"].shape
      ((64, 4), (4, 512))
    """
    check_rank(rank, "factor_moments()")
    check_key(key)
    inner = transformation("factor_moments()", inner)

    def begun(path: str, x: jax.Array) -> Factors:
        r = _rank(rank, path, x)
        return Factors(x, nothing(), nothing()) if r is None else _begun(path, x, r)

    def init(params: optax.Params) -> FactoredState:
        state = inner.init(params)
        begins = map_like_params(begun, inner, state)
        leaves, structure = jax.tree.flatten(state)
        lefts = [
            f.left if _is_factors(f) else x
            for x, f in zip(
                leaves, jax.tree.leaves(begins, is_leaf=_is_factors), strict=True
            )
        ]
        right, nonnegative = (
            jax.tree.map(
                lambda f, i=i: f[i] if _is_factors(f) else nothing(),
                begins,
                is_leaf=_is_factors,
            )
            for i in (1, 2)
        )
        data = jax.random.bits(canonical_key(key), (2,), jnp.uint32)
        return FactoredState(data, structure.unflatten(lefts), right, nonnegative)

    def update(
        updates: optax.Updates,
        state: FactoredState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, FactoredState]:
        moments = _multiplied(state, precision)
        updates, new = inner.update(updates, moments, params, **extra_args)
        following, drawn = jax.random.split(_typed(state.rng_key))
        new = _factored_like(state, new, drawn, precision)
        return updates, new._replace(rng_key=jax.random.key_data(following))

    def on_any_mesh(
        updates: optax.Updates,
        state: FactoredState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, FactoredState]:
        like = updates, state
        return on_auto_axes(update, updates, state, params, like=like, **extra_args)

    return stage(init, on_any_mesh)


def _is_factors(x: object) -> bool:
    return isinstance(x, Factors)


def _typed(data: jax.Array) -> jax.Array:
    return jax.random.wrap_key_data(data, impl="threefry2x32")


def _rank(rank: Rank, path: str, x: jax.Array) -> int | None:
    """r, or None for an array that is stored as it is."""
    if x.ndim < 2 or not jnp.issubdtype(x.dtype, jnp.floating) or not x.size:
        return None
    m, n = x.shape[-2:]
    r = rank_of(rank, path, layout_of(path, x.shape, STACKED))
    return None if r is None or r * (m + n) >= m * n else r


def _begun(path: str, x: jax.Array, rank: int) -> Factors:
    """The factors of a constant: a column of ones times the first row."""
    tall = x.shape[-2] > x.shape[-1]
    frame = Frame(gradient=transpose(x) if tall else x, rank=rank, path=path)
    zeros = Factors(
        shard_basis(frame, jnp.zeros(frame.basis_shape, x.dtype)),
        low_zeros(frame),
        shard_batch(frame, jnp.zeros(frame.batch, bool)),
    )

    def first(x: jax.Array, zeros: Factors) -> Factors:
        right = zeros.right.at[..., 0, :].set(x[..., 0, :])
        left = zeros.left.at[..., 0].set(1)
        return Factors(left, right, jnp.all(x >= 0, axis=(-2, -1)))

    factors = on_auto_axes(first, frame.gradient, zeros, like=zeros)
    return _turned(factors) if tall else factors


def _turned(factors: Factors) -> Factors:
    """The factors of M^T."""
    left, right, nonnegative = factors
    return Factors(transpose(right), transpose(left), nonnegative)


def product_of(factors: Factors, precision: jax.lax.PrecisionLike = None) -> jax.Array:
    """M = L R, without negative numbers where it had none."""
    left, right, nonnegative = factors
    wide = jnp.promote_types(left.dtype, jnp.float32)
    m = jnp.matmul(left.astype(wide), right.astype(wide), precision=precision)
    negative = nonnegative[..., None, None] & (m < 0)
    total = jnp.sum(jnp.where(negative, -m, 0), axis=(-2, -1), keepdims=True)
    count = jnp.sum(negative, axis=(-2, -1), keepdims=True)
    return jnp.where(negative, total / jnp.maximum(count, 1), m).astype(left.dtype)


def factors_of(
    x: jax.Array,
    rank: int,
    key: jax.Array,
    precision: jax.lax.PrecisionLike = None,
) -> Factors:
    """The leading part of M, (*batch, m, n), by a randomized SVD of one power step."""
    if x.shape[-2] > x.shape[-1]:
        return _turned(factors_of(transpose(x), rank, key, precision))
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    scale = largest(wide)
    unit, n = wide / scale, x.shape[-1]
    sketch = jax.random.normal(key, (n, rank), wide.dtype)
    y = jnp.broadcast_to(sketch, (*x.shape[:-2], n, rank))

    def twice(_: int, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
        y = carry[0]
        # Replicated, so that each device has the same bits of what it factorizes.
        q = orthonormalize(replicated(jnp.matmul(unit, y, precision=precision)))
        return jnp.matmul(transpose(unit), q, precision=precision), q

    # A loop, and not twice the code, which takes long to compile.
    q = jnp.zeros((*x.shape[:-1], rank), wide.dtype)
    y, q = jax.lax.fori_loop(0, 2, twice, (y, q))
    return Factors(
        q.astype(x.dtype),
        (scale * transpose(y)).astype(x.dtype),
        jnp.all(x >= 0, axis=(-2, -1)),
    )


def _multiplied(
    state: FactoredState, precision: jax.lax.PrecisionLike = None
) -> optax.OptState:
    """Returns the inner state with full moments."""
    lefts, structure = jax.tree.flatten(state.inner_state)
    rights, flags = map(jax.tree.leaves, (state.right, state.nonnegative))
    return structure.unflatten(
        product_of(Factors(left, right, flag), precision)
        if right.dtype != jnp.bool_
        else left
        for left, right, flag in zip(lefts, rights, flags, strict=True)
    )


def _factored_like(
    state: FactoredState,
    inner_state: optax.OptState,
    key: jax.Array | None = None,
    precision: jax.lax.PrecisionLike = None,
) -> FactoredState:
    """Factors the arrays of `inner_state` that are factored in `state`."""
    key = _typed(state.rng_key) if key is None else key
    leaves, structure = jax.tree.flatten(inner_state)
    rights, inside = jax.tree_util.tree_flatten_with_path(state.right)
    factors = []
    for x, (path, right) in zip(leaves, rights, strict=True):
        if right.dtype == jnp.bool_:
            factors.append(Factors(x, right, nothing()))
            continue
        own = _key_of(key, path)
        factors.append(factors_of(x, right.shape[-2], own, precision))
    return FactoredState(
        state.rng_key,
        structure.unflatten([f.left for f in factors]),
        inside.unflatten([f.right for f in factors]),
        inside.unflatten([f.nonnegative for f in factors]),
    )


def _key_of(key: jax.Array, path: jax.tree_util.KeyPath) -> jax.Array:
    """The key of a moment, from its place among the trees and its parameter's path."""
    tree, *own = path
    number = zlib.crc32(path_of(tuple(own)).encode())
    return jax.random.fold_in(jax.random.fold_in(key, number), tree.idx)


register_storage(FactoredState, unpack=_multiplied, pack=_factored_like)
