"""Step: any optax transformation on the full gradients."""

from typing import Any

import jax.numpy as jnp
import optax

from lowrank_optax.core.aliases import Number
from lowrank_optax.core.checks import transformation
from lowrank_optax.core.stage import check_first, check_inside, stage
from lowrank_optax.core.trees import frames_of, map_frames


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
    inner = transformation("full_step()", inner)

    def init(params: optax.Params) -> optax.OptState:
        return inner.init(map_frames(lambda f: jnp.zeros_like(f.gradient), params))

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        check_inside("full_step()", updates, extra_args)
        for frame in frames_of(updates):
            check_first(frame, "step")
        full = map_frames(lambda f: jnp.asarray(f.gradient), updates)
        steps, state = inner.update(full, state, params, **extra_args)
        frames = map_frames(
            lambda f, step: f.replace(step=jnp.multiply(scale, step)),
            updates,
            steps,
            plain=lambda _, step: step,
        )
        return frames, state

    return stage(init, update)
