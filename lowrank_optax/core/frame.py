"""The Frame: one matrix's gradient and what the stages make of it."""

import dataclasses
import math
import zlib
from typing import Any, NoReturn, TypeGuard

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lowrank_optax.core.blocks import block_sizes, block_sums, repeat_in_blocks
from lowrank_optax.core.linalg import product, transpose

_SET_BY = {
    "low": "project()",
    "low_step": "in_subspace() or rotate_moments()",
    "step": "project_back() or another way back",
}
"""The stage that sets a field; a basis rule sets the others."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Frame:
    """Stands for a matrix leaf, in the papers' orientation m <= n.

    Each stage reads the fields of the stages before it and fills in its own:
    a basis rule `basis`, `rotation` and `refreshed`, `project` `low`, `in_subspace` or
    `rotate_moments` `low_step`, `project_back` or `recover_residual` `step`.
    All arrays share the leading batch axes (the layers of a stacked kernel).

    A Frame is not a pytree: `jax.tree` sees a leaf, and arithmetic on it raises a
    TypeError, so that a stock optax transformation between two stages fails.

    At full rank, r = m, S is the identity: `basis` and `rotation` stay None.

    Attributes:
      gradient: (*batch, m, n), G.
      rank: r <= m.
      path: the leaf's path in the tree, "layers/mlp/up/kernel".
      columns: the weight's axis that the n columns are, "input" or "output".
      layer: () integer, the layer where the layers of a stack are updated one at a time
        (`per_layer`); None where all are here.
      transposed: whether the weight is stored with the n columns before the m rows.
      precision: of the products with S, as `jax.lax.dot_general` takes it.
      given_dtype: of the gradient as it came; None for that of `gradient`.
      momentum: (*batch, r, n), the step's first moment M_{t-1} without bias correction,
        in the coordinates of S_{t-1}; None for a step without one.
      tracked: (*batch, r, r), what `track_gram` adds to G~ G~^T, in the coordinates of
        S_{t-1}; None without it.
      basis: (*batch, m, r), S; or (*batch, r) integers, the coordinates that are S's
        columns. S_{t-1} until a basis rule has set S_t.
      previous: S_{t-1}, as `basis`.
      rotation: (*batch, r, r), S_t^T S_{t-1}; the identity between refreshes.
      refreshed: (*batch,) bool, whether S_t was chosen at this step.
      due: (*batch,) bool, whether a basis is due, where each matrix has its own turn
        (`stagger=True`, `adaptive_refresh`); None where the clock says it for all.
      orthonormal: whether S's columns are orthonormal.
      folded: whether S is that of `fold()`, whose products are sums and repeats.
      chosen: S_t where it was chosen before the rule runs: from another gradient of
        this step (see `project_gradient`), or in one call with other matrices.
      batched: whether the rule chooses S_t in one call with other matrices.
      low: (*batch, r, n), G~ = S^T G.
      low_squares: (*batch, r, 1), the squared norms of its rows before those that are
        rounding became zero; None for coordinates, blocks and at full rank.
      low_step: (*batch, r, n), the optimizer's output G~^O.
      step: (*batch, m, n), the update in full space.
      no_residual: a sentence on why the residual cannot be recovered although the basis
        is orthonormal; "" where it can.
    """

    gradient: jax.Array
    rank: int
    path: str
    columns: str = "output"
    layer: jax.Array | None = None
    transposed: bool = False
    precision: jax.lax.PrecisionLike = None
    given_dtype: DTypeLike | None = None
    momentum: jax.Array | None = None
    tracked: jax.Array | None = None
    basis: jax.Array | None = None
    previous: jax.Array | None = None
    rotation: jax.Array | None = None
    refreshed: jax.Array | None = None
    due: jax.Array | None = None
    orthonormal: bool = True
    folded: bool = False
    chosen: jax.Array | None = None
    batched: bool = False
    low: jax.Array | None = None
    low_squares: jax.Array | None = None
    low_step: jax.Array | None = None
    step: jax.Array | None = None
    no_residual: str = ""

    @property
    def batch(self) -> tuple[int, ...]:
        return self.gradient.shape[:-2]

    @property
    def full_rank(self) -> bool:
        """Whether r = m: the subspace is the full space, and S the identity."""
        return self.rank == self.gradient.shape[-2]

    @property
    def basis_shape(self) -> tuple[int, ...]:
        return (*self.batch, self.gradient.shape[-2], self.rank)

    @property
    def low_shape(self) -> tuple[int, ...]:
        return (*self.batch, self.rank, self.gradient.shape[-1])

    def replace(self, **changes: Any) -> "Frame":
        return dataclasses.replace(self, **changes)

    def need(self, field: str) -> jax.Array:
        """The field's value; ValueError that names the missing stage if it is None."""
        value = getattr(self, field)
        if value is None:
            stage = _SET_BY.get(field, "a basis rule such as dominant_svd()")
            raise ValueError(
                f"{self.path}: the Frame has no `{field}` yet; "
                f"put {stage} before this stage in the chain inside low_rank()"
            )
        return value

    def down(self, x: jax.Array) -> jax.Array:
        """S^T x: (*batch, m, k) to (*batch, r, k)."""
        if self.full_rank:
            return x
        if self.folded:
            sums = block_sums(x, self.rank)
            return sums / jnp.sqrt(block_sizes(x.shape[-2], sums))
        basis = self.need("basis")
        if are_coordinates(basis):
            return jnp.take_along_axis(x, basis[..., None], axis=-2)
        return jnp.einsum(
            "...mr,...mk->...rk", basis.astype(x.dtype), x, precision=self.precision
        )

    def nonzero(self) -> jax.Array:
        """(*batch,) bool, whether G is not zero, or S^T G where G is away."""
        seen = self.gradient
        if isinstance(seen, ProjectedAway):
            seen = self.need("low")
        return jnp.any(seen != 0, axis=(-2, -1))

    def as_stored(self, x: jax.Array) -> jax.Array:
        """x (*batch, m, n) in the weight's orientation; its own inverse.

        Arithmetic in that orientation needs no transposed copy of a large array.
        """
        return jnp.swapaxes(x, -1, -2) if self.transposed else x

    def up(self, y: jax.Array) -> jax.Array:
        """S y: (*batch, r, k) to (*batch, m, k)."""
        if self.full_rank:
            return y
        if self.folded:
            m = self.gradient.shape[-2]
            return repeat_in_blocks(y / jnp.sqrt(block_sizes(m, y)), m)
        basis = self.need("basis")
        if are_coordinates(basis):
            spread = self._spread
            for _ in self.batch:
                spread = jax.vmap(spread)
            return spread(basis, y)
        product = "...mr,...rk->...km" if self.transposed else "...mr,...rk->...mk"
        x = jnp.einsum(product, basis, y, precision=self.precision)
        return self.as_stored(x.astype(y.dtype))

    def _spread(self, rows: jax.Array, y: jax.Array) -> jax.Array:
        # A gather, which can be part of the addition to the weights; a scatter cannot.
        m, (r, _) = self.gradient.shape[-2], y.shape
        place = jnp.full(m, r).at[rows].set(jnp.arange(r), unique_indices=True)
        return jnp.take(y, place, axis=0, mode="fill", fill_value=0)

    def check_residual(self, stage: str, *, orthonormal: bool = True) -> None:
        """ValueError where `stage` cannot recover the residual of the projection.

        Args:
          stage: its name.
          orthonormal: whether it needs an orthonormal basis.
        """
        reason = self.no_residual
        if orthonormal and not self.orthonormal:
            reason = "the basis is not orthonormal, and S S^T G is not G's part in it"
        if reason:
            raise ValueError(
                f"{self.path}: {stage} does not work here: {reason}; "
                "use project_back() alone"
            )

    def no_rotation(self) -> jax.Array:
        """The `rotation` of an unchanged basis, I: (*batch, r, r)."""
        eye = jnp.eye(self.rank, dtype=self.gradient.dtype)
        return jnp.broadcast_to(eye, (*self.batch, self.rank, self.rank))

    def keys(self, key: jax.Array) -> jax.Array:
        """Derives a key for each matrix of the batch, shape (L,), L = prod(batch).

        Derived from the leaf's path and the matrix's index in the batch. They depend on
        neither the other leaves, the host nor the sharding, and are the same whether
        the layers of a stack come together or one at a time.
        """
        return self.keys_below(jax.random.fold_in(key, self.number))

    @property
    def number(self) -> int:
        """A number that stands for the leaf's path in random keys."""
        return zlib.crc32(self.path.encode())

    def keys_below(self, key: jax.Array) -> jax.Array:
        """`keys`, from a key of this leaf's own."""
        if not self.batch and self.layer is None:
            return key[None]
        count = math.prod(self.batch)
        first = 0 if self.layer is None else self.layer * count
        return jax.vmap(lambda i: jax.random.fold_in(key, i))(first + jnp.arange(count))

    def __repr__(self) -> str:
        return f"Frame({self.path!r}, {self.gradient.shape}, rank={self.rank})"

    def _refuse(self, *_: Any) -> NoReturn:
        raise TypeError(self._no_array)

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _refuse
    __truediv__ = __rtruediv__ = __pow__ = __matmul__ = __rmatmul__ = _refuse
    __neg__ = __abs__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse

    def __getattr__(self, name: str) -> NoReturn:
        """Raises for attributes of arrays, which a Frame does not have."""
        if name == "__jax_array__":  # asked for by every function of jax.numpy
            raise TypeError(self._no_array)
        if name.startswith("__"):
            raise AttributeError(name)
        raise NotAnArrayError(self._no_array)

    @property
    def _no_array(self) -> str:
        return (
            f"{self.path}: inside low_rank() a Frame stands for this matrix, and "
            "optax's transformations cannot use it; wrap one that takes the step in "
            "in_subspace(inner) or rotate_moments(inner), and one that changes the "
            "gradient in in_full_space(inner), or chain it outside low_rank()"
        )


class ProjectedAway:
    """Stands for a Frame's gradient where only S^T G exists.

    It has the gradient's shape and dtype; any other use raises a ValueError.
    """

    def __init__(self, path: str, shape: tuple[int, ...], dtype: DTypeLike) -> None:
        self.path, self.shape, self.dtype = path, shape, jnp.dtype(dtype)

    def _refuse(self, *_: Any) -> NoReturn:
        raise ValueError(
            f"{self.path}: this stage needs the full gradient G, but gradients are "
            "summed in the subspace, where only S^T G exists; use a method without a "
            "residual, such as galore(), or sum full gradients"
        )

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _refuse
    __truediv__ = __rtruediv__ = __pow__ = __matmul__ = __rmatmul__ = _refuse
    __neg__ = __abs__ = __lt__ = __le__ = __gt__ = __ge__ = __ne__ = _refuse
    # jax.numpy asks for __jax_array__ first, which is looked up here too.
    __getitem__ = __getattr__ = _refuse


class NotAnArrayError(TypeError, AttributeError):
    """A Frame was used as an array; `getattr` with a default returns the default."""


def are_coordinates(basis: jax.Array) -> bool:
    """Whether a basis is a list of coordinates, (*batch, r) integers."""
    return jnp.issubdtype(basis.dtype, jnp.integer)


def rotation_between(new: jax.Array, old: jax.Array, dtype: DTypeLike) -> jax.Array:
    """S_t^T S_{t-1}, (*batch, r, r)."""
    if are_coordinates(new):
        return (new[..., :, None] == old[..., None, :]).astype(dtype)
    return product(transpose(new), old)


def is_frame(x: object) -> TypeGuard[Frame]:
    return isinstance(x, Frame)


def eye_basis(frame: Frame) -> jax.Array:
    """The first r coordinates, (*batch, m, r)."""
    eye = jnp.eye(*frame.basis_shape[-2:], dtype=frame.gradient.dtype)
    return jnp.broadcast_to(eye, frame.basis_shape)
