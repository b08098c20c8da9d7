"""Where: a fixed basis of blocks of neighboring rows, which nothing stores (FOAM)."""

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.core.blocks import block_sizes, repeat_in_blocks
from lowrank_optax.core.frame import Frame
from lowrank_optax.core.stage import check_first, stateless_stage


def fold() -> optax.GradientTransformation:
    """Sums r blocks of neighboring rows of the gradient (FOAM; the Haar wavelet, GWT).

    S_ij = 1 / sqrt(b_j) for the b_j rows i of block j, and 0 elsewhere. S^T G are sums,
    and S y repeats rows: there is no product, no refresh and no state. Blocks lie along
    the smaller side, and their sizes differ by at most one. m/r = 2^l is level l.

    S is orthonormal. For blocks of 2^l rows, S^T G are the approximation coefficients
    of the discrete Haar wavelet at level l (Wen et al. 2025, "GWT", arXiv 2501.07237),
    and 2^(l/2) times the means of the blocks (Wen et al. 2025, "FOAM", arXiv
    2512.07112). The two span the same subspace, so one basis serves both methods.

    Deviations: both released codes fold the input side of every matrix, which is the
    larger side of some (an MLP's down projection). They fill a last, shorter block with
    zeros. The basis is not a `BasisRule`: `cast_basis` and the like have nothing to
    store.

    Raises:
      ValueError: at update, outside `low_rank` or after another basis rule.

    Example:
      >>> stages = optax.chain(lro.bases.fold(), lro.project(),
      ...     lro.in_subspace(optax.identity()), lro.project_back())
      >>> tx = lro.low_rank(stages, rank=1, refresh_every=1)
      >>> g = jnp.arange(24.0).reshape(4, 6)
      >>> tx.update(g, tx.init(g))[0][:, 0].tolist()   # the mean of 0, 6, 12 and 18
      [9.0, 9.0, 9.0, 9.0]
    """

    def one(frame: Frame) -> Frame:
        check_first(frame, "basis")
        if frame.full_rank:
            return frame
        # For stages that need S itself; `Frame.down` and `Frame.up` do without.
        s = _dense(frame)
        return frame.replace(
            basis=s,
            previous=s,
            rotation=frame.no_rotation(),
            refreshed=jnp.zeros(frame.batch, bool),
            folded=True,
        )

    return stateless_stage(one)


def _dense(frame: Frame) -> jax.Array:
    """S, (*batch, m, r)."""
    m, r = frame.basis_shape[-2:]
    eye = jnp.eye(r, dtype=frame.gradient.dtype)
    s = repeat_in_blocks(eye / jnp.sqrt(block_sizes(m, eye)), m)
    return jnp.broadcast_to(s, frame.basis_shape)
