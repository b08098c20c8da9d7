"""Back: a factor whose output neurons have steps of one size (NorMuon)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.core.aliases import Number
from lowrank_optax.core.frame import Frame
from lowrank_optax.core.sharding import zeros_along
from lowrank_optax.core.trees import nothing


class NeuronState(NamedTuple):
    """State of `spectral_residual(neuron_decay=...)`.

    Attributes:
      neurons: v, (*batch, outputs), where outputs is m or n; False at full rank.
    """

    neurons: optax.Params


def no_neurons_yet(frame: Frame) -> jax.Array:
    """v before the first step."""
    return nothing() if frame.full_rank else zeros_along(frame, _outputs(frame))


def normalize_neurons(
    frame: Frame, outside: jax.Array, neurons: jax.Array, decay: Number
) -> tuple[jax.Array, jax.Array]:
    """O with each output neuron over the root of v, at the norm of O; and the new v.

    v <- decay v + (1 - decay) mean(O^2), the mean over the inputs of each neuron. A
    zero O leaves v unchanged.
    """
    wide, outputs = outside.astype(neurons.dtype), _outputs(frame)
    inputs = -3 - outputs
    squares = jnp.mean(jnp.square(wide), axis=inputs)
    moves = jnp.any(squares > 0, axis=-1, keepdims=True)
    v = jnp.where(moves, decay * neurons + (1 - decay) * squares, neurons)
    counts = v > jnp.finfo(v.dtype).tiny  # the inverse of a denormal is infinite
    inverse = jnp.where(counts, 1 / jnp.where(counts, v, 1), 0)
    before, after = (
        jnp.sum(x, axis=-1, keepdims=True) for x in (squares, squares * inverse)
    )
    factor = jnp.sqrt(inverse * before / jnp.where(moves, after, 1))
    return (wide * jnp.expand_dims(factor, inputs)).astype(outside.dtype), v


def _outputs(frame: Frame) -> int:
    """The axis of the output neurons."""
    return -1 if frame.columns == "output" else -2
