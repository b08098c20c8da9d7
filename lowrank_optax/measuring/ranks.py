"""Ranks of matrices by what their gradients need, within one memory budget."""

import heapq
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lowrank_optax.bracket.leaf import Leaf, decide_leaves, is_leaf
from lowrank_optax.core import linalg
from lowrank_optax.core.checks import check_count
from lowrank_optax.core.dimensions import DimensionNumbers
from lowrank_optax.core.layout import check_matrix
from lowrank_optax.core.paths import by_path, unboxed
from lowrank_optax.core.rules import Rank, Square, check_rank, check_square, is_rules


def allocate_ranks(
    gradients: optax.Updates,
    budget: Rank,
    *,
    multiple: int = 8,
    dimension_numbers: DimensionNumbers = "auto",
    square: Square = "input",
) -> tuple[tuple[str, int | None], ...]:
    """Distributes the memory of one rank over the matrices, by explained variance.

    With the singular values sigma_1 >= ... >= sigma_m of a matrix's gradient, rank r
    explains the share

        e(r) = sum_{i <= r} sigma_i^2 / sum_i sigma_i^2

    of it. The ranks maximize the sum of e over all matrices, while the state of all of
    them, L (m r + 2 n r) numbers of L stacked matrices, is at most that of `budget`.
    The layers of a stacked kernel have one rank, by the mean of e over them. Every leaf
    begins with `multiple` directions. The next `multiple` go to the leaf where they
    explain most for their memory. That is the best choice, except for what is left of
    the budget at the end.

    Published methods choose ranks by explained variance too, one matrix at a time and
    while they train (Refael et al. 2024, "AdaRankGrad"). Here ranks are chosen once,
    before training, from gradients that the caller computes, and the budget is shared.

    Args:
      gradients: a tree like the parameters. Take the mean over many tokens: in a small
        batch noise counts as explained variance.
      budget: a rank, in any form that `low_rank` takes; the memory to distribute.
      multiple: ranks are multiples of it, and at most m. If a rank of the budget is
        smaller, that rank takes its place.
      dimension_numbers, square: as in `low_rank`.

    Returns:
      Rules for `rank=` of an optimizer: (regular expression, rank) for each matrix, and
      after a budget of rules ("", None), full rank for all others.

    Raises:
      ValueError: no matrix, a gradient that is not finite (the error names it), and
        what `low_rank` raises for the same arguments.

    Example:
      >>> kernel = lambda *sizes: jnp.diag(jnp.array(sizes))
      >>> gradients = {"mlp": {"up": {"kernel": kernel(3.0, 0.1, 0.1, 0.1)},
      ...                      "down": {"kernel": kernel(3.0, 2.0, 2.0, 1.0)}}}
      >>> lro.measuring.allocate_ranks(gradients, 2, multiple=1)
      (('^mlp/down/kernel$', 3), ('^mlp/up/kernel$', 1))
    """
    check_rank(budget, "allocate_ranks")
    check_square(square)
    check_count("multiple", multiple)
    decided = decide_leaves(unboxed(gradients), dimension_numbers, budget, square)
    leaves = [x for x in jax.tree.leaves(decided, is_leaf=is_leaf) if x.layout]
    if not leaves:
        raise ValueError(
            "allocate_ranks() found no matrix with a rank: pass gradients as they are, "
            "and dimension_numbers as the optimizer has them"
        )
    arrays = by_path(gradients)
    width = min(multiple, *(leaf.rank for leaf in leaves))
    needs = [_need(leaf, arrays[leaf.path], width) for leaf in leaves]
    left = sum(x.cost * leaf.rank for x, leaf in zip(needs, leaves, strict=True))
    ranks = _greedy(needs, left)
    chosen = tuple(
        (f"^{re.escape(leaf.path)}$", r) for leaf, r in zip(leaves, ranks, strict=True)
    )
    # Matrices that the budget's own rules give full rank.
    return (*chosen, ("", None)) if is_rules(budget) else chosen


class _Need(NamedTuple):
    """The cost of a leaf's directions, and the share that they explain.

    Attributes:
      cost: numbers of state for each direction, in all of its matrices.
      widths: how many directions each further step of its rank adds.
      gains: the share that each of them explains, falling.
    """

    cost: int
    widths: list[int]
    gains: list[float]


def _need(leaf: Leaf, gradient: jax.Array, width: int) -> _Need:
    check_matrix(leaf.path, gradient)
    layout = leaf.layout
    assert layout is not None
    count = math.prod(layout.batch)
    shares = _shares(layout.to_matrix(gradient).reshape(count, layout.m, layout.n))
    shares = np.asarray(shares, np.float64)
    if not np.isfinite(shares).all():
        raise ValueError(
            f"{leaf.path}: its gradient of shape {leaf.shape} is not finite; take that "
            "of a step that would not be skipped"
        )
    starts = range(0, layout.m, width)
    return _Need(
        count * (layout.m + 2 * layout.n),
        [min(width, layout.m - i) for i in starts],
        [float(shares[i : i + width].sum()) for i in starts],
    )


@jax.jit
def _shares(g: jax.Array) -> jax.Array:
    """sigma_i^2 / sum_j sigma_j^2, descending: the mean over matrices (L, m, n)."""

    def one(g: jax.Array) -> jax.Array:
        squares = jnp.linalg.eigvalsh(linalg.gram(linalg.transpose(g)))[::-1]
        squares = jnp.maximum(squares, 0)
        return linalg.ratio(squares, jnp.sum(squares), 0)

    wide = jnp.promote_types(g.dtype, jnp.float32)
    g = linalg.unit_largest(g.astype(wide))
    # An eigendecomposition of what is not finite may not return.
    finite = jnp.all(jnp.isfinite(g), axis=(-2, -1))
    shares = linalg.per_matrix(one, linalg.select(finite, g, jnp.zeros_like(g)))
    return jnp.mean(linalg.select(finite, shares, jnp.full_like(shares, jnp.nan)), 0)


def _greedy(needs: Sequence[_Need], budget: int) -> list[int]:
    """The rank of each leaf: the next directions go where they explain most."""
    ranks = [need.widths[0] for need in needs]
    budget -= sum(need.cost * r for need, r in zip(needs, ranks, strict=True))
    # The largest share for its memory first; of equal ones, the first leaf's.
    steps = [1] * len(needs)

    def offer(i: int) -> list[tuple[float, int]]:
        need, k = needs[i], steps[i]
        if k == len(need.widths) or need.cost * need.widths[k] > budget:
            return []
        return [(-need.gains[k] / (need.cost * need.widths[k]), i)]

    heap = [entry for i in range(len(needs)) for entry in offer(i)]
    heapq.heapify(heap)
    while heap:
        _, i = heapq.heappop(heap)
        if not offer(i):  # the budget has become too small since
            continue
        width = needs[i].widths[steps[i]]
        ranks[i] += width
        budget -= needs[i].cost * width
        steps[i] += 1
        for entry in offer(i):
            heapq.heappush(heap, entry)
    return ranks
