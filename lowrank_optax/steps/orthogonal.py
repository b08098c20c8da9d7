"""Step: the polar factor of a moment (SUMO, Muon)."""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.core import linalg
from lowrank_optax.core.checks import check_count
from lowrank_optax.core.newton_schulz import newton_schulz

Polar = Literal["eigh", "svd", "newton_schulz"]


def scale_by_polar_factor(
    method: Polar = "eigh", *, iterations: int = 5
) -> optax.GradientTransformation:
    """Replaces each matrix M = U diag(s) V^T by its polar factor U V^T.

    U V^T = (M M^T)^(-1/2) M over the last two axes of a leaf is the steepest descent
    step in the spectral norm (Refael et al. 2025, "SUMO", section 3.2; Jordan et al.
    2024, "Muon"). Leaves of fewer than two axes pass unchanged. There is no state.
    Chain it after `optax.trace` inside `rotate_moments`: the moment is rotated with the
    basis, and the step is orthonormal in the subspace.

    Args:
      method: "eigh", two eigendecompositions of the r x r Gram matrix (`linalg.polar`);
        "svd", the most exact, for CPUs, and zero in directions of rounding; or
        "newton_schulz", Muon's products, whose singular values end at about 0.7 to 1.2,
        small ones below.
      iterations: number of iterations of "newton_schulz".

    Raises:
      ValueError: for another method, or iterations below 1.

    Example:
      >>> tx = lro.steps.scale_by_polar_factor()
      >>> m = jnp.array([[3.0, 0.0, 0.0], [0.0, -0.5, 0.0]])
      >>> tx.update(m, tx.init(m))[0].round(3).tolist()
      [[1.0, 0.0, 0.0], [0.0, -1.0, 0.0]]
    """
    if method not in FACTORS:
        raise ValueError(f"method={method!r}: choose one of {', '.join(FACTORS)}")
    check_count("iterations", iterations)

    def one(x: jax.Array) -> jax.Array:
        if jnp.ndim(x) < 2 or not x.size:
            return x
        tall = x.shape[-2] > x.shape[-1]
        wide = linalg.transpose(x) if tall else x
        o = FACTORS[method](wide, iterations)
        return linalg.transpose(o) if tall else o

    return optax.stateless(lambda updates, _: jax.tree.map(one, updates))


def by_svd(x: jax.Array) -> jax.Array:
    """U V^T of a thin SVD, without directions of rounding: (*batch, r, n)."""
    eps = float(jnp.finfo(x.dtype).eps) * max(x.shape[-2:])

    def one(x: jax.Array) -> jax.Array:
        # LAPACK's SVD hangs on an Inf but returns on a NaN.
        x = jnp.where(jnp.isfinite(x), x, jnp.nan)
        u, s, vt = jnp.linalg.svd(x, full_matrices=False)
        seen = s > eps * jnp.max(s)
        return linalg.matmul(u * seen[None, :], vt)

    return linalg.per_matrix(one, linalg.unit_largest(x))


FACTORS: dict[str, Callable[[jax.Array, int], jax.Array]] = {
    "eigh": lambda x, _: linalg.polar(x),
    "svd": lambda x, _: by_svd(x),
    "newton_schulz": newton_schulz,
}
