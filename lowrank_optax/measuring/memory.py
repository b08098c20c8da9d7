"""How many bytes an optimizer's state takes, leaf by leaf, beside AdamW's."""

import dataclasses

import jax
import numpy as np
import optax

from lowrank_optax.bracket.leaf import decisions
from lowrank_optax.core.layout import path_of

SHARED = "(shared)"


@dataclasses.dataclass(frozen=True)
class MemoryRow:
    """One parameter.

    Attributes:
      path: "layers/mlp/up/kernel"; "(shared)" for counts, keys and the like.
      shape: the parameter's.
      rank: of its subspace, m where that is the whole space; None where the state has
        full rank by a rule, the parameter's shape, or an optimizer without subspaces.
      full_rank: whether the rank is m.
      state_bytes: of the optimizer state that belongs to it.
      adamw_bytes: of AdamW's, in the parameter's dtype.
    """

    path: str
    shape: tuple[int, ...]
    rank: int | None
    state_bytes: int
    adamw_bytes: int
    full_rank: bool = False


@dataclasses.dataclass(frozen=True)
class MemoryReport:
    """The rows of `memory_report`; printing it shows a table."""

    rows: tuple[MemoryRow, ...]

    @property
    def state_bytes(self) -> int:
        return sum(row.state_bytes for row in self.rows)

    @property
    def adamw_bytes(self) -> int:
        return sum(row.adamw_bytes for row in self.rows)

    @property
    def ratio(self) -> float:
        """State bytes as a part of AdamW's."""
        return self.state_bytes / max(self.adamw_bytes, 1)

    def __str__(self) -> str:
        def line(row: MemoryRow) -> tuple[str, ...]:
            rank = "full" if row.rank is None else f"{row.rank}"
            rank += " (all)" if row.full_rank else ""
            sizes = f"{row.state_bytes:,}", f"{row.adamw_bytes:,}"
            if row.path == SHARED:
                return row.path, "", "", *sizes
            return row.path, "x".join(map(str, row.shape)), rank, *sizes

        total = f"{self.state_bytes:,}", f"{self.adamw_bytes:,}"
        table = [
            ("parameter", "shape", "rank", "state, bytes", "AdamW's, bytes"),
            *map(line, self.rows),
            ("total", "", f"{self.ratio:.1%}", *total),
        ]
        width = [max(len(row[i]) for row in table) for i in range(5)]
        return "\n".join(
            f"{a:<{width[0]}}  {b:>{width[1]}}  {c:>{width[2]}}  "
            f"{d:>{width[3]}}  {e:>{width[4]}}"
            for a, b, c, d, e in table
        )


def memory_report(
    tx: optax.GradientTransformation, params: optax.Params
) -> MemoryReport:
    """Bytes of `tx`'s state for each parameter and in all, beside AdamW's.

    Nothing is allocated: both states are traced by `jax.eval_shape`. An (m, n) matrix
    at rank r takes mr numbers of basis and 2nr of moments with Adam inside, in float32
    unless the weights are wider, and a byte that says whether its gradient was ever
    not zero; a leaf of full rank takes a byte for each tree that it has no part in. The
    gradient is not in the count: no optimizer here makes that smaller. A matrix whose
    rank would be min(m, n) or more is listed with "(all)" behind its rank, and one that
    a rule keeps at full rank as "full".

    Args:
      tx: any optax transformation.
      params: the parameters, arrays or `jax.ShapeDtypeStruct`s.

    Returns:
      A `MemoryReport`.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> params = {"mlp": {"kernel": jnp.ones((64, 256))}, "norm": jnp.ones(64)}
      >>> tx = lro.galore(0.01, rank=8, refresh_every=200)
      >>> report = lro.memory_report(tx, params)
      >>> report.rows[0].state_bytes == 4 * (64 * 8 + 2 * 256 * 8) + 1
      True
      >>> print(report)
      parameter    shape   rank  state, bytes  AdamW's, bytes
      mlp/kernel  64x256      8        18,433         131,072
      norm            64   full           514             512
      (shared)                             16               4
      total               14.4%        18,963         131,588
    """
    shapes = {
        path_of(k): tuple(x.shape)
        for k, x in jax.tree_util.tree_leaves_with_path(params)
    }
    with decisions() as decided:
        # A function of its own, for JAX does not trace the same one twice.
        state = jax.eval_shape(lambda tree: tx.init(tree), params)
    ours = _bytes_by_parameter(state, shapes)
    adamw = _bytes_by_parameter(jax.eval_shape(optax.adamw(1e-3).init, params), shapes)
    leaves = {leaf.path: leaf for leaf in decided if leaf.layout is not None}

    def row(path: str, shape: tuple[int, ...]) -> MemoryRow:
        leaf = leaves.get(path)
        rank, full_rank = (None, False) if leaf is None else (leaf.rank, leaf.full_rank)
        return MemoryRow(path, shape, rank, ours[path], adamw[path], full_rank)

    return MemoryReport(tuple(row(*item) for item in {**shapes, SHARED: ()}.items()))


def _bytes_by_parameter(
    state: optax.OptState, shapes: dict[str, tuple[int, ...]]
) -> dict[str, int]:
    """State bytes by the parameter whose path is in the state leaf's path."""
    total = dict.fromkeys([*shapes, SHARED], 0)
    for keys, leaf in jax.tree_util.tree_leaves_with_path(state):
        owner = _owner(keys, shapes) or SHARED
        total[owner] += int(np.prod(leaf.shape)) * leaf.dtype.itemsize
    return total


def _owner(
    keys: jax.tree_util.KeyPath, shapes: dict[str, tuple[int, ...]]
) -> str | None:
    """The longest stretch of a path that is a parameter's path."""
    ends = range(len(keys), 0, -1)
    stretches = (path_of(keys[i:j]) for j in ends for i in range(j))
    return max((p for p in stretches if p in shapes), key=len, default=None)
