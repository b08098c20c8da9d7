"""How many bytes an optimizer's state takes, leaf by leaf, beside AdamW's."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lowrank_optax.basis import BasisState
from lowrank_optax.layout import path_of
from lowrank_optax.moments import first_moments
from lowrank_optax.online_pca import OnlinePCAState
from lowrank_optax.quantize_basis import QuantizedBasis
from lowrank_optax.step import PerMatrixState

SHARED = "(shared)"


@dataclasses.dataclass(frozen=True)
class MemoryRow:
    """One parameter.

    Attributes:
      path: "layers/mlp/up/kernel"; "(shared)" for counts, keys and the like.
      shape: the parameter's.
      rank: of its subspace, or None where the state has full rank.
      state_bytes: of the optimizer state that belongs to it.
      adamw_bytes: of AdamW's, in the parameter's dtype.
    """

    path: str
    shape: tuple[int, ...]
    rank: int | None
    state_bytes: int
    adamw_bytes: int


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
            rank = "full" if row.rank is None else str(row.rank)
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


def memory_report(tx: optax.GradientTransformation, params: Any) -> MemoryReport:
    """Bytes of `tx`'s state for each parameter and in all, beside AdamW's.

    Nothing is allocated: both states are traced by `jax.eval_shape`. An (m, n) matrix
    at rank r takes mr numbers of basis and 2nr of moments with Adam inside, in float32
    unless the weights are wider. Its gradient is not in the count: no optimizer here
    makes that smaller. A matrix whose rank would be min(m, n) or more is listed as
    "full".

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
      >>> report.rows[0].state_bytes == 4 * (64 * 8 + 2 * 256 * 8)
      True
      >>> print(report)
      parameter    shape   rank  state, bytes  AdamW's, bytes
      mlp/kernel  64x256      8        18,432         131,072
      norm            64   full           512             512
      (shared)                             12               4
      total               14.4%        18,956         131,588
    """
    shapes = {
        path_of(k): tuple(x.shape)
        for k, x in jax.tree_util.tree_leaves_with_path(params)
    }
    state = jax.eval_shape(tx.init, params)
    ours = _bytes_by_parameter(state, shapes)
    adamw = _bytes_by_parameter(jax.eval_shape(optax.adamw(1e-3).init, params), shapes)
    ranks = _ranks(state, shapes)
    return MemoryReport(
        tuple(
            MemoryRow(path, shape, ranks.get(path), ours[path], adamw[path])
            for path, shape in {**shapes, SHARED: ()}.items()
        )
    )


def _bytes_by_parameter(state: Any, shapes: dict[str, Any]) -> dict[str, int]:
    """State bytes by the parameter whose path is in the state leaf's path."""
    total = dict.fromkeys([*shapes, SHARED], 0)
    for keys, leaf in jax.tree_util.tree_leaves_with_path(state):
        owner = _owner(keys, shapes) or SHARED
        total[owner] += int(np.prod(leaf.shape)) * leaf.dtype.itemsize
    return total


def _owner(keys: Any, shapes: dict[str, Any]) -> str | None:
    """The longest stretch of a path that is a parameter's path."""
    ends = range(len(keys), 0, -1)
    stretches = (path_of(keys[i:j]) for j in ends for i in range(j))
    return max((p for p in stretches if p in shapes), key=len, default=None)


def _ranks(state: Any, shapes: dict[str, Any]) -> dict[str, int]:
    """r of each matrix: from its basis, or its first moment where that is a key."""
    ranks: dict[str, int] = {}

    def learn(tree: Any, prefix: Any, axis: int) -> None:
        for keys, x in jax.tree_util.tree_leaves_with_path(tree):
            owner = _owner((*prefix, *keys), shapes)
            if owner is not None and x.shape != shapes[owner]:
                ranks.setdefault(owner, x.shape[axis])

    kinds = (BasisState, OnlinePCAState, QuantizedBasis)
    states = jax.tree_util.tree_leaves_with_path(
        state, is_leaf=lambda x: isinstance(x, kinds)
    )
    for keys, part in states:
        if isinstance(part, QuantizedBasis):
            learn(jax.ShapeDtypeStruct(part.shape, jnp.float32), keys, -1)
        elif isinstance(part, (BasisState, OnlinePCAState)):
            learn(part.basis, keys, -1)
    for moments in jax.eval_shape(first_moments, state):
        if not isinstance(moments, PerMatrixState):
            learn(moments, (), -2)
    return ranks
