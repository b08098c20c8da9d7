"""The arithmetic of the released PyTorch packages, where it is not the papers'.

galore-torch 1.0 and fira 1.0.2 put Adam's bias correction on the step size, so that
epsilon, and Fira's limiter, see uncorrected moments; and they decay weights last, on
the weights already stepped.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


def scale_by_uncorrected_adam(
    b1: float | jax.Array = 0.9,
    b2: float | jax.Array = 0.999,
    eps: float | jax.Array = 1e-6,
) -> optax.GradientTransformation:
    """M / (sqrt(V) + eps), M and V as in Adam but not corrected for their bias.

    The state is `optax.ScaleByAdamState`.
    """
    adam = optax.scale_by_adam(b1, b2)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        _, state = adam.update(updates, state, params)
        step = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), state.mu, state.nu)
        return step, state

    return optax.GradientTransformation(adam.init, update)


class BiasCorrectionState(NamedTuple):
    """State of `scale_by_bias_correction`: count, () int32, the steps done."""

    count: jax.Array


def scale_by_bias_correction(
    b1: float | jax.Array = 0.9, b2: float | jax.Array = 0.999
) -> optax.GradientTransformation:
    """Multiplies the update of step t = 1, 2, ... by sqrt(1 - b2^t) / (1 - b1^t)."""

    def init(params: Any) -> Any:
        del params
        return BiasCorrectionState(jnp.zeros([], jnp.int32))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        count = jnp.asarray(optax.safe_increment(state.count))

        def weight(decay: float | jax.Array) -> jax.Array:
            return -jnp.expm1(count * jnp.log1p(decay - 1.0))

        factor = jnp.sqrt(weight(b2)) / weight(b1)
        scaled = jax.tree.map(lambda u: (factor * u).astype(u.dtype), updates)
        return scaled, BiasCorrectionState(count)

    return optax.GradientTransformation(init, update)


class DecayState(NamedTuple):
    """State of `decay_stepped_weights`: count, () int32, the steps done."""

    count: jax.Array


def decay_stepped_weights(
    learning_rate: optax.ScalarOrSchedule, weight_decay: float | jax.Array
) -> optax.GradientTransformation:
    """Decays W + u, the weights after their step: u <- u - lr wd (W + u).

    Stands after the learning rate, last in the chain.

    Raises:
      ValueError: when `update` is called without params.
    """

    def init(params: Any) -> Any:
        del params
        return DecayState(jnp.zeros([], jnp.int32))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        if params is None:
            raise ValueError(
                "weight decay needs params: tx.update(grads, state, params)"
            )
        lr = learning_rate(state.count) if callable(learning_rate) else learning_rate
        decayed = jax.tree.map(
            lambda u, w: (u - lr * weight_decay * (w + u)).astype(u.dtype),
            updates,
            params,
        )
        return decayed, DecayState(jnp.asarray(optax.safe_increment(state.count)))

    return optax.GradientTransformation(init, update)
