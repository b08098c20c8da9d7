"""Where: one step of orthogonal iteration on the mean of G G^T (COSMOS)."""

import jax

from lowrank_optax.bases.follow import basis_rule, changed
from lowrank_optax.bases.rule import BasisRule, small
from lowrank_optax.bases.switching import gram_product
from lowrank_optax.core import linalg
from lowrank_optax.core.frame import Frame
from lowrank_optax.core.linalg import select
from lowrank_optax.core.singular import Decomposition
from lowrank_optax.core.stage import Clock


def orthogonal_iterate(*, decomposition: Decomposition | None = None) -> BasisRule:
    """Takes a step of orthogonal iteration on the running mean of G G^T (COSMOS).

    S_0 = U[:, :r] of G_0; then at each refresh, with Q~ (r, r) of `track_gram`,

        S_t = Q of (decay S_{t-1} Q~_{t-1} + (1 - decay) G_t G_t^T S_{t-1}) = Q R

    (Liu et al. 2025, "COSMOS", arXiv 2502.17410, Algorithm 1.) The matrix on the right
    is the mean of G G^T, as far as Q~ knows it, times S_{t-1}. The columns turn towards
    its leading eigenvectors, in their order. Without `track_gram` the mean is G_t G_t^T
    alone. A refresh is three products with (m, n) or (m, r) and a QR of (m, r).

    The source starts from U_0 and names no value for it. Its released code takes the
    singular vectors, as here.

    Args:
      decomposition: of G_0, "svd", "gram" or None, as in `dominant_svd`.

    Raises:
      ValueError: another decomposition; at update, outside `low_rank`.

    Example:
      >>> where = optax.chain(lro.bases.orthogonal_iterate(), lro.project())
      >>> tx = lro.low_rank(optax.chain(
      ...     lro.bases.track_gram(where, decay=0.95, rotate=True),
      ...     lro.in_subspace(optax.scale_by_adam()), lro.project_back()),
      ...     rank=4, refresh_every=1)
    """

    def choose(frame: Frame, _: None, clock: Clock) -> jax.Array:
        del clock
        s = frame.need("basis")
        new = linalg.orthonormalize(gram_product(frame)(s))
        # Without a mean a zero gradient says nothing of the basis.
        return new if frame.tracked is not None else select(frame.nonzero(), new, s)

    made = basis_rule(choose, svd_until=1, decomposition=decomposition)
    return changed(made, batched=small)
