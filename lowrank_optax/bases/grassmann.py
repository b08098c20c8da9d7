"""Where: walks, jumps and tracking on the Grassmannian."""

import jax
import jax.numpy as jnp

from lowrank_optax.bases.follow import basis_rule, changed
from lowrank_optax.bases.random import gaussian_matrix
from lowrank_optax.bases.rule import BasisRule, small
from lowrank_optax.core import linalg
from lowrank_optax.core.aliases import Key, Number
from lowrank_optax.core.checks import check_count
from lowrank_optax.core.frame import Frame
from lowrank_optax.core.keys import check_key
from lowrank_optax.core.linalg import fence
from lowrank_optax.core.singular import Decomposition
from lowrank_optax.core.stage import Clock


def geodesic(
    s: jax.Array, x: jax.Array, angle: Number, rank: int | None = None
) -> jax.Array:
    """The point at `angle` from span(S) on the geodesic towards X.

    Eq. 4 of the GrassWalk paper (section 4), with X^ = (I - S S^T) X scaled to unit
    spectral norm and its `rank` leading singular triples X^ ~ U Sigma V^T:

        S(eta) = S V cos(Sigma eta) V^T + U sin(Sigma eta) V^T + S (I - V V^T)

    U sin(Sigma eta) is X^ V sin(Sigma eta) / Sigma. This needs no U, and only a limit
    at Sigma = 0, so the r x r matrix X^^T X^ is factorized instead of X. One
    Newton-Schulz step removes rounding, so that it does not add up over a walk.

    Args:
      s: (*batch, m, r), orthonormal, r < m.
      x: (*batch, m, r), any direction; it is made tangent here.
      angle: eta, the largest principal angle between the two subspaces, in radians.
      rank: how many directions rotate, 1 to r; None for all r.

    Returns:
      (*batch, m, r), orthonormal.
    """
    # Twice: the tangent part of a direction along S is rounding, which is not tangent.
    x = linalg.unit_largest(_tangent(s, linalg.unit_largest(_tangent(s, x))))
    squares, v = linalg.eigh(linalg.gram(x))
    sigma = fence(jnp.sqrt(jnp.maximum(squares, 0)))
    largest = jnp.max(sigma, axis=-1, keepdims=True)
    largest = jnp.where(largest > 0, largest, 1)
    sigma = fence(sigma / largest)
    r = sigma.shape[-1]
    rotates = jnp.arange(r) >= r - (r if rank is None else rank)  # ascending
    angles = fence(jnp.where(rotates, angle * sigma, 0))
    sine = fence(jnp.sin(angles))
    small = sigma < jnp.finfo(sigma.dtype).eps
    sine_over_sigma = jnp.where(small, angle, sine / jnp.where(small, 1, sigma))
    sine_over_sigma = fence(jnp.where(rotates, sine_over_sigma, 0))

    def function_of_sigma(values: jax.Array) -> jax.Array:
        return linalg.matmul(fence(v * values[..., None, :]), linalg.transpose(v))

    along = linalg.matmul(s, function_of_sigma(fence(jnp.cos(angles))))
    x = fence(x / largest[..., None])
    across = linalg.matmul(x, function_of_sigma(sine_over_sigma))
    return linalg.polish(fence(along + across))


def _tangent(s: jax.Array, x: jax.Array) -> jax.Array:
    """(I - S S^T) X."""
    return fence(x - linalg.matmul(s, linalg.matmul(linalg.transpose(s), x)))


def grassmann_walk(
    key: Key,
    angle: Number = 0.3,
    *,
    walk_rank: int | None = 1,
    decomposition: Decomposition | None = None,
) -> BasisRule:
    """A step of fixed length in a random direction from the last basis (GrassWalk).

    S_0 = U[:, :r] of G_0; then at each refresh a Gaussian X (m, r) and the geodesic of
    eq. 4 (GrassWalk paper, section 4, Algorithm 1; see `geodesic`).

    Deviations: X is made tangent, X <- (I - S S^T) X, without which eq. 4 does not keep
    S orthonormal. Its spectral norm is scaled to one, so that `angle` is an angle for
    every m and r. Its decomposition is exact (an r x r eigenproblem) instead of a
    randomized SVD.

    Args:
      key: a seed or a typed key.
      angle: eta in radians, the largest principal angle between two bases; at 0 the
        basis stays, at pi / 2 the fastest direction leaves the subspace.
      walk_rank: the number of directions that rotate, 1 to r, the fastest by `angle`;
        None for all r. The default is the paper's "controlled rank-1 rotations"
        (section 5); `grass_walk` reports measurements.
      decomposition: of G_0, "svd", "gram" or None, as in `dominant_svd`.

    Raises:
      ValueError: a walk_rank below 1 or, at update, above r; another decomposition; a
        bad key.

    Example:
      >>> tx = lro.low_rank(optax.chain(lro.grassmann_walk(key=0, angle=0.3),
      ...     lro.project(), lro.rotate_moments(optax.scale_by_adam()),
      ...     lro.recover_residual(limit=1.01)), rank=4, refresh_every=100)
    """
    if walk_rank is not None:
        check_count("walk_rank", walk_rank)

    def choose(frame: Frame, keys: jax.Array, _: Clock) -> jax.Array:
        if walk_rank is not None and walk_rank > frame.rank:
            raise ValueError(
                f"{frame.path}: walk_rank={walk_rank} is above the rank {frame.rank}; "
                "lower it, or pass None for all directions"
            )
        x = gaussian_matrix(frame, keys)
        return geodesic(frame.need("basis"), x, angle, walk_rank)

    made = basis_rule(choose, check_key(key), svd_until=1, decomposition=decomposition)
    return changed(made, reads_gradient=False, batched=small)


def grassmann_track(
    step_size: Number | None = 10.0, *, decomposition: Decomposition | None = None
) -> BasisRule:
    """A step down the estimation error along a rank-one geodesic (SubTrack++).

    S_0 = U[:, :r] of G_0; then at each refresh, with A = argmin ||S A - G|| = S^T G,

        D = 2 (G - S A) A^T                     minus the gradient of ||S A - G||_F^2
        sigma u v^T ~ D                         its leading singular triple
        S <- (S v cos(eta sigma) + u sin(eta sigma)) v^T + S (I - v v^T)

    (SubTrack++, the tracking that the GrassWalk paper compares with in section 5). One
    Newton-Schulz step removes rounding, so that it does not add up.

    Deviations: the released code tracks nothing where rows >= columns, because it
    projects the tangent with I - B B^T on the wrong side. This affects most of a
    LLaMA's matrices. Here every matrix is tracked.

    Args:
      step_size: eta, in radians per squared gradient: the angle grows with the
        gradient's scale, and 10 is the released scripts' for the mean loss of a
        language model. None rotates by the angle that makes ||S^T G|| largest in the
        plane of S v and u (ours).
      decomposition: of G_0, "svd", "gram" or None, as in `dominant_svd`.

    Raises:
      ValueError: another decomposition.

    Example:
      >>> tx = lro.low_rank(optax.chain(lro.bases.grassmann_track(None), lro.project(),
      ...     lro.rotate_moments(optax.scale_by_adam()), lro.recover_residual(1.01)),
      ...     rank=4, refresh_every=100)
    """

    def choose(frame: Frame, _: None, __: Clock) -> jax.Array:
        return _track(frame.need("basis"), frame.gradient, step_size)

    made = basis_rule(choose, svd_until=1, decomposition=decomposition)
    return changed(made, batched=small)


def _track(s: jax.Array, g: jax.Array, step_size: Number | None) -> jax.Array:
    # With G of unit size nothing here, which is of fourth order in G, leaves float32.
    scale = linalg.largest(g)
    g = linalg.unit_largest(g)
    a = linalg.matmul(linalg.transpose(s), g)
    residual = fence(g - linalg.matmul(s, a))
    d = _tangent(s, linalg.matmul(residual, linalg.transpose(a)))
    _, vectors = linalg.eigh(linalg.gram(linalg.unit_largest(d)))
    v = vectors[..., -1:]
    u = linalg.matmul(d, v)
    sigma = jnp.linalg.norm(u, axis=-2, keepdims=True)
    u = fence(u / jnp.where(sigma > 0, sigma, 1))
    along = linalg.matmul(s, v)
    if step_size is None:
        inside = jnp.sum(jnp.square(linalg.matmul(linalg.transpose(along), g)), -1)
        outside = jnp.sum(jnp.square(linalg.matmul(linalg.transpose(u), g)), -1)
        # The product of the two rows of G is sigma: (S v)^T G G^T u = v^T A R^T u.
        angle = 0.5 * jnp.arctan2(2 * sigma[..., 0], inside - outside)[..., None]
    else:
        angle = _capped(step_size * 2 * sigma * scale * scale)
    # Where G has no residual, D is rounding, and any direction.
    noise = 64 * float(jnp.finfo(g.dtype).eps)
    resolved = sigma > noise * jnp.sum(jnp.square(a), axis=(-2, -1), keepdims=True)
    angle = fence(jnp.where(resolved, angle, 0))
    moved = fence(along * (jnp.cos(angle) - 1)) + fence(u * jnp.sin(angle))
    return linalg.polish(fence(s + linalg.matmul(moved, linalg.transpose(v))))


def _capped(angle: jax.Array) -> jax.Array:
    """An angle that sine and cosine take, even of a gradient that overflows squared."""
    return jnp.nan_to_num(angle, nan=0.0, posinf=jnp.finfo(angle.dtype).max)
