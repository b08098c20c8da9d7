"""Step: matrices by some stages, and all other leaves by another optimizer."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.core.frame import is_frame
from lowrank_optax.core.stage import stage
from lowrank_optax.core.trees import map_frames


class RestState(NamedTuple):
    """State of `with_rest`.

    Attributes:
      inner_state: of the stages; moments of a leaf of full rank are a number there.
      rest_state: of the other optimizer; moments of a matrix are a number there.
    """

    inner_state: Any
    rest_state: Any


def with_rest(
    stages: optax.GradientTransformation,
    rest: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """`stages` for the matrices, `rest` for the leaves of full rank.

    Without it leaves of full rank take the step inside `in_subspace` too, which is what
    they should where that is Adam's; a step for matrices alone
    (`scale_by_polar_factor`), or rates of decay that were chosen for them, is not for
    vectors and embeddings. A leaf that the other one takes stands as a zero in each tree, so that a state has an array
    for every parameter; optimizers that read all leaves together (a global norm) see
    that.

    Args:
      stages: where, in, step and back, chained.
      rest: any optax transformation, `optax.scale_by_adam()` by default.

    Raises:
      ValueError: what the two raise.

    Example:
      >>> import lowrank_optax as lro, optax
      >>> step = optax.chain(optax.trace(0.95), lro.steps.scale_by_polar_factor())
      >>> stages = lro.steps.with_rest(optax.chain(lro.dominant_svd(), lro.project(),
      ...     lro.rotate_moments(step), lro.project_back()), optax.scale_by_adam())
    """
    inner = optax.with_extra_args_support(stages)
    other = optax.with_extra_args_support(
        optax.scale_by_adam() if rest is None else rest
    )

    def init(params: optax.Params) -> RestState:
        return RestState(inner.init(_matrices(params)), other.init(_others(params)))

    def update(
        updates: optax.Updates,
        state: RestState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, RestState]:
        def seen(hide: Callable[..., Any]) -> Any:
            return None if params is None else hide(updates, params)

        frames, inner_state = inner.update(
            _matrices(updates), state.inner_state, seen(_matrices), **extra_args
        )
        steps, rest_state = other.update(
            _others(updates), state.rest_state, seen(_others), **extra_args
        )
        out = map_frames(lambda f, _: f, frames, steps, plain=lambda _, step: step)
        return out, RestState(inner_state, rest_state)

    return stage(init, update)


def _matrices(frames: optax.Updates, like: Any = None) -> Any:
    """The tree, or one like it, with a zero for each leaf of full rank."""
    return map_frames(
        lambda _, x: x,
        frames,
        frames if like is None else like,
        plain=lambda _, x: _zero(x),
    )


def _others(frames: optax.Updates, like: Any = None) -> Any:
    """The tree, or one like it, with a zero for each matrix."""
    return map_frames(
        lambda _, x: _zero(x.gradient if is_frame(x) else x),
        frames,
        frames if like is None else like,
        plain=lambda _, x: x,
    )


def _zero(x: Any) -> jax.Array:
    return jnp.zeros([], jnp.promote_types(x.dtype, jnp.float32))
