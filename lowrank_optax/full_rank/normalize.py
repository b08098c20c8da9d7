"""Step: matrices of full rank, the gradient of each output normalized (SCALE)."""

import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.core.aliases import Number
from lowrank_optax.core.frame import Frame
from lowrank_optax.core.stage import check_first, frame_stage, stateless_stage
from lowrank_optax.core.trees import nothing


def normalize_by_output_rms() -> optax.GradientTransformation:
    """Divides the gradient of each output by its root mean square (SCALE).

    step_ij = G_ij / sqrt(mean_i G_ij^2), i over the inputs of output j (Glentis et al.
    2025, "A Minimalist Optimizer Design for LLM Pretraining"). The dimension numbers
    name the input and output axes; an embedding's inputs are the tokens. An output
    whose gradient is zero does not move. There is no state. The stage stands alone
    inside `full_matrices` or `low_rank`.

    Deviation: the paper divides by the norm. Its released code, and this function,
    divide by the root mean square, which makes the step sqrt(inputs) times as large.
    The paper's learning rates belong to the released code, which divides by at
    least 1e-8; here there is no floor, and the smallest gradient has a full step.

    Example:
      >>> tx = lro.full_rank.full_matrices(lro.full_rank.normalize_by_output_rms())
      >>> g = jnp.array([[3.0, 0.1], [3.0, 0.1], [3.0, -0.1]])   # three inputs
      >>> tx.update(g, tx.init(g))[0].round(3).tolist()
      [[1.0, 1.0], [1.0, 1.0], [1.0, -1.0]]
    """

    def one(frame: Frame) -> Frame:
        check_first(frame, "step")
        G = frame.gradient
        inputs = -2 if frame.columns == "output" else -1
        # Scaled to a largest entry of 1, because squares of small entries underflow.
        size = jnp.max(jnp.abs(G), axis=inputs, keepdims=True)
        unit = G / jnp.where(size > 0, size, 1)
        root = jnp.sqrt(jnp.mean(jnp.square(unit), axis=inputs, keepdims=True))
        return frame.replace(step=unit / jnp.where(root > 0, root, 1))

    return stateless_stage(one)


class MomentumState(NamedTuple):
    """State of `trace_matching`.

    Attributes:
      momentum: M, (*batch, m, n), for matrices that match; False for all others.
    """

    momentum: optax.Params


def trace_matching(
    pattern: str, decay: Number = 0.9
) -> optax.GradientTransformationExtraArgs:
    """Replaces the gradient by its momentum, for matrices whose path matches.

    M <- decay M + (1 - decay) G,   G <- M   where `pattern` is found in the path. All
    other matrices pass their gradient on and have no state.

    Args:
      pattern: a regular expression.
      decay: the decay rate of M.

    Raises:
      ValueError: for a pattern that is not a regular expression.

    Example:
      >>> tx = lro.full_rank.full_matrices(optax.chain(
      ...     lro.full_rank.trace_matching("head/kernel$"),
      ...     lro.full_rank.normalize_by_output_rms()))
    """
    try:
        matches = re.compile(pattern).search
    except re.error as error:
        raise ValueError(
            f"pattern={pattern!r} is not a regular expression: {error}"
        ) from error

    def zeros(frame: Frame) -> jax.Array:
        return jnp.zeros_like(frame.gradient) if matches(frame.path) else nothing()

    def one(frame: Frame, m: jax.Array) -> tuple[Frame, jax.Array]:
        if not matches(frame.path):
            return frame, m
        m = decay * m + (1 - decay) * frame.gradient
        return frame.replace(gradient=m), m

    return frame_stage(MomentumState, one, zeros)
