"""Step: any optax transformation on the full gradients."""

from typing import Any

import jax.numpy as jnp
import optax

from lowrank_optax.core.aliases import Number
from lowrank_optax.core.checks import transformation
from lowrank_optax.core.stage import check_first, check_inside, stage
from lowrank_optax.core.trees import frames_of, map_frames
from lowrank_optax.steps.subspace import in_full_space


def full_step(
    inner: optax.GradientTransformation, *, scale: Number = 1.0
) -> optax.GradientTransformationExtraArgs:
    """Takes `inner`'s step on the full gradients: step = scale inner(G).

    `inner` is any optax transformation. It sees a tree with the (*batch, m, n) gradient
    of each Frame, m <= n; other leaves stay as they are, and `params` are W. Use it for
    a step in full space whose moments are stored in another form (`factor_moments`,
    `quantize_moments`). The stage stands alone inside `low_rank` or `full_matrices`.

    Args:
      inner: the transformation.
      scale: a factor on the step of the matrices.

    Raises:
      ValueError: what `inner` raises; at update, outside of a bracket.

    Example:
      >>> step = lro.quantize_moments(optax.scale_by_lion())
      >>> tx = lro.full_rank.full_matrices(lro.full_rank.full_step(step, scale=0.5))
      >>> g = {"w": jnp.array([[3.0, -1.0, 2.0], [0.1, 0.2, -0.3]])}
      >>> tx.update(g, tx.init(g))[0]["w"].tolist()
      [[0.5, -0.5, 0.5], [0.5, 0.5, -0.5]]
    """
    stepping = in_full_space(transformation("full_step()", inner))

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        check_inside("full_step()", updates, extra_args)
        for frame in frames_of(updates):
            check_first(frame, "step")
        steps, state = stepping.update(updates, state, params, **extra_args)
        frames = map_frames(
            lambda f, new: f.replace(step=jnp.multiply(scale, new.gradient)),
            updates,
            steps,
            plain=lambda _, step: step,
        )
        return frames, state

    return stage(stepping.init, update)
