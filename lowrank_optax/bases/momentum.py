"""Where: bases that follow the momentum and the gradient (LDAdam, COAP)."""

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.bases.follow import basis_rule, changed
from lowrank_optax.bases.rule import BasisRule, small
from lowrank_optax.core import linalg, singular
from lowrank_optax.core.aliases import Number
from lowrank_optax.core.checks import check_count
from lowrank_optax.core.frame import Frame
from lowrank_optax.core.linalg import average_weight, transpose
from lowrank_optax.core.singular import Decomposition
from lowrank_optax.core.stage import Clock


def power_iterate(
    rho: Number = 0.908,
    *,
    b1: Number = 0.908,
    decomposition: Decomposition | None = None,
) -> BasisRule:
    """One block power step towards momentum and gradient (LDAdam).

    S_0 = U[:, :r] of G_0; then at each refresh, with the bias-corrected first moment M^
    = M_{t-1} / (1 - b1^t) in the coordinates of S_{t-1},

        B = rho S_{t-1} M^ + (1 - rho) G_t
        S_t = Q of B B^T S_{t-1} = Q R

    (Robert et al. 2025, "LDAdam", section 3). LDAdam does it at every step:
    `refresh_every=1`.

    Args:
      rho: the weight of the momentum; 0.908 in the source.
      b1: the decay rate of M, for the bias correction. M is that of the step in the
        same `low_rank`.
      decomposition: of G_0, "svd", "gram" or None, as in `dominant_svd`.

    Raises:
      ValueError: another decomposition; at update, for a step without a first moment.

    Example:
      >>> tx = lro.low_rank(optax.chain(lro.bases.power_iterate(b1=0.9), lro.project(),
      ...     lro.rotate_moments(optax.scale_by_adam(0.9)), lro.project_back()),
      ...     rank=4, refresh_every=1)
    """

    def choose(frame: Frame, _: None, clock: Clock) -> jax.Array:
        s, m = frame.need("basis"), _momentum(frame, "power_iterate")
        m_hat = rho * m / average_weight(1 - jnp.asarray(b1, m.dtype), clock.step)
        # Of unit size: the span is the same, and no product over- or underflows.
        g, m_hat = _of_unit_size((1 - rho) * frame.gradient, m_hat)
        # B^T S and B (B^T S), without B, since S^T S = I.
        x = m_hat + linalg.matmul(transpose(s), g, linalg.COARSE)
        along = linalg.matmul(s, linalg.matmul(m_hat, transpose(x)))
        return linalg.orthonormalize(along + linalg.matmul(g, transpose(x)))

    made = basis_rule(choose, svd_until=1, decomposition=decomposition)
    return changed(made, batched=small)


def correlation_aware(
    step_size: Number = 0.1,
    *,
    recompute_every: int = 5,
    decomposition: Decomposition | None = None,
) -> BasisRule:
    """Gradient steps towards the momentum, and at times a sketch (COAP).

    S_0 = U[:, :r] of G_0; then at each refresh one gradient step (norm clipped at 1) on

        mean((S S^T G - G)^2) (1 - mean_i cos((S M)_:,i, G_:,i)),

    where M is the step's first moment. Every `recompute_every`-th refresh instead takes
    the left singular vectors of G Q, where Q is an orthonormal basis of G^T S (Xiao et
    al. 2025, "COAP", section 3). The loss has the units of the squared gradient, and so
    has the step.

    Deviations: the released code sketches its first basis with a fixed seed, and takes
    cosines along the input axis; here they are one per column, which is the same for
    weights with more outputs than inputs. S is orthonormal only at first and after a
    recomputation; stages that need an orthonormal basis refuse this rule.

    Args:
      step_size: of the gradient step, 0.1 in the released code.
      recompute_every: refreshes from one recomputation to the next, at least 1.
      decomposition: of G_0, "svd", "gram" or None, as in `dominant_svd`.

    Raises:
      ValueError: another decomposition, or recompute_every below 1; at update, for a
        step without a first moment.

    Example:
      >>> stages = optax.chain(lro.bases.correlation_aware(), lro.project(),
      ...     lro.in_subspace(optax.scale_by_adam()), lro.project_back(0.25))
    """
    check_count("recompute_every", recompute_every)

    def choose(frame: Frame, _: None, clock: Clock) -> jax.Array:
        g, s = frame.gradient, frame.need("basis")
        m = _momentum(frame, "correlation_aware")
        return jax.lax.cond(
            clock.cycle % recompute_every == 0,
            lambda: _sketched(s, g, decomposition),
            lambda: _correlated(s, g, m, step_size),
        )

    return basis_rule(
        choose, orthonormal=False, svd_until=1, decomposition=decomposition
    )


def _of_unit_size(g: jax.Array, m: jax.Array) -> tuple[jax.Array, jax.Array]:
    """G and M over one number, the size of the larger."""
    size = jnp.maximum(linalg.size(g), linalg.size(m))
    size = linalg.fence(jnp.where(size > 0, size, 1))
    return linalg.fence(g / size), linalg.fence(m / size)


def _correlated(
    s: jax.Array, g: jax.Array, m: jax.Array, step_size: Number
) -> jax.Array:
    """S after one gradient step, its norm clipped at 1, on COAP's loss."""

    def loss(s: jax.Array) -> jax.Array:
        lost = linalg.matmul(s, linalg.matmul(transpose(s), g)) - g
        cosine = optax.losses.cosine_similarity(
            transpose(linalg.matmul(s, m)), transpose(g), epsilon=1e-8
        )
        each = jnp.mean(jnp.square(lost), (-2, -1)) * (1 - jnp.mean(cosine, -1))
        return jnp.sum(each)

    grad = jax.grad(loss)(s)
    norm = jnp.linalg.norm(grad, axis=(-2, -1), keepdims=True)
    moved = s - step_size * grad / jnp.maximum(norm, 1)
    # The loss is of second order in G, and overflows before G does.
    return jnp.where(jnp.isfinite(norm), moved, s)


def _sketched(
    s: jax.Array, g: jax.Array, decomposition: Decomposition | None
) -> jax.Array:
    """The left singular vectors of G Q, Q an orthonormal basis of G^T S."""
    sketch = linalg.matmul(g, linalg.orthonormalize(linalg.matmul(transpose(g), s)))
    q = linalg.orthonormalize(sketch)
    inner, _ = singular.left_singular(
        linalg.matmul(transpose(q), sketch), decomposition
    )
    return singular.fix_signs(linalg.matmul(q, inner))


def _momentum(frame: Frame, rule: str) -> jax.Array:
    if frame.momentum is None:
        raise ValueError(
            f"{frame.path}: {rule}() follows the first moment of the step, and the "
            "step stores none that rotate_moments() can rotate; use "
            "optax.scale_by_adam() or optax.ema(decay) as the step"
        )
    return frame.momentum
