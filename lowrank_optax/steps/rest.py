"""Step: one optimizer for the matrices, another one for all other leaves."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.core.aliases import Tree
from lowrank_optax.core.checks import transformation
from lowrank_optax.core.frame import Frame, is_frame
from lowrank_optax.core.stage import stage
from lowrank_optax.core.trees import map_frames


class RestState(NamedTuple):
    """State of `with_rest`.

    Attributes:
      inner_state: the stages' state; a leaf of full rank has scalar moments there.
      rest_state: the other optimizer's state; a matrix has scalar moments there.
    """

    inner_state: optax.OptState
    rest_state: optax.OptState


def with_rest(
    stages: optax.GradientTransformation,
    rest: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Runs `stages` on the matrices and `rest` on the leaves of full rank.

    Without this stage, leaves of full rank take the step inside `in_subspace` too. That
    suits Adam. It does not suit steps for matrices only (`scale_by_polar_factor`).

    Each of the two sees a scalar zero in place of the other's leaves, so that each
    state has an array for every parameter. An optimizer that reads all leaves together
    (a global norm) sees those zeros.

    Args:
      stages: where, in, step and back, chained.
      rest: any optax transformation, `optax.scale_by_adam()` by default.

    Raises:
      ValueError: whatever the two raise.

    Example:
      >>> step = optax.chain(optax.trace(0.95), lro.steps.scale_by_polar_factor())
      >>> stages = lro.steps.with_rest(optax.chain(lro.dominant_svd(), lro.project(),
      ...     lro.rotate_moments(step), lro.project_back()), optax.scale_by_adam())
    """
    inner = transformation("with_rest()", stages, "a chain of stages")
    other = transformation(
        "with_rest()", optax.scale_by_adam() if rest is None else rest
    )

    def init(params: optax.Params) -> RestState:
        return RestState(
            inner.init(_matrices(params, params)), other.init(_others(params, params))
        )

    def update(
        updates: optax.Updates,
        state: RestState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, RestState]:
        # Frames in `updates` say which parameters are matrices.
        matrices, others = (
            None if params is None else hide(updates, params)
            for hide in (_matrices, _others)
        )
        frames, inner_state = inner.update(
            _matrices(updates, updates), state.inner_state, matrices, **extra_args
        )
        steps, rest_state = other.update(
            _others(updates, updates), state.rest_state, others, **extra_args
        )
        out = map_frames(lambda f, _: f, frames, steps, plain=lambda _, step: step)
        return out, RestState(inner_state, rest_state)

    return stage(init, update)


def _matrices(frames: optax.Updates, tree: Tree) -> Tree:
    """`tree` with a zero for each leaf of full rank."""
    return map_frames(lambda _, x: x, frames, tree, plain=lambda _, x: _zero(x))


def _others(frames: optax.Updates, tree: Tree) -> Tree:
    """`tree` with a zero for each matrix."""
    return map_frames(lambda _, x: _zero(x), frames, tree, plain=lambda _, x: x)


def _zero(x: Frame | jax.Array) -> jax.Array:
    x = x.gradient if is_frame(x) else x
    return jnp.zeros([], jnp.promote_types(x.dtype, jnp.float32))
