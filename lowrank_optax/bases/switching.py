"""Where: the leading directions, and others drawn from the complement (Alice)."""

import numbers
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.bases.follow import basis_rule
from lowrank_optax.bases.rule import BasisRule
from lowrank_optax.core import linalg, singular
from lowrank_optax.core.aliases import Key, Number, Tree
from lowrank_optax.core.frame import Frame
from lowrank_optax.core.keys import check_key, sample_indices
from lowrank_optax.core.linalg import matmul, transpose
from lowrank_optax.core.sharding import shard_batch
from lowrank_optax.core.singular import Decomposition
from lowrank_optax.core.stage import Clock, around, check_wrapped


def switch_basis(
    key: Key, *, keep: float = 0.3125, decomposition: Decomposition | None = None
) -> BasisRule:
    """The leading directions of one power step, and a draw from its complement (Alice).

    S_0 = U[:, :r] of G_0; then at each refresh, with Q = G_t G_t^T plus what
    `track_gram` adds,

        S' = Q of Q S_{t-1} = Q R
        S' <- S' V,   S'^T Q S' = V diag(d) V^T,   d descending
        S_t = [S'[:, :l], C[:, I]]

    where C (m, m - r) are the columns by which a QR of S' completes it, and I is a
    sorted uniform sample of r - l of them (Gong et al. 2025, "Towards Efficient
    Optimizer Design for LLM via Structured Fisher Approximation with a Low-Rank
    Extension", Algorithms 2 and 10). The basis never freezes. Q, m x m, is not formed;
    a refresh is two QRs and one r x r eigendecomposition.

    Deviations: the paper starts from U_0 = 0, which a power step cannot leave, and
    switches at once; here the first switch is at step T. Algorithm 10 returns V where
    S' V must be meant. Where the complement has fewer than r - l directions, the basis
    takes all of them and more leading ones.

    Args:
      key: a seed or a typed key.
      keep: l, the number of leading directions that stay: an int, or a fraction of r.
        The paper's is 40 of 128 at 60M and 160 of 512 at 1.3B, both 0.3125.
      decomposition: of G_0, "svd", "gram" or None, as in `dominant_svd`.

    Raises:
      ValueError: a `keep` that is neither an int of at least 1 nor a fraction in (0,
        1], another decomposition, or a bad key; at update, a `keep` above the rank.

    Example:
      >>> stages = optax.chain(lro.bases.switch_basis(key=0, keep=0.5), lro.project(),
      ...     lro.in_subspace(optax.scale_by_adam()), lro.compensate_columns())
    """
    integer = isinstance(keep, numbers.Integral) and not isinstance(keep, bool)
    if not (integer and keep >= 1) and not (
        isinstance(keep, float) and 0.0 < keep <= 1.0
    ):
        raise ValueError(
            f"keep={keep!r}: pass how many directions stay, an int of at least 1, or a "
            "fraction of the rank in (0, 1]"
        )

    def choose(frame: Frame, keys: jax.Array, _: Clock) -> jax.Array:
        m, r = frame.basis_shape[-2:]
        kept = _kept(frame, keep)
        s = leading_of_step(frame)
        if kept == r:
            return s
        others = linalg.complement(s)
        index = sample_indices(keys, jnp.ones((*frame.batch, m - r)), r - kept)
        drawn = jnp.take_along_axis(others, index[..., None, :], axis=-1)
        return jnp.concatenate([s[..., :kept], drawn], axis=-1)

    return basis_rule(choose, check_key(key), svd_until=1, decomposition=decomposition)


def _kept(frame: Frame, keep: float) -> int:
    """l, with no more than m - r directions left to draw."""
    m, r = frame.basis_shape[-2:]
    if not isinstance(keep, float) and keep > r:
        raise ValueError(
            f"{frame.path}: keep={keep} is above the rank {r}; pass keep as a fraction "
            "of the rank, such as 0.3125"
        )
    wanted = max(1, round(keep * r)) if isinstance(keep, float) else int(keep)
    return max(wanted, 2 * r - m)


def leading_of_step(frame: Frame) -> jax.Array:
    """S' after one power step, its columns by their Rayleigh quotients, descending."""
    through = gram_product(frame)
    new = linalg.orthonormalize(through(frame.need("basis")))
    _, vectors = linalg.eigh(matmul(transpose(new), through(new)))
    return singular.fix_signs(matmul(new, vectors[..., ::-1]))


def gram_product(frame: Frame) -> Callable[[jax.Array], jax.Array]:
    """X -> c Q X for X (*batch, m, k), with a c > 0 that keeps products finite."""
    s, g = frame.need("basis"), frame.gradient
    g, t = _of_unit_size(g, frame.tracked)

    def through(x: jax.Array) -> jax.Array:
        seen = matmul(g, transpose(matmul(transpose(x), g)))
        if t is None:
            return seen
        return linalg.fence(seen + matmul(s, matmul(t, matmul(transpose(s), x))))

    return through


def _of_unit_size(
    g: jax.Array, t: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
    """G / c and T / c^2, the larger of size one: the directions are the same, and no
    product of them over- or underflows.
    """
    if t is None:
        return linalg.unit_largest(g), None
    c = jnp.maximum(linalg.size(g), jnp.sqrt(linalg.size(t)))
    c = linalg.fence(jnp.where(c > 0, c, 1))
    # Fenced, or the compiler would divide once, by a square that may be zero.
    return linalg.fence(g / c), linalg.fence(linalg.fence(t / c) / c)


class TrackingState(NamedTuple):
    """State of `track_gram`.

    Attributes:
      gram: Q~, (*batch, r, r); False at leaves of full rank.
      inner_state: of the basis rule and the projection.
    """

    gram: Tree
    inner_state: Tree


def track_gram(
    stages: optax.GradientTransformation,
    *,
    decay: Number = 0.999,
    rotate: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """A running mean of G~ G~^T, for a basis that follows all gradients (Alice).

        Q = decay S_{t-1} Q~_{t-1} S_{t-1}^T + (1 - decay) G_t G_t^T   at a refresh
        S_t, G~_t from the stages, S_t of this Q where the rule is `switch_basis`
        Q~_t = decay Q~_{t-1} + (1 - decay) G~_t G~_t^T

    (Gong et al. 2025, "Structured Fisher Approximation", section 5.1 and Algorithm 4.)
    As in the paper, Q~ stays the same when the basis changes, although its coordinates
    change. With a decay of 0.999, much of Q~ belongs to directions that have left the
    basis. The paper's own ablation finds little effect (Table 5). `orthogonal_iterate`
    follows Q too; its source has C Q~_{t-1} C^T in place of Q~_{t-1} in the last
    equation, with C = S_t^T S_{t-1}. State of a matrix: r^2 numbers.

    Args:
      stages: a basis rule, then `project()`, chained.
      decay: beta_3.
      rotate: whether Q~ is rotated into each new basis, as in COSMOS.

    Raises:
      ValueError: at update, for stages without a basis rule and `project`.

    Example:
      >>> where = optax.chain(lro.bases.switch_basis(key=0), lro.project())
      >>> stages = optax.chain(lro.bases.track_gram(where),
      ...     lro.in_subspace(optax.scale_by_adam()), lro.compensate_columns())
    """

    def zeros(frame: Frame) -> jax.Array:
        shape = *frame.batch, frame.rank, frame.rank
        return shard_batch(frame, jnp.zeros(shape, frame.gradient.dtype))

    def with_past(frame: Frame, gram: jax.Array) -> Frame:
        # Scaled so that G G^T has weight one; directions do not depend on size.
        return frame.replace(tracked=decay / (1 - decay) * gram)

    def average(frame: Frame, gram: jax.Array) -> tuple[Frame, jax.Array]:
        check_wrapped(frame, "track_gram()")
        if frame.full_rank:
            return frame, gram
        low = frame.need("low")
        new = jnp.einsum("...rn,...sn->...rs", low, low, precision="highest")
        if rotate:
            c = frame.need("rotation")
            gram = linalg.product(linalg.product(c, gram), transpose(c))
        return frame, decay * gram + (1 - decay) * new

    return around(stages, TrackingState, zeros, with_past, average)
