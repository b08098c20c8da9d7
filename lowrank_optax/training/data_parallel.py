"""Data parallelism by hand: devices average r rows in place of m."""

from typing import Any

import jax
import optax

from lowrank_optax.core.checks import transformation
from lowrank_optax.core.stage import stage
from lowrank_optax.training.projected import project_gradient, update_projected


def average_gradients(
    tx: optax.GradientTransformation, axis_name: str | tuple[str, ...]
) -> optax.GradientTransformationExtraArgs:
    """Runs `tx` on the mean gradient over devices, from each device's own gradient.

    For `jax.shard_map` and `jax.pmap`, where every device has its rows of the batch and
    all weights. A step without a residual needs only S^T G, and S^T is linear:

        S^T mean_i G_i = mean_i (S^T G_i)

    So devices exchange r x n numbers for each matrix, where `jax.lax.pmean` before
    `tx.update` exchanges m x n. A refresh averages full gradients, and every device
    chooses the same basis. The step is that of the mean gradient, up to rounding.

    Between refreshes a transformation before `low_rank` in a chain sees S^T G, first
    each device's own and then the mean: `optax.clip_by_global_norm` clips both. Under
    `jit` over a mesh use `tx` alone: the compiler inserts the averages.

    Args:
      tx: a transformation with one `low_rank` in it.
      axis_name: the axis of the devices, as for `jax.lax.pmean`.

    Raises:
      ValueError: at update, without parameters, without a Python bool for `refresh`, or
        for a stage that needs the full gradient (`recover_residual`, `sign_residual`,
        `scale_gradient`, `error_feedback`).

    Example:
      >>> tx = lro.galore(0.01, rank=2, refresh_every=200, dimension_numbers=None)
      >>> params = {"w": jnp.ones((4, 8))}
      >>> state, each = tx.init(params), lro.training.average_gradients(tx, "devices")
      >>> def step(gradient):
      ...     return each.update(gradient, state, params, refresh=False)[0]
      >>> shares = {"w": jnp.ones((1, 4, 8))}  # of one device
      >>> jax.pmap(step, "devices", devices=jax.devices()[:1])(shares)["w"].shape
      (1, 4, 8)
    """
    inner = transformation("average_gradients()", tx, "lowrank_optax.galore(0.01)")

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
                f"average_gradients(): refresh={refresh!r}: pass True or False, as a "
                "static argument of the step; True averages full gradients"
            )

        def ordinary() -> tuple[optax.Updates, optax.OptState]:
            own = project_gradient(inner, updates, state, params, **extra_args)
            mean = own._replace(low=jax.lax.pmean(own.low, axis_name))
            return update_projected(inner, mean, state, params, **extra_args)

        if not refresh:
            return ordinary()
        jax.eval_shape(ordinary)  # raises at the first step for a stage that needs G
        mean = jax.lax.pmean(updates, axis_name)
        return inner.update(mean, state, params, refresh=True, **extra_args)

    return stage(inner.init, update)
