"""Where: random bases, orthonormal ones and Gaussian ones."""

import math

import jax

from lowrank_optax.bases.follow import basis_rule, changed
from lowrank_optax.bases.redrawn import redraw
from lowrank_optax.bases.rule import BasisRule, small
from lowrank_optax.core import linalg
from lowrank_optax.core.aliases import Key, Step
from lowrank_optax.core.frame import Frame
from lowrank_optax.core.keys import check_key
from lowrank_optax.core.linalg import fence
from lowrank_optax.core.singular import Decomposition


def random_basis(frame: Frame, keys: jax.Array) -> jax.Array:
    """Q of a Gaussian X = Q R: (L, m, r), uniform on the Grassmannian."""
    return linalg.orthonormalize(gaussian_matrix(frame, keys))


def gaussian_matrix(frame: Frame, keys: jax.Array) -> jax.Array:
    """X (L, m, r), its entries standard normal."""
    x = linalg.normal(keys, frame.basis_shape[-2:], frame.gradient.dtype)
    return fence(x)


def grassmann_jump(
    key: Key, *, decomposition: Decomposition | None = None
) -> BasisRule:
    """A random orthonormal basis at each refresh (GrassJump).

    S_0 = U[:, :r] of G_0; then S_t = Q of a Gaussian X = Q R (m, r), uniform on the
    Grassmannian (GrassWalk paper, section 4, Algorithm 1). Algorithm 1 makes S_0 from
    G_0 and then tests `step mod T = 0`, which holds at step 0 too; here the first jump
    is at step T.

    Args:
      key: a seed or a typed key.
      decomposition: of G_0, "svd", "gram" or None, as in `dominant_svd`.

    Raises:
      ValueError: another decomposition, or a key that is neither an int nor typed.

    Example:
      >>> tx = lro.low_rank(optax.chain(lro.grassmann_jump(key=0), lro.project(),
      ...     lro.rotate_moments(optax.scale_by_adam()), lro.recover_residual(1.01)),
      ...     rank=4, refresh_every=100)
    """
    return random_after(1, key, decomposition=decomposition)


def random_after(
    switch_step: Step, key: Key, *, decomposition: Decomposition | None = None
) -> BasisRule:
    """Leading singular vectors first, random orthonormal bases later (GoLore).

    S_t = U[:, :r] of G_t at a refresh before `switch_step`, and from there on Q of a
    Gaussian X = Q R (m, r), uniform on the Grassmannian (He et al. 2025, "Subspace
    Optimization for Large Language Models with Convergence Guarantees"). Late in
    training, noise fills the gradient's leading directions, which then carry no signal.
    A random subspace captures r / m of the signal, whatever the noise.

    Args:
      switch_step: the first step of random bases; 0 for random bases only.
      key: a seed or a typed key.
      decomposition: of the gradients, "svd", "gram" or None, as in `dominant_svd`.

    Raises:
      ValueError: another decomposition, or a key that is neither an int nor typed.

    Example:
      >>> stages = optax.chain(lro.bases.random_after(8000, key=0), lro.project(),
      ...     lro.rotate_moments(optax.scale_by_adam(), moments="first"),
      ...     lro.project_back(0.25))
    """
    made = basis_rule(
        lambda frame, keys, _: random_basis(frame, keys),
        check_key(key),
        svd_until=switch_step,
        decomposition=decomposition,
    )
    return changed(made, reads_gradient=False, batched=small)


def gaussian(key: Key, *, stored: bool = False) -> BasisRule:
    """A Gaussian projection, drawn anew at each refresh: S_ij ~ N(0, 1 / r).

    E[S S^T] = I, so the projection preserves lengths in the mean, but S^T S is not I:
    stages that need an orthonormal basis raise an error (Zhu et al. 2025, "APOLLO",
    section 4; Hao et al. 2024, "FLora", section 2.3).

    The state is a key, and S is drawn from it at every step, so that no array of mr
    numbers is stored. With `stored=True` the state holds S, as in the released
    apollo-torch: the same numbers, more memory and less time.

    Args:
      key: a seed or a typed key.
      stored: whether the state holds S.

    Raises:
      ValueError: a key that is neither an int nor typed; at update, outside `low_rank`.

    Example:
      >>> stages = optax.chain(lro.bases.gaussian(key=0), lro.project(),
      ...     lro.in_subspace(optax.scale_by_adam()), lro.scale_gradient())
    """

    def draw(frame: Frame, keys: jax.Array) -> jax.Array:
        x = linalg.normal(keys, frame.basis_shape[-2:], frame.gradient.dtype)
        return x.reshape(frame.basis_shape) / math.sqrt(frame.rank)

    rule = basis_rule(
        lambda frame, keys, _: draw(frame, keys),
        check_key(key),
        orthonormal=False,
        from_gradient=False,
    )
    return rule if stored else redraw(rule.rule)
