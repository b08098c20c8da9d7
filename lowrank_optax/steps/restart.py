"""Step: a transformation that begins anew every so many steps."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.core.checks import check_count, transformation
from lowrank_optax.core.stage import stage


class RestartState(NamedTuple):
    """State of `restart_every`.

    Attributes:
      count: () int32, the steps since the last restart.
      inner_state: the state of the transformation.
    """

    count: jax.Array
    inner_state: optax.OptState


def restart_every(
    inner: optax.GradientTransformation, steps: int
) -> optax.GradientTransformationExtraArgs:
    """Runs `inner`, and sets its state to that of `init` every `steps` steps.

    Adam's moments become zero, and its count with the bias correction begins at 0 again
    (Huang et al. 2025, "SPAM", arXiv 2501.06842; they reset after 500 steps). The new
    state is selected entry by entry, so that no device waits for the host. State: that
    of `inner` and one number.

    Args:
      inner: any optax transformation whose `init` reads shapes and dtypes alone, such
        as `optax.scale_by_adam()`; it gets the updates in place of the parameters.
      steps: from one restart to the next.

    Raises:
      ValueError: steps below 1.

    Example:
      >>> tx = lro.steps.restart_every(optax.trace(1.0), 2)   # sums of 1 or 2 updates
      >>> g, state = jnp.ones(1), tx.init(jnp.ones(1))
      >>> for _ in range(3):
      ...     update, state = tx.update(g, state)
      ...     print(update)
      [1.]
      [2.]
      [1.]
    """
    inner = transformation("restart_every()", inner)
    check_count("steps", steps)

    def init(params: optax.Params) -> RestartState:
        return RestartState(jnp.zeros([], jnp.int32), inner.init(params))

    def update(
        updates: optax.Updates,
        state: RestartState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, RestartState]:
        due = state.count == steps
        count = jnp.where(due, 0, state.count)
        inner_state = jax.tree.map(
            partial(jnp.where, due), inner.init(updates), state.inner_state
        )
        updates, inner_state = inner.update(updates, inner_state, params, **extra_args)
        return updates, RestartState(count + 1, inner_state)

    return stage(init, update)
