"""Back: the step, plus a step in the spectral norm on the residual."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from lowrank_optax.core.aliases import Number
from lowrank_optax.core.frame import Frame
from lowrank_optax.core.newton_schulz import FITTED, Quintic, polar_of_spectrum
from lowrank_optax.core.stage import check_first, frame_stage
from lowrank_optax.recovery.neurons import (
    NeuronState,
    no_neurons_yet,
    normalize_neurons,
)
from lowrank_optax.recovery.outside import add_outside, check_dtype, residual_factor


def spectral_residual(
    residual_scale: Number = 0.5,
    *,
    scale: Number = 1.0,
    coefficients: Sequence[Quintic] = FITTED,
    neuron_decay: Number | None = None,
    dtype: DTypeLike | None = jnp.bfloat16,
) -> optax.GradientTransformationExtraArgs:
    """Projects the step back and adds the residual's polar factor.

    With G~ = S^T G, the optimizer's output G~^O, and the residual's singular vectors:

        R = G - S G~ = U diag(s) V^T
        step = scale S G~^O + residual_scale sqrt(n) (I - S S^T) U V^T

    U V^T lies outside of the subspace up to the rounding of its products, which I - S
    S^T reduces to that of products with S. The residual takes the steepest descent step
    in the spectral norm (Carlson et al. 2015, "Preconditioned Spectral Descent for Deep
    Learning"; Jordan et al. 2024, "Muon"); combining it with a subspace is our own.
    Without `neuron_decay` it has no state.

    `neuron_decay` = b divides each output neuron of O = U V^T by the root of v <- b v +
    (1 - b) mean(O^2), over its inputs, and keeps the norm of O (Li et al. 2025,
    "NorMuon", arXiv 2510.05491, whose norm is 0.2 sqrt(mn)). v, a number for each
    output, is then the state. I - S S^T takes away what moves into the subspace.

    U V^T is approximated by Newton-Schulz steps X <- a X + b A X + c A^2 X, A = X X^T.
    X begins as R over its Schatten norm (sum_i s_i^8)^(1/8). The default is three
    steps whose coefficients are fitted to the residuals of LLaMA-60M, and reach the
    loss of Muon's five (docs/results/polar_factor.md).

    The residual's step has entries of about `residual_scale`, whatever the size of G,
    since the root mean square entry of U V^T is sqrt((m - r) / (m n)); Adam's have at
    most about one. A residual below the `resolution` of G gets no step, because
    normalizing it would amplify rounding.

    Args:
      residual_scale: size of the residual's step, as a fraction of the learning rate.
      scale: alpha, on the part inside the subspace only.
      coefficients: (a, b, c) of each Newton-Schulz step.
      neuron_decay: decay rate of v, 0.95 in the paper; None for O as it is.
      dtype: of the factors of its products; None for the gradient's, at the highest
        precision. A float64 gradient has its products in float64.

    Raises:
      ValueError: no coefficients, or others than triples; dtype float16, in which
        squares over- and underflow; at update, as `recover_residual` does.

    Example:
      >>> stages = optax.chain(lro.bases.power_iterate(b1=0.9), lro.project(),
      ...     lro.rotate_moments(optax.scale_by_adam()), lro.spectral_residual(0.5))
    """
    quintics = _checked(coefficients)
    check_dtype(dtype)
    polar = partial(polar_of_spectrum, coefficients=quintics)

    def one(frame: Frame, *neurons: jax.Array) -> tuple[Frame | jax.Array, ...]:
        check_first(frame, "step")
        low_step = jnp.multiply(scale, frame.need("low_step"))
        if frame.full_rank:
            return frame.replace(step=low_step), *neurons
        frame.check_residual("spectral_residual()")
        outside, resolved = residual_factor(frame, polar, dtype)
        if neuron_decay is not None:
            outside, v = normalize_neurons(frame, outside, neurons[0], neuron_decay)
            neurons = (v,)
        size = residual_scale * jnp.sqrt(outside.shape[-1])
        size = jnp.where(resolved, size, 0).astype(low_step.dtype)
        step = add_outside(frame, low_step, size, outside)
        return frame.replace(step=step), *neurons

    if neuron_decay is None:
        return frame_stage(optax.EmptyState, one)
    return frame_stage(NeuronState, one, no_neurons_yet)


def _checked(coefficients: Sequence[Quintic]) -> tuple[Quintic, ...]:
    try:
        quintics = tuple((float(a), float(b), float(c)) for a, b, c in coefficients)
    except (TypeError, ValueError):
        quintics = ()
    if not quintics:
        raise ValueError(
            f"coefficients={coefficients!r}: give a sequence of triples (a, b, c), one "
            "for each step"
        )
    return quintics
