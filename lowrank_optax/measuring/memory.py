"""Reports the bytes of an optimizer's state per parameter, beside AdamW's."""

import dataclasses

import jax
import numpy as np
import optax

from lowrank_optax.bracket.leaf import decisions
from lowrank_optax.core.checks import transformation
from lowrank_optax.core.paths import path_of, with_paths

SHARED = "(shared)"


@dataclasses.dataclass(frozen=True)
class MemoryRow:
    """One parameter in a `MemoryReport`.

    Attributes:
      path: "layers/mlp/up/kernel"; "(shared)" for counts, keys and the like.
      shape: the parameter's shape.
      rank: r, the rank of its subspace; None for a leaf that is not projected because
        of a rule, its shape, or an optimizer without subspaces.
      state_bytes: bytes of the optimizer state that belongs to it.
      adamw_bytes: bytes of AdamW's state, in the parameter's dtype.
      full_rank: whether r = m, so that the subspace is the full space.
    """

    path: str
    shape: tuple[int, ...]
    rank: int | None
    state_bytes: int
    adamw_bytes: int
    full_rank: bool = False


@dataclasses.dataclass(frozen=True)
class MemoryReport:
    """The result of `memory_report`; printing it shows a table."""

    rows: tuple[MemoryRow, ...]

    @property
    def state_bytes(self) -> int:
        return sum(row.state_bytes for row in self.rows)

    @property
    def adamw_bytes(self) -> int:
        return sum(row.adamw_bytes for row in self.rows)

    @property
    def ratio(self) -> float:
        """State bytes as a fraction of AdamW's."""
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
    """Reports the bytes of `tx`'s state per parameter and in total, beside AdamW's.

    Both states are traced by `jax.eval_shape`; nothing is allocated. The gradient is
    not counted. The table shows a leaf that is not projected as "full". It adds "(all)"
    to a rank of m, where the subspace is the full space.

    Args:
      tx: any optax transformation.
      params: the parameters, arrays or `jax.ShapeDtypeStruct`s.

    Returns:
      A `MemoryReport`.

    Raises:
      ValueError: a `tx` that is no transformation, as where the two are exchanged.

    Example:
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
    tx = transformation("memory_report(tx, params)", tx, "lowrank_optax.galore(0.01)")
    shapes = {path: np.shape(x) for path, x in with_paths(params)}
    with decisions() as decided:
        # A new function each time: JAX caches the trace of a known one, and `low_rank`
        # would then not run and report its decisions.
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
    """Sums state bytes by the parameter whose path the state leaf's path contains."""
    total = dict.fromkeys([*shapes, SHARED], 0)
    for keys, leaf in jax.tree_util.tree_leaves_with_path(state):
        owner = _owner(keys, shapes) or SHARED
        total[owner] += int(np.prod(leaf.shape)) * leaf.dtype.itemsize
    return total


def _owner(
    keys: jax.tree_util.KeyPath, shapes: dict[str, tuple[int, ...]]
) -> str | None:
    """Returns the longest part of a path that is a parameter's path, or None."""
    ends = range(len(keys), 0, -1)
    parts = (path_of(keys[i:j]) for j in ends for i in range(j))
    return max((p for p in parts if p in shapes), key=len, default=None)
