"""Where: what all basis rules share, and the rule that replays given bases."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.frame import (
    Clock,
    Frame,
    are_coordinates,
    frames_of,
    map_frames,
    nothing,
)
from lowrank_optax.layout import path_of
from lowrank_optax.linalg import replicated, transpose


class BasisState(NamedTuple):
    """State of a basis rule.

    Attributes:
      rng_key: a typed key, split at a refresh and at no other time; None for a rule
        that draws nothing.
      basis: S, (*batch, m, r) at every matrix leaf, or (*batch, r) integers where S's
        columns are coordinates; `optax.MaskedNode` at other leaves.
    """

    rng_key: jax.Array | None
    basis: Any


Choose = Callable[[Frame, jax.Array | None, Clock], jax.Array]


def check_key(key: Any) -> Any:
    """`key`; ValueError unless it is a seed or a typed key. Creates no array."""
    dtype = getattr(key, "dtype", type(key))
    typed = jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if jnp.ndim(key) or not (typed or jnp.issubdtype(dtype, jnp.integer)):
        raise ValueError(
            f"key must be an int or a typed key from jax.random.key, not {key!r}"
        )
    return key


def canonical_key(key: jax.Array | int) -> jax.Array:
    """A typed key of its own from a seed or a typed key, so that it can be donated."""
    check_key(key)
    typed = isinstance(key, jax.Array) and jnp.issubdtype(
        key.dtype, jax.dtypes.prng_key
    )
    return jax.random.clone(key) if typed else jax.random.key(key)


def clock_of(clock: Clock | None) -> Clock:
    if clock is None:
        raise ValueError("this stage works inside low_rank(), which tells it the time")
    return clock


def turn_between(new: jax.Array, old: jax.Array, dtype: Any) -> jax.Array:
    """S_t^T S_{t-1}, (*batch, r, r)."""
    if are_coordinates(new):
        return (new[..., :, None] == old[..., None, :]).astype(dtype)
    return jnp.matmul(transpose(new), old, precision="highest")


def sample_indices(frame: Frame, keys: Any, scores: jax.Array) -> jax.Array:
    """r of the indices, drawn by score without replacement and sorted.

    The first is drawn with probabilities scores / sum(scores), each next one with those
    of the indices that are left; zero scores come last, the first in order.

    Args:
      frame: gives the batch and r.
      keys: one key per matrix, of shape `frame.batch`.
      scores: (*batch, m), not negative; all zeros count as equal.

    Returns:
      (*batch, r) integers.
    """
    m, count = scores.shape[-1], math.prod(frame.batch)
    total = jnp.sum(scores, axis=-1, keepdims=True)
    weights = jnp.where(total > 0, scores / jnp.where(total > 0, total, 1), 1 / m)

    def sample(key: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.sort(jax.random.choice(key, m, (frame.rank,), replace=False, p=w))

    index = jax.vmap(sample)(keys.reshape(count), weights.reshape(count, m))
    return index.reshape(*frame.batch, frame.rank)


def with_basis(
    frame: Frame, basis: jax.Array, turn: jax.Array | None, orthonormal: bool = True
) -> Frame:
    """The Frame with S_t and S_t^T S_{t-1} set."""
    return frame.replace(basis=basis, turn=turn, orthonormal=orthonormal)


def basis_rule(
    choose: Choose,
    key: jax.Array | int | None = None,
    *,
    orthonormal: bool = True,
    coordinates: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """A basis rule from a function that chooses S_t at a refresh.

    Sets `basis` and `turn` = S_t^T S_{t-1} of each Frame. The basis before the first
    refresh is the first r coordinates.

    Args:
      choose: from a Frame (with the gradient G_t and the basis S_{t-1}), keys of shape
        `frame.batch` (None without `key`) and the `Clock` to S_t (*batch, m, r),
        orthonormal also for a zero or a rank-deficient gradient.
      key: a seed or a typed key.
      orthonormal: False for a rule whose bases are not. Stages that need S^T S = I then
        refuse it.
      coordinates: True for a rule that returns (*batch, r) distinct integers, the
        coordinates that are S's columns; products with S are then a gather and a
        scatter.

    Raises:
      ValueError: a key that is neither an int nor typed; at update, outside
        `low_rank`.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> last_coordinates = lro.basis_rule(
      ...     lambda frame, keys, clock: jnp.eye(*frame.basis_shape)[::-1])
      >>> stages = optax.chain(last_coordinates, lro.project(),
      ...     lro.in_subspace(optax.identity()), lro.project_back())
      >>> g = {"w": jnp.ones((3, 4))}
      >>> tx = lro.low_rank(stages, rank=1, refresh_every=1)
      >>> tx.update(g, tx.init(g))[0]["w"][:, 0].tolist()
      [0.0, 0.0, 1.0]
    """

    def init(params: Any) -> Any:
        def first(frame: Frame) -> jax.Array:
            if coordinates:
                return jnp.broadcast_to(
                    jnp.arange(frame.rank), (*frame.batch, frame.rank)
                )
            eye = jnp.eye(*frame.basis_shape[-2:], dtype=frame.gradient.dtype)
            return jnp.broadcast_to(eye, frame.basis_shape)

        return BasisState(
            rng_key=None if key is None else canonical_key(key),
            basis=map_frames(first, params, plain=nothing),
        )

    def update(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        clock: Clock | None = None,
        **_: Any,
    ) -> tuple[Any, Any]:
        frames, now = updates, clock_of(clock)

        def refresh(key: jax.Array | None, old: Any) -> tuple[Any, Any, Any]:
            # The same bits on every sharding: factorise whole matrices.
            seen = map_frames(
                lambda f, s: f.replace(
                    gradient=replicated(f.gradient),
                    momentum=None if f.momentum is None else replicated(f.momentum),
                    basis=replicated(s),
                ),
                frames,
                old,
            )
            sub = None
            if key is not None:
                key, sub = jax.random.split(key)
            new = map_frames(
                lambda f: choose(f, None if sub is None else f.keys(sub), now),
                seen,
                plain=nothing,
            )
            turn = map_frames(
                lambda f, s, s_old: turn_between(s, s_old, f.gradient.dtype),
                frames,
                new,
                old,
                plain=nothing,
            )
            return key, new, turn

        def keep(key: jax.Array | None, old: Any) -> tuple[Any, Any, Any]:
            turn = map_frames(Frame.still, frames, plain=nothing)
            return key, old, turn

        if not frames_of(frames):
            return frames, state
        rng_key, basis, turn = jax.lax.cond(
            now.refresh, refresh, keep, state.rng_key, state.basis
        )
        frames = map_frames(
            lambda f, s, c, old: with_basis(f, s, c, orthonormal).replace(previous=old),
            frames,
            basis,
            turn,
            state.basis,
        )
        return frames, BasisState(rng_key, basis)

    return optax.GradientTransformationExtraArgs(init, update)


def replay(
    bases: Any, *, orthonormal: bool = True
) -> optax.GradientTransformationExtraArgs:
    """Given bases: the k-th refresh takes the k-th.

    To compare two optimizers on one trajectory of subspaces, singular vectors being
    defined up to sign.

    Args:
      bases: a tree like the parameters with (K, *batch, m, r) at each matrix leaf, in
        the orientation of the Frame (m <= n). After K refreshes the last one stays.
        Other leaves are not looked at.
      orthonormal: whether they are.

    Raises:
      ValueError: for a matrix that has no bases, or bases of another shape.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro, optax
      >>> stages = optax.chain(lro.replay({"w": jnp.eye(4, 2)[None]}), lro.project(),
      ...     lro.in_subspace(optax.identity()), lro.project_back())
      >>> tx = lro.low_rank(stages, rank=2, refresh_every=1)
      >>> g = {"w": jnp.ones((4, 6))}
      >>> tx.update(g, tx.init(g))[0]["w"][:, 0].tolist()
      [1.0, 1.0, 0.0, 0.0]
    """
    by_path = {path_of(k): s for k, s in jax.tree_util.tree_leaves_with_path(bases)}

    def given(frame: Frame) -> jax.Array:
        if frame.path not in by_path:
            raise ValueError(f"{frame.path}: replay() has no bases for this matrix")
        s = jnp.asarray(by_path[frame.path], frame.gradient.dtype)
        if s.shape[1:] != frame.basis_shape or not s.shape[0]:
            raise ValueError(
                f"{frame.path}: replay() was given bases of shape {s.shape}; "
                f"needed is (K, {', '.join(map(str, frame.basis_shape))})"
            )
        return s

    rule = basis_rule(
        lambda frame, _, clock: jnp.take(given(frame), clock.cycle, 0, mode="clip"),
        orthonormal=orthonormal,
    )

    def init(params: Any) -> Any:
        for frame in frames_of(params):
            given(frame)
        return rule.init(params)

    return optax.GradientTransformationExtraArgs(init, rule.update)
