"""Data parallelism by hand: what is averaged over devices is r rows in place of m."""

from typing import Any

import jax
import optax

from lowrank_optax.core.stage import stage
from lowrank_optax.training.microbatches import project_gradient


def average_gradients(
    tx: optax.GradientTransformation, axis_name: str | tuple[str, ...]
) -> optax.GradientTransformationExtraArgs:
    """`tx` of the mean gradient over devices, of which each has its own share's.

    For `jax.shard_map` and `jax.pmap`, where every device has its rows of the batch and
    all of the weights. A step that gives no residual back is a function of S^T G alone,
    and S^T is linear:

        S^T mean_i G_i = mean_i (S^T G_i)

    so that devices exchange r x n numbers for each matrix, where `jax.lax.pmean` before
    `tx.update` exchanges m x n. At a refresh, and only then, whole gradients are
    averaged, and every device chooses the basis from the same one: the step is that of
    the mean gradient, to rounding. Leaves of full rank are averaged as they are.

    A transformation that needs more of G than S^T G is refused. What stands before
    `low_rank` in a chain sees S^T G between refreshes, first
    each device's own and then their mean: `optax.clip_by_global_norm` clips both.

    `update` takes `refresh`, a Python bool, always (`low_rank`). Under `jit` over a
    mesh there is nothing to be done by hand: the compiler averages where it must.

    Args:
      tx: a transformation with one `low_rank` in it.
      axis_name: of the devices, as for `jax.lax.pmean`.

    Raises:
      ValueError: at update, without `refresh` or without parameters; for a way back
        that needs the gradient itself (`recover_residual`, `sign_residual`,
        `scale_channels`, `error_feedback`): average it before, and leave this out.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> tx = lro.galore(0.01, rank=2, refresh_every=200, dimension_numbers=None)
      >>> params = {"w": jnp.ones((4, 8))}
      >>> state, each = tx.init(params), lro.training.average_gradients(tx, "devices")
      >>> def step(gradient):
      ...     return each.update(gradient, state, params, refresh=False)[0]
      >>> shares = {"w": jnp.ones((1, 4, 8))}  # of one device
      >>> jax.pmap(step, "devices", devices=jax.devices()[:1])(shares)["w"].shape
      (1, 4, 8)
    """
    inner = optax.with_extra_args_support(tx)

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        *,
        refresh: bool | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        if not isinstance(refresh, bool):
            raise ValueError(
                f"average_gradients(): refresh={refresh!r}: say by True or False, a "
                "static argument of the step, whether whole gradients are averaged"
            )

        def ordinary() -> tuple[optax.Updates, optax.OptState]:
            low = project_gradient(inner, updates, state, params, **extra_args).low
            low = jax.lax.pmean(low, axis_name)
            how = {**extra_args, "projected": True, "refresh": False}
            return inner.update(low, state, params, **how)

        if not refresh:
            return ordinary()
        jax.eval_shape(ordinary)  # what is refused is refused at the first step
        mean = jax.lax.pmean(updates, axis_name)
        return inner.update(mean, state, params, refresh=True, **extra_args)

    return stage(inner.init, update)
