"""The layout of a leaf as matrices (batch..., m, n), m <= n."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from optax.contrib import MuonDimensionNumbers

from lowrank_optax.core.sharding import merged_spec, spec_of

Side = Literal["input", "output"]

STACKED = MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
"""The last two axes are the matrix; any axes before them are layers."""

LAYERS = MuonDimensionNumbers(reduction_axis=0, output_axis=(1, 2))
"""Each layer of a stacked kernel (layers, in, out) is one row of one matrix, so that
`coordinates` chooses layers."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """How one leaf becomes a batch of matrices, and back.

    Attributes:
      axes: the leaf's axes in the order batch, m's, n's.
      shape: the leaf's shape in that order.
      batch: the shape of the batch axes.
      m: the smaller side.
      n: the larger side.
      columns: which of the weight's axes the n columns are.
    """

    axes: tuple[int, ...]
    shape: tuple[int, ...]
    batch: tuple[int, ...]
    m: int
    n: int
    columns: Side

    @property
    def transposed(self) -> bool:
        """Whether the leaf has the n columns before the m rows."""
        return self.axes[-1] < self.axes[len(self.batch)]

    def to_matrix(self, x: jax.Array) -> jax.Array:
        x = x.transpose(self.axes)
        if x.ndim == len(self.batch) + 2:
            return x
        shape = (*self.batch, self.m, self.n)
        if not any(spec_of(x)):
            return x.reshape(shape)
        return jnp.reshape(x, shape, out_sharding=P(*merged_spec(x, shape)))

    def from_matrix(self, y: jax.Array) -> jax.Array:
        inverse = tuple(int(i) for i in np.argsort(self.axes))
        return y.reshape(self.shape).transpose(inverse)


def layout_of(
    path: str,
    shape: tuple[int, ...],
    spec: MuonDimensionNumbers,
    square: Side = "input",
) -> Layout:
    """The layout of a leaf; ValueError when the spec does not fit its shape.

    `square` is the side of a square matrix that becomes its m rows.
    """

    def normal(axes: Sequence[int] | int) -> tuple[int, ...]:
        axes = (axes,) if isinstance(axes, int) else tuple(axes)
        bad = [a for a in axes if not -len(shape) <= a < len(shape)]
        if bad or not axes:
            raise ValueError(
                f"{path}: {spec} does not fit the shape {shape}; name its axes"
            )
        return tuple(a % len(shape) for a in axes)

    rows, cols = normal(spec.reduction_axis), normal(spec.output_axis)
    if len({*rows, *cols}) != len(rows) + len(cols):
        raise ValueError(
            f"{path}: {spec} names an axis of the shape {shape} twice; name each once"
        )
    size = {axes: math.prod(shape[a] for a in axes) for axes in (rows, cols)}
    wide = size[rows] < size[cols] or (size[rows] == size[cols] and square == "input")
    short, long = (rows, cols) if wide else (cols, rows)
    batch = tuple(a for a in range(len(shape)) if a not in (*rows, *cols))
    axes = (*batch, *short, *long)
    return Layout(
        axes=axes,
        shape=tuple(shape[a] for a in axes),
        batch=tuple(shape[a] for a in batch),
        m=size[short],
        n=size[long],
        columns="output" if long is cols else "input",
    )


def check_matrix(path: str, x: jax.Array) -> None:
    """ValueError for a matrix that is not of real floating-point numbers."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"{path}: a {x.dtype} matrix of shape {x.shape} has no real singular "
            "vectors; set full rank (None in dimension_numbers or rank), or leave it "
            "out of the optimizer with optax.masked"
        )
