"""Step: whole matrices, each output's weights at the same length (SCALE)."""

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.core.frame import Frame
from lowrank_optax.core.stage import simple_stage
from lowrank_optax.core.trees import map_frames, nothing, update_frames


def normalize_by_output_rms() -> optax.GradientTransformation:
    """The gradient, the weights of each output with a root mean square of one (SCALE).

    step_ij = G_ij / sqrt(mean_i G_ij^2), i over the inputs of output j (Glentis et al.
    2025, "A Minimalist Optimizer Design for LLM Pretraining"). Which axes are inputs
    and outputs the dimension numbers say; an embedding's inputs are the tokens. The
    paper divides by the norm, and its released code by the root mean square, as here,
    whose step is sqrt(inputs) times as large; its learning rates are for that. An
    output without a gradient stays where it is. It has no state, and stands in
    `full_matrices`, or in `low_rank` in place of all other stages.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> tx = lro.full_rank.full_matrices(lro.full_rank.normalize_by_output_rms())
      >>> g = jnp.array([[3.0, 0.1], [3.0, 0.1], [3.0, -0.1]])   # three inputs
      >>> tx.update(g, tx.init(g))[0].round(3).tolist()
      [[1.0, 1.0], [1.0, 1.0], [1.0, -1.0]]
    """

    def one(frame: Frame) -> Frame:
        G = frame.gradient
        inputs = -2 if frame.columns == "output" else -1
        # Squared at unit size, or small ones would be zero.
        size = jnp.max(jnp.abs(G), axis=inputs, keepdims=True)
        unit = G / jnp.where(size > 0, size, 1)
        root = jnp.sqrt(jnp.mean(jnp.square(unit), axis=inputs, keepdims=True))
        return frame.replace(step=unit / jnp.where(root > 0, root, 1))

    return optax.stateless(lambda frames, _: map_frames(one, frames))


class MomentumState(NamedTuple):
    """State of `trace_matching`.

    Attributes:
      momentum: M, (*batch, m, n), for matrices that have one; False for all others.
    """

    momentum: Any


def trace_matching(
    pattern: str, decay: float | jax.Array = 0.9
) -> optax.GradientTransformationExtraArgs:
    """Momentum in place of the gradient, for matrices by their paths alone.

    M <- decay M + (1 - decay) G,   G <- M   where `pattern` is found in the path; all
    other matrices keep their gradients, and nothing in the state.

    Args:
      pattern: a regular expression.
      decay: of M.

    Raises:
      ValueError: a pattern that is no regular expression.

    Example:
      >>> import lowrank_optax as lro, optax
      >>> tx = lro.full_rank.full_matrices(optax.chain(
      ...     lro.full_rank.trace_matching("head/kernel$"),
      ...     lro.full_rank.normalize_by_output_rms()))
    """
    try:
        matches = re.compile(pattern).search
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from error

    def init(params: optax.Params) -> MomentumState:
        def zeros(frame: Frame) -> jax.Array:
            if matches(frame.path):
                return jnp.zeros_like(frame.gradient)
            return nothing()

        return MomentumState(map_frames(zeros, params, plain=nothing))

    def one(frame: Frame, m: jax.Array) -> tuple[Frame, jax.Array]:
        if not matches(frame.path):
            return frame, m
        m = decay * m + (1 - decay) * frame.gradient
        return frame.replace(gradient=m), m

    def update(
        frames: optax.Updates, state: MomentumState
    ) -> tuple[optax.Updates, MomentumState]:
        frames, momentum = update_frames(one, frames, state.momentum)
        return frames, MomentumState(momentum)

    return simple_stage(init, update)
