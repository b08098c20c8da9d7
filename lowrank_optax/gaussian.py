"""Where: Gaussian projections, kept as the key that they are drawn from."""

import math
from typing import Any, NamedTuple

import jax
import optax

from lowrank_optax.basis import (
    basis_rule,
    canonical_key,
    check_key,
    clock_of,
    turn_between,
    with_basis,
)
from lowrank_optax.frame import Clock, Frame, frames_of, map_frames


class GaussianState(NamedTuple):
    """State of `gaussian`.

    Attributes:
      rng_key: a typed key, split at a refresh and at no other time.
      drawn: the typed key that the bases in use are drawn from.
    """

    rng_key: jax.Array
    drawn: jax.Array


def gaussian(
    key: jax.Array | int, *, stored: bool = False
) -> optax.GradientTransformationExtraArgs:
    """A Gaussian projection, drawn anew at each refresh: S_ij ~ N(0, 1 / r).

    E[S S^T] = I, so lengths survive the way into the subspace in the mean, but S^T S is
    not I: stages that need an orthonormal basis refuse it (Zhu et al. 2025, "APOLLO",
    section 4; Hao et al. 2024, "FLora", section 2.3).

    The state is a key, and S is drawn from it again at every step; no array of mr
    numbers is kept. `stored=True` keeps it instead, as the released apollo-torch does:
    the same numbers, memory for time.

    Args:
      key: a seed or a typed key.
      stored: keep S in the state.

    Raises:
      ValueError: a key that is neither an int nor typed; at update, outside `low_rank`.

    Example:
      >>> import lowrank_optax as lro
      >>> stages = optax.chain(lro.gaussian(key=0), lro.project(),
      ...     lro.in_subspace(optax.scale_by_adam()), lro.scale_channels())
    """

    check_key(key)

    def draw(frame: Frame, keys: jax.Array) -> jax.Array:
        shape, dtype = frame.basis_shape[-2:], frame.gradient.dtype
        normal = jax.vmap(lambda key: jax.random.normal(key, shape, dtype))
        s = normal(keys.reshape(math.prod(frame.batch)))
        return s.reshape(frame.basis_shape) / math.sqrt(frame.rank)

    if stored:

        def choose(frame: Frame, keys: Any, _: Clock) -> jax.Array:
            return draw(frame, keys)

        return basis_rule(choose, check_key(key), orthonormal=False)

    def init(params: Any) -> Any:
        del params
        start = canonical_key(key)
        return GaussianState(start, jax.random.clone(start))

    def update(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        clock: Clock | None = None,
        **_: Any,
    ) -> tuple[Any, Any]:
        del params
        frames, now = updates, clock_of(clock)
        if not frames_of(frames):
            return frames, state
        rng_key, drawn = jax.lax.cond(
            now.refresh,
            lambda: tuple(jax.random.split(state.rng_key)),
            lambda: (state.rng_key, state.drawn),
        )

        def one(frame: Frame) -> Frame:
            s = draw(frame, frame.keys(drawn))
            turn = jax.lax.cond(
                now.refresh,
                lambda: turn_between(
                    s, draw(frame, frame.keys(state.drawn)), frame.gradient.dtype
                ),
                lambda: frame.still(),
            )
            return with_basis(frame, s, turn, orthonormal=False)

        return map_frames(one, frames), GaussianState(rng_key, drawn)

    return optax.GradientTransformationExtraArgs(init, update)
