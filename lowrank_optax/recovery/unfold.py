"""Back: moments of blocks of rows, unfolded, and the residual (FOAM, GWT)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.core.aliases import Number
from lowrank_optax.core.blocks import block_sizes, repeat_in_blocks
from lowrank_optax.core.checks import check_limit
from lowrank_optax.core.frame import Frame
from lowrank_optax.core.linalg import average_weight, ratio
from lowrank_optax.core.sharding import low_zeros
from lowrank_optax.core.stage import Clock, check_first, timed_frame_stage
from lowrank_optax.recovery.limiter import limit_growth, no_norm_yet


class UnfoldState(NamedTuple):
    """State of `unfold_moments`; False at leaves of full rank.

    Attributes:
      nu: V, (*batch, r, n), the running mean of the squares of S^T G.
    """

    nu: optax.Params


class DetailState(NamedTuple):
    """State of `scale_details`; False at leaves of full rank.

    Attributes:
      nu: V, (*batch, r, n), the running mean of the squares of S^T G.
      norm: the norm of the step in the subspace after the limiter, (*batch,); negative
        before the first step.
    """

    nu: optax.Params
    norm: optax.Params


def unfold_moments(
    b2: Number = 0.999, *, eps: Number = 1e-8, scale: Number = 1.0
) -> optax.GradientTransformationExtraArgs:
    """Adam's step in full space, from moments of blocks and the residual (FOAM).

    With G~ = S^T G in the basis of `fold`, the momentum M^ (*batch, r, n) of the step
    before it in the chain, and b the block's number of rows:

        V <- b2 V + (1 - b2) G~^2,   V^ = V / (1 - b2^t),   R = G - S G~
        step = scale (S M^ + R) / (sqrt(U V^ / b + R^2) + eps)

    with squares entry by entry. U repeats the row of a block for each of its rows, so
    that U V^ / b are the running means of the squared block means, and S M^ those of
    the block means (Wen et al. 2025, "FOAM: Blocked State Folding for Memory-Efficient
    LLM Training", arXiv 2512.07112). The residual, which no state stores, makes the
    rows of a block move differently.

    Deviations: both moments are corrected for bias before the residual is added. The
    released code multiplies the whole step by sqrt(1 - b2^t) / (1 - b1^t). Its V
    averages the means of squares. The squared means here are the paper's, as summaries
    of it have them.

    Args:
      b2: decay rate of V.
      eps: added to the root.
      scale: alpha.

    Raises:
      ValueError: at update, for a basis other than `fold()`, without a step before it
        in the chain, or as `recover_residual` does.

    Example:
      >>> stages = lro.steps.with_rest(optax.chain(lro.bases.fold(), lro.project(),
      ...     lro.in_subspace(optax.ema(0.9)), lro.recovery.unfold_moments(0.999)))
    """

    def one(frame: Frame, nu: jax.Array, now: Clock) -> tuple[Frame, jax.Array]:
        _check(frame, "unfold_moments()")
        nu, unbiased = _second_moment(frame, nu, b2, now)
        m = frame.gradient.shape[-2]
        residual = frame.gradient - frame.up(frame.need("low"))
        first = frame.up(frame.need("low_step"))
        second = repeat_in_blocks(unbiased / block_sizes(m, nu), m)
        root = jnp.sqrt(second + jnp.square(residual))
        step = jnp.multiply(scale, ratio(first + residual, root, eps))
        return frame.replace(step=step), nu

    return timed_frame_stage(UnfoldState, one, low_zeros)


def scale_details(
    b2: Number = 0.999,
    *,
    eps: Number = 1e-8,
    limit: Number = 1.01,
    scale: Number = 1.0,
) -> optax.GradientTransformationExtraArgs:
    """Adam's step on Haar coefficients, the details divided by the same root (GWT).

    With G~ = S^T G in the basis of `fold`, the approximation coefficients, the momentum
    M^ (*batch, r, n) of the step before it in the chain, and zeta = `limit`:

        V <- b2 V + (1 - b2) G~^2,   D = sqrt(V / (1 - b2^t)) + eps
        N = M^ / D;   if ||N_t|| > zeta ||N_{t-1}||:   N_t and R are multiplied by
                                                       zeta ||N_{t-1}|| / ||N_t||
        step = scale (S N + R / U D),   R = G - S G~

    with U D the block's root for each of its rows (Wen et al. 2025, "Breaking Memory
    Limits: Gradient Wavelet Transform Enhances LLMs Training", arXiv 2501.07237). GWT
    divides the detail coefficients of all levels by the root of their block. So their
    inverse transform is that of the details, R, divided by it, and no wavelet transform
    is computed.

    The limiter is the released code's. Deviations: both moments are corrected for bias,
    as in Adam. The released code multiplies the whole step, details too, by
    sqrt(1 - b2^t) / (1 - b1^t), and limits N before that. Details whose block has a V
    of zero take no step here; the released code divides them by eps. In the first
    steps V is the square of one gradient, and some details are large: use a warm-up.

    Args:
      b2: decay rate of V.
      eps: added to the root.
      limit: zeta, the largest growth of the norm from step to step.
      scale: alpha.

    Raises:
      ValueError: as `unfold_moments` does.

    Example:
      >>> stages = lro.steps.with_rest(optax.chain(lro.bases.fold(), lro.project(),
      ...     lro.in_subspace(optax.ema(0.9)), lro.recovery.scale_details(0.999)))
    """
    check_limit(limit)

    def one(
        frame: Frame, nu: jax.Array, last: jax.Array, now: Clock
    ) -> tuple[Frame, jax.Array, jax.Array]:
        _check(frame, "scale_details()")
        nu, unbiased = _second_moment(frame, nu, b2, now)
        root = jnp.sqrt(unbiased)
        inside = ratio(frame.need("low_step"), root, eps)
        norm = jnp.sqrt(jnp.sum(jnp.square(inside), axis=(-2, -1)))
        factor, norm = limit_growth(jnp.ones_like(norm)[..., None], norm, last, limit)
        residual = frame.gradient - frame.up(frame.need("low"))
        root = repeat_in_blocks(root, residual.shape[-2])
        factor = jnp.multiply(scale, factor)[..., None]
        details = jnp.where(root > 0, ratio(residual, root, eps), 0)
        step = factor * (frame.up(inside) + details)
        return frame.replace(step=step), nu, norm

    return timed_frame_stage(DetailState, one, low_zeros, no_norm_yet)


def _second_moment(
    frame: Frame, nu: jax.Array, b2: Number, now: Clock
) -> tuple[jax.Array, jax.Array]:
    """V, and V without bias."""
    nu = b2 * nu + (1 - b2) * jnp.square(frame.need("low"))
    return nu, nu / average_weight(1 - jnp.asarray(b2, nu.dtype), now.step + 1)


def _check(frame: Frame, stage: str) -> None:
    check_first(frame, "step")
    frame.check_residual(stage)
    if not frame.folded and not frame.full_rank:
        raise ValueError(
            f"{frame.path}: {stage} repeats the second moments of blocks of rows, and "
            f"the basis {frame.basis_shape} has no blocks; put fold() in its place, or "
            "use recover_residual()"
        )
