"""Where: walks, jumps and tracking on the Grassmannian."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lowrank_optax import linalg
from lowrank_optax.basis import basis_rule, check_key
from lowrank_optax.frame import Clock, Frame
from lowrank_optax.linalg import Decomposition, fence


def geodesic(s: jax.Array, x: jax.Array, step_size: float | jax.Array) -> jax.Array:
    """The point at angle `step_size` from span(S) on the geodesic towards X.

    Eq. 4 of the GrassWalk paper (section 4), with X^ = (I - S S^T) X scaled to unit
    spectral norm and X^ = U Sigma V^T in full, so that S (I - V V^T) vanishes:

        S(eta) = S V cos(Sigma eta) V^T + U sin(Sigma eta) V^T

    U sin(Sigma eta) is X^ V sin(Sigma eta) / Sigma, which needs no U and, at Sigma = 0,
    only a limit: the r x r matrix X^^T X^ is factorised, not X. One Newton-Schulz step
    takes rounding off, so that it does not add up over a walk.

    Args:
      s: (*batch, m, r), orthonormal, r < m.
      x: (*batch, m, r), any direction; it is made tangent here.
      step_size: eta, the largest principal angle between the two subspaces, in radians.

    Returns:
      (*batch, m, r), orthonormal.
    """
    # Twice, for what is left of a direction along S is rounding, which is not tangent.
    x = linalg.unit(_tangent(s, linalg.unit(_tangent(s, x))))
    squares, v = linalg.eigh(linalg.gram(x))
    sigma = fence(jnp.sqrt(jnp.maximum(squares, 0)))
    largest = jnp.max(sigma, axis=-1, keepdims=True)
    largest = jnp.where(largest > 0, largest, 1)
    sigma = fence(sigma / largest)
    angle = fence(step_size * sigma)
    sine = fence(jnp.sin(angle))
    small = sigma < jnp.finfo(sigma.dtype).eps
    sine_over_sigma = fence(
        jnp.where(small, step_size, sine / jnp.where(small, 1, sigma))
    )

    def function_of_sigma(values: jax.Array) -> jax.Array:
        return linalg.matmul(fence(v * values[..., None, :]), linalg.transpose(v))

    along = linalg.matmul(s, function_of_sigma(fence(jnp.cos(angle))))
    x = fence(x / largest[..., None])
    across = linalg.matmul(x, function_of_sigma(sine_over_sigma))
    return linalg.polish(fence(along + across))


def _tangent(s: jax.Array, x: jax.Array) -> jax.Array:
    """(I - S S^T) X."""
    return fence(x - linalg.matmul(s, linalg.matmul(linalg.transpose(s), x)))


def _gaussian(frame: Frame, keys: Any) -> jax.Array:
    flat = keys.reshape(math.prod(frame.batch))
    shape, dtype = frame.basis_shape[-2:], frame.gradient.dtype
    x = jax.vmap(lambda key: jax.random.normal(key, shape, dtype))(flat)
    return fence(linalg.replicated(x.reshape(frame.basis_shape)))


def random_basis(frame: Frame, keys: Any) -> jax.Array:
    """Q of a Gaussian X = Q R: (*batch, m, r), uniform on the Grassmannian."""
    return linalg.orthonormalize(_gaussian(frame, keys))


def grassmann_walk(
    key: jax.Array | int,
    step_size: float | jax.Array = 0.3,
    *,
    decomposition: Decomposition | None = None,
) -> optax.GradientTransformationExtraArgs:
    """A step of fixed length in a random direction from the last basis (GrassWalk).

    S_0 = U[:, :r] of G_0; then at each refresh a Gaussian X (m, r) and the geodesic
    of eq. 4 (GrassWalk paper, section 4, Algorithm 1; see `geodesic`).

    Deviations, where the paper is silent or would lose orthonormality: X is made
    tangent, X <- (I - S S^T) X, without which eq. 4 does not keep S orthonormal; its
    spectral norm is scaled to one, so that `step_size` is an angle whatever m and r;
    its decomposition is exact (an r x r eigenproblem) instead of a randomized SVD.
    Every direction turns a little, the fastest by `step_size`.

    Args:
      key: a seed or a typed key.
      step_size: eta in radians, the largest principal angle between two bases; 0
        stands still, pi / 2 turns the fastest direction out of the subspace.
      decomposition: of G_0, "svd", "gram" or None, as in `dominant_svd`.

    Raises:
      ValueError: another decomposition, or a key that is neither an int nor typed.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> tx = lro.low_rank(optax.chain(lro.grassmann_walk(key=0, step_size=0.3),
      ...     lro.project(), lro.rotate_moments(optax.scale_by_adam()),
      ...     lro.recover_residual(limit=1.01)), rank=4, refresh_every=100)
      >>> state = tx.init({"w": jnp.ones((8, 16))})
    """
    check_start(decomposition)

    def choose(frame: Frame, keys: jax.Array | None, clock: Clock) -> jax.Array:
        return jax.lax.cond(
            clock.step == 0,
            lambda: linalg.leading(frame.gradient, frame.rank, decomposition),
            lambda: geodesic(
                frame.need("basis", "low_rank"), _gaussian(frame, keys), step_size
            ),
        )

    return basis_rule(choose, check_key(key))


def grassmann_jump(
    key: jax.Array | int, *, decomposition: Decomposition | None = None
) -> optax.GradientTransformationExtraArgs:
    """A random orthonormal basis at each refresh (GrassJump).

    S_0 = U[:, :r] of G_0; then S_t = Q of a Gaussian X = Q R (m, r), uniform on the
    Grassmannian (GrassWalk paper, section 4, Algorithm 1).

    Algorithm 1 makes S_0 from G_0 and then tests `step mod T = 0`, which holds at step
    0 too; read here as: the first jump is at step T.

    Args:
      key: a seed or a typed key.
      decomposition: of G_0, "svd", "gram" or None, as in `dominant_svd`.

    Raises:
      ValueError: another decomposition, or a key that is neither an int nor typed.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> tx = lro.low_rank(optax.chain(lro.grassmann_jump(key=0), lro.project(),
      ...     lro.rotate_moments(optax.scale_by_adam()), lro.recover_residual(1.01)),
      ...     rank=4, refresh_every=100)
      >>> state = tx.init({"w": jnp.ones((8, 16))})
    """
    check_start(decomposition)

    def choose(frame: Frame, keys: jax.Array | None, clock: Clock) -> jax.Array:
        return jax.lax.cond(
            clock.step == 0,
            lambda: linalg.leading(frame.gradient, frame.rank, decomposition),
            lambda: random_basis(frame, keys),
        )

    return basis_rule(choose, check_key(key))


def random_after(
    switch_step: int | jax.Array,
    key: jax.Array | int,
    *,
    decomposition: Decomposition | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Leading singular vectors first, random orthonormal bases in the end (GoLore).

    S_t = U[:, :r] of G_t at a refresh before `switch_step`, and Q of a Gaussian
    X = Q R (m, r), uniform on the Grassmannian, from it on (He et al. 2025,
    "Subspace Optimization for Large Language Models with Convergence Guarantees").
    Late in training, when noise fills the gradient's leading directions, they carry
    no signal; a random subspace catches r / m of it whatever the noise.

    Args:
      switch_step: the first step of random bases; 0 for none but those.
      key: a seed or a typed key.
      decomposition: of the gradients, "svd", "gram" or None, as in `dominant_svd`.

    Raises:
      ValueError: another decomposition, or a key that is neither an int nor typed.

    Example:
      >>> import lowrank_optax as lro
      >>> stages = optax.chain(lro.random_after(8000, key=0), lro.project(),
      ...     lro.rotate_moments(optax.scale_by_adam(), moments="first"),
      ...     lro.project_back(0.25))
    """
    check_start(decomposition)

    def choose(frame: Frame, keys: jax.Array | None, clock: Clock) -> jax.Array:
        return jax.lax.cond(
            clock.step < switch_step,
            lambda: linalg.leading(frame.gradient, frame.rank, decomposition),
            lambda: random_basis(frame, keys),
        )

    return basis_rule(choose, check_key(key))


def grassmann_track(
    step_size: float | jax.Array | None = 10.0,
    *,
    decomposition: Decomposition | None = None,
) -> optax.GradientTransformationExtraArgs:
    """A step down the estimation error along a rank-one geodesic (SubTrack++).

    S_0 = U[:, :r] of G_0; then at each refresh, with A = argmin ||S A - G|| = S^T G,

        D = 2 (G - S A) A^T                     minus the gradient of ||S A - G||_F^2
        sigma u v^T ~ D                         its leading singular triple
        S <- (S v cos(eta sigma) + u sin(eta sigma)) v^T + S (I - v v^T)

    (SubTrack++, the tracking that the GrassWalk paper compares with in section 5). One
    Newton-Schulz step keeps rounding from adding up.

    Deviations: the released code tracks nothing where rows >= columns, which is most
    of a LLaMA's matrices (it projects the tangent with I - B B^T on the wrong side);
    here every matrix is tracked, in its canonical orientation.

    Args:
      step_size: eta, in radians per squared gradient: the angle grows with the
        gradient's scale, and 10 is what the released scripts take for the mean loss
        of a language model. None turns by the angle that makes ||S^T G|| largest in
        the plane of S v and u, whatever the scale (ours).
      decomposition: of G_0, "svd", "gram" or None, as in `dominant_svd`.

    Raises:
      ValueError: another decomposition.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> tx = lro.low_rank(optax.chain(lro.grassmann_track(None), lro.project(),
      ...     lro.rotate_moments(optax.scale_by_adam()), lro.recover_residual(1.01)),
      ...     rank=4, refresh_every=100)
      >>> state = tx.init({"w": jnp.ones((8, 16))})
    """
    check_start(decomposition)

    def choose(frame: Frame, _: jax.Array | None, clock: Clock) -> jax.Array:
        return jax.lax.cond(
            clock.step == 0,
            lambda: linalg.leading(frame.gradient, frame.rank, decomposition),
            lambda: _track(frame.need("basis", "low_rank"), frame.gradient, step_size),
        )

    return basis_rule(choose)


def _track(
    s: jax.Array, g: jax.Array, step_size: float | jax.Array | None
) -> jax.Array:
    # With G of unit size nothing here, which is of fourth order in G, leaves float32.
    scale = linalg.largest(g)
    g = linalg.unit(g)
    a = linalg.matmul(linalg.transpose(s), g)
    residual = fence(g - linalg.matmul(s, a))
    d = _tangent(s, linalg.matmul(residual, linalg.transpose(a)))
    _, vectors = linalg.eigh(linalg.gram(linalg.unit(d)))
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
    angle = fence(jnp.where(sigma > 0, angle, 0))
    moved = fence(along * (jnp.cos(angle) - 1)) + fence(u * jnp.sin(angle))
    return linalg.polish(fence(s + linalg.matmul(moved, linalg.transpose(v))))


def _capped(angle: jax.Array) -> jax.Array:
    """An angle that sine and cosine take, even of a gradient that overflows squared."""
    return jnp.nan_to_num(angle, nan=0.0, posinf=jnp.finfo(angle.dtype).max)


def check_start(decomposition: Decomposition | None) -> None:
    if decomposition not in (None, "svd", "gram"):
        raise ValueError(
            f'decomposition={decomposition!r} of the first gradient: choose "svd", '
            '"gram" or None'
        )
