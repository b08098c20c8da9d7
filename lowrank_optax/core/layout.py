"""The leaves that are matrices, and their layout as (batch..., m, n), m <= n."""

import dataclasses
import math
import numbers
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P
from optax.contrib import MuonDimensionNumbers

from lowrank_optax.core.sharding import merged_spec, spec_of

Rules = Sequence[tuple[str, Any]]
# MuonDimensionNumbers, "matrix" or None; rules or a tree of these; a function to one.
DimensionNumbers = (
    MuonDimensionNumbers
    | Rules
    | Mapping[str, Any]
    | Callable[[optax.Params], Any]
    | None
)
Rank = int | float | Rules
Side = Literal["input", "output"]
Square = Side | Rules

STACKED = MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
"""The last two axes are the matrix; any axes before them are layers."""

LAYERS = MuonDimensionNumbers(reduction_axis=0, output_axis=(1, 2))
"""Each layer of a stacked kernel (layers, in, out) is one row of one matrix, so that
`coordinates` chooses layers."""

TRANSFORMER_MATRICES: Rules = (
    # Complete parts of a path, so that neither "PreNorm_0/attention/q/kernel" nor
    # "ScaledDotProductAttention/kernel" passes for a norm or a scale.
    (r"(?i)(^|/)(bias|scale|offset|gamma|beta)$", None),
    (r"(?i)(^|/)(ln_\w+|\w*norm(_?\d+)?)(/(scale|weight|bias|w|b|g))?$", None),
    (r"(?i)(^|/)(\w+_)?embed(ding|dings|der|s)?(_?\d+|_\w+)?(/|$)", None),
    (
        r"(?i)(^|/)w[tp]e(/|$)|(^|/)(lm_)?(head|logits)(_dense)?(/(kernel|weight|w))?$",
        None,
    ),
    (r"(?i)attn|attention|mlp|ffn|feed_?forward", "matrix"),
)
"""Low rank for the two-dimensional kernels of attention and MLP; full rank for
embeddings, output head, norms and biases, each by a complete part of its path. Any
other matrix is an error."""


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
    square: Square = "input",
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


def path_of(keys: jax.tree_util.KeyPath) -> str:
    """A leaf's path as rules see it: "layers/mlp/up/kernel".

    The array inside an `nnx.Variable` has the Variable's path: `flax.nnx.Optimizer`
    passes Variables to `init` and their arrays to `update`.
    """
    if keys and keys[-1] == jax.tree_util.GetAttrKey("value"):
        keys = keys[:-1]
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def match(rules: Rules, path: str, what: str) -> Any:
    """The value of the first rule whose regular expression is found in the path."""
    for pattern, value in rules:
        try:
            found = re.search(pattern, path)
        except re.error as error:
            raise ValueError(
                f"{path}: the {what} rule {pattern!r} is not a regular expression: "
                f"{error}"
            ) from error
        if found:
            return value
    raise ValueError(
        f"{path}: no {what} rule covers this parameter; add a pair (regular "
        f"expression, value), with the value None for full rank. "
        f"Rules: {[pattern for pattern, _ in rules]}"
    )


def _is_rules(x: object) -> TypeGuard[Rules]:
    return (
        isinstance(x, Sequence)
        and not isinstance(x, (str, MuonDimensionNumbers))
        and all(
            isinstance(p, tuple) and len(p) == 2 and isinstance(p[0], str) for p in x
        )
    )


def specs_of(
    dimension_numbers: DimensionNumbers, tree: optax.Params
) -> dict[str, MuonDimensionNumbers | None]:
    """The spec of each leaf by path: which axes are rows and columns, or full rank.

    Raises:
      ValueError: for a leaf that nothing covers, or that has three or more axes and
        no dimension numbers.
    """
    with_paths = jax.tree_util.tree_leaves_with_path(tree)
    leaves = {path_of(k): x for k, x in with_paths}
    if len(leaves) < len(with_paths):
        counts = Counter(path_of(k) for k, _ in with_paths)
        twice = [path for path, count in counts.items() if count > 1]
        raise ValueError(
            f"two parameters have the path {twice[0]}, which selects rules and random "
            "keys; rename one of them"
        )
    if callable(dimension_numbers):
        dimension_numbers = dimension_numbers(tree)
    if dimension_numbers is None or isinstance(dimension_numbers, MuonDimensionNumbers):
        spec = "matrix" if dimension_numbers is None else dimension_numbers
        specs = dict.fromkeys(leaves, spec)
    elif _is_rules(dimension_numbers):
        specs = {
            # Vectors have full rank whatever the rules say; none need cover them.
            p: match(dimension_numbers, p, "dimension_numbers") if x.ndim > 1 else None
            for p, x in leaves.items()
        }
    else:
        entries = jax.tree_util.tree_leaves_with_path(
            dimension_numbers,
            is_leaf=lambda x: x is None or isinstance(x, (MuonDimensionNumbers, str)),
        )
        by_path = {path_of(k): spec for k, spec in entries}
        if missing := sorted(set(leaves) - set(by_path)):
            raise ValueError(
                f"dimension_numbers has no entry for {missing}; pass rules, None, "
                "MuonDimensionNumbers (with the fields of optax's "
                "GaLoreDimensionNumbers), a tree of them, or a function to one"
            )
        specs = {p: by_path[p] for p in leaves}
    return {p: _checked(p, leaves[p].shape, spec) for p, spec in specs.items()}


def _checked(
    path: str, shape: tuple[int, ...], spec: object
) -> MuonDimensionNumbers | None:
    """Full rank for scalars, vectors and what is empty; "matrix" for two axes only."""
    if spec is None or len(shape) < 2 or not math.prod(shape):
        return None
    if isinstance(spec, MuonDimensionNumbers):
        return spec
    if spec != "matrix":
        raise ValueError(
            f'{path}: {spec!r} is not MuonDimensionNumbers, "matrix" or None'
        )
    if len(shape) > 2:
        raise ValueError(
            f"{path}: shape {shape} has {len(shape)} axes and no dimension numbers; "
            "name the matrix's axes with MuonDimensionNumbers(reduction_axis, "
            "output_axis) (lowrank_optax.STACKED: the last two), or pass None for full "
            "rank"
        )
    return MuonDimensionNumbers()


def rank_of(rank: Rank, path: str, layout: Layout) -> int | None:
    """r <= m for a matrix, or None for a rule that says full rank."""
    value: Any = match(rank, path, "rank") if _is_rules(rank) else rank
    if value is None:
        return None
    check_rank(value, path)
    if isinstance(value, numbers.Integral):
        return min(int(value), layout.m)
    return max(1, round(float(value) * layout.m))


def side_of(square: Square, path: str) -> Side:
    """The side of a square matrix that is projected."""
    rules = [("", square)] if isinstance(square, str) else square
    return match(rules, path, "square")


def check_square(square: object) -> None:
    """ValueError unless it is a side, or rules."""
    sides = [side for _, side in square] if _is_rules(square) else [square]
    for side in sides:
        if side not in ("input", "output"):
            raise ValueError(
                f'square={side!r}: choose "input" or "output", or pass (regular '
                "expression, side) pairs"
            )


def check_rank(rank: object, path: str = "low_rank") -> None:
    """ValueError unless rank is an int >= 1, a fraction in (0, 1], or rules."""
    if _is_rules(rank):
        for _, value in rank:
            if value is not None:
                check_rank(value, path)
    elif isinstance(rank, bool) or not isinstance(rank, numbers.Real):
        raise ValueError(
            f"{path}: rank must be an int, a float fraction of the smaller side or "
            f"(regular expression, rank) pairs, not {rank!r}; under "
            "optax.inject_hyperparams pass static_args=lowrank_optax.static_args(...)"
        )
    elif isinstance(rank, numbers.Integral):
        if rank < 1:
            raise ValueError(f"{path}: rank must be at least 1, not {rank}")
    elif not 0.0 < float(rank) <= 1.0:
        raise ValueError(f"{path}: a fractional rank must lie in (0, 1], not {rank}")


def check_matrix(path: str, x: jax.Array) -> None:
    """ValueError for a matrix that is not of real floating-point numbers."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"{path}: a {x.dtype} matrix of shape {x.shape} has no real singular "
            "vectors; set full rank (None in dimension_numbers or rank), or leave it "
            "out of the optimizer with optax.masked"
        )
