"""Where: rows of the gradient, without arithmetic (FRUGAL, Grass)."""

from typing import Literal

import jax
import jax.numpy as jnp

from lowrank_optax.bases.follow import basis_rule
from lowrank_optax.bases.rule import BasisRule
from lowrank_optax.core import linalg
from lowrank_optax.core.aliases import Key
from lowrank_optax.core.frame import Frame
from lowrank_optax.core.keys import check_key, sample_indices
from lowrank_optax.core.stage import Clock

Order = Literal["random", "ascending", "descending"]


def coordinates(key: Key | None = None, *, order: Order = "random") -> BasisRule:
    """Selects r of the m rows of the gradient, new ones at each refresh (FRUGAL).

    S = I[:, I_t]: G~ and S G~ are gathers; the state is r integers. With order
    "random", I_t is a uniform sample without replacement; "ascending" and "descending"
    cycle through blocks of r neighboring rows, from the first row or the last (Zmushko
    et al. 2025, "FRUGAL").

    Rows lie along the weight's smaller side. FRUGAL's "columns" are the input side of
    torch's (out, in) weights, the same side for square matrices and for those with more
    outputs. With the dimension numbers `LAYERS` the rows are the layers of a stacked
    kernel (FRUGAL's block-wise mode): a rank of 0.25 trains a quarter of the layers
    with the stateful step.

    Args:
      key: a seed or a typed key, for order "random" alone.
      order: "random", "ascending" or "descending".

    Raises:
      ValueError: "random" without a key, another order with one, or an unknown order.

    Example:
      >>> stages = optax.chain(lro.bases.coordinates(order="descending"), lro.project(),
      ...     lro.in_subspace(optax.identity()), lro.project_back())
      >>> tx = lro.low_rank(stages, rank=2, refresh_every=1)
      >>> g = {"w": jnp.ones((5, 6))}
      >>> tx.update(g, tx.init(g))[0]["w"][:, 0].tolist()
      [0.0, 0.0, 0.0, 1.0, 1.0]
    """
    if order not in ("random", "ascending", "descending"):
        raise ValueError(
            f'order={order!r}: choose "random", "ascending" or "descending"'
        )
    if (order == "random") != (key is not None):
        raise ValueError(
            f'order={order!r}: pass a key for order "random", and for no other order'
        )

    def choose(frame: Frame, keys: jax.Array | None, clock: Clock) -> jax.Array:
        m, r = frame.basis_shape[-2:]
        if keys is not None:
            return sample_indices(keys, jnp.ones(frame.basis_shape[:-1]), r)
        # Blocks end with the last row: the last of a round overlaps the one before.
        block = jnp.minimum(clock.cycle % -(-m // r) * r, m - r)
        start = block if order == "ascending" else m - r - block
        return jnp.broadcast_to(start + jnp.arange(r), (*frame.batch, r))

    return basis_rule(choose, key, coordinates=True, from_gradient=False)


def sample_rows(key: Key) -> BasisRule:
    """Samples r rows of the gradient by their norm, without replacement (Grass).

    q_i = ||G_i|| / sum_j ||G_j||, I_t = sort(sample r of m by q without replacement),
    S_t = I[:, I_t] (Muhamed et al. 2024, "Grass", section 3: row-sparse projections,
    sampling by the multinomial of the norms without replacement, unscaled). The
    state is r integers. If fewer than r rows are nonzero, the first zero rows fill the
    sample.

    Args:
      key: a seed or a typed key.

    Raises:
      ValueError: a key that is neither an int nor typed.

    Example:
      >>> stages = optax.chain(lro.bases.sample_rows(key=0), lro.project(),
      ...     lro.reset_moments(optax.scale_by_adam()), lro.project_back())
    """

    def choose(frame: Frame, keys: jax.Array, _: Clock) -> jax.Array:
        rows = linalg.unit_largest(frame.gradient)
        return sample_indices(keys, jnp.linalg.norm(rows, axis=-1), frame.rank)

    return basis_rule(choose, check_key(key), coordinates=True)
