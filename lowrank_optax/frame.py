"""The Frame: one matrix's gradient on its way through where, in, step and back."""

import dataclasses
import math
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class Clock(NamedTuple):
    """What `low_rank` tells its stages about time, as the extra argument `clock`.

    Attributes:
      step: () int32, accepted optimizer steps before this one.
      refresh: () bool, whether this step is due for a new basis. One unbatched
        predicate for all matrices, so that `lax.cond` runs one branch only.
      cycle: () int32, how many refreshes were due before this one.
    """

    step: jax.Array
    refresh: jax.Array
    cycle: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Frame:
    """Stands where a matrix leaf stood, in the papers' orientation m <= n.

    Each stage reads the fields of the stages before it and fills in its own:
    a basis rule `basis` and `turn`, `project` `low`, `in_subspace` or
    `rotate_moments` `low_step`, `project_back` or `recover_residual` `step`.
    All arrays share the leading batch axes (the layers of a stacked kernel).

    Attributes:
      gradient: (*batch, m, n), G.
      momentum: (*batch, r, n), the step's first moment M_{t-1}, raw, in the coordinates
        of S_{t-1}; None for a step that keeps none.
      basis: (*batch, m, r), S; or (*batch, r) integers, the coordinates that are S's
        columns. S_{t-1} until a basis rule has set S_t.
      previous: S_{t-1}, as `basis`.
      turn: (*batch, r, r), S_t^T S_{t-1}; the identity between refreshes.
      low: (*batch, r, n), G~ = S^T G.
      low_step: (*batch, r, n), the optimizer's output G~^O.
      step: (*batch, m, n), the update in full space.
      rank: r < m.
      path: the leaf's path in the tree, "layers/mlp/up/kernel".
      columns: which of the weight's axes the n columns are, "input" or "output".
      precision: of the products with S, as `jax.lax.dot_general` takes it.
      orthonormal: whether S's columns are orthonormal.
      fed_back: whether `error_feedback` gives back what the projection lost.
      no_residual: why what the projection lost cannot be given back, though the basis
        be orthonormal, a sentence; "" where it can.
    """

    gradient: jax.Array
    momentum: jax.Array | None = None
    basis: jax.Array | None = None
    previous: jax.Array | None = None
    turn: jax.Array | None = None
    low: jax.Array | None = None
    low_step: jax.Array | None = None
    step: jax.Array | None = None
    rank: int = dataclasses.field(metadata={"static": True})
    path: str = dataclasses.field(metadata={"static": True})
    precision: jax.lax.PrecisionLike = dataclasses.field(metadata={"static": True})
    columns: str = dataclasses.field(default="output", metadata={"static": True})
    orthonormal: bool = dataclasses.field(default=True, metadata={"static": True})
    fed_back: bool = dataclasses.field(default=False, metadata={"static": True})
    no_residual: str = dataclasses.field(default="", metadata={"static": True})

    @property
    def batch(self) -> tuple[int, ...]:
        return self.gradient.shape[:-2]

    @property
    def basis_shape(self) -> tuple[int, ...]:
        return (*self.batch, self.gradient.shape[-2], self.rank)

    @property
    def low_shape(self) -> tuple[int, ...]:
        return (*self.batch, self.rank, self.gradient.shape[-1])

    def replace(self, **changes: Any) -> "Frame":
        return dataclasses.replace(self, **changes)

    def need(self, field: str, stage: str) -> jax.Array:
        """The field's value, or a ValueError that says which stage is missing."""
        value = getattr(self, field)
        if value is None:
            raise ValueError(
                f"{self.path}: the Frame has no `{field}` yet; "
                f"put {stage} before this stage in the chain inside low_rank()"
            )
        return value

    def down(self, x: jax.Array) -> jax.Array:
        """S^T x: (*batch, m, k) to (*batch, r, k)."""
        basis = self.need("basis", "a basis rule such as dominant_svd()")
        if are_coordinates(basis):
            return jnp.take_along_axis(x, basis[..., None], axis=-2)
        return jnp.einsum(
            "...mr,...mk->...rk", basis, x, precision=self.precision
        ).astype(x.dtype)

    def up(self, y: jax.Array) -> jax.Array:
        """S y: (*batch, r, k) to (*batch, m, k)."""
        basis = self.need("basis", "a basis rule such as dominant_svd()")
        if are_coordinates(basis):
            scatter = self._scatter
            for _ in self.batch:
                scatter = jax.vmap(scatter)
            return scatter(basis, y)
        return jnp.einsum(
            "...mr,...rk->...mk", basis, y, precision=self.precision
        ).astype(y.dtype)

    def _scatter(self, rows: jax.Array, y: jax.Array) -> jax.Array:
        x = jnp.zeros((self.gradient.shape[-2], y.shape[-1]), y.dtype)
        return x.at[rows].set(y, unique_indices=True)

    def check_residual(self, stage: str, *, orthonormal: bool = True) -> None:
        """ValueError where `stage` cannot give back what the projection lost.

        `orthonormal` says whether it needs an orthonormal basis.
        """
        reason = self.no_residual
        if orthonormal and not self.orthonormal:
            reason = "the basis is not orthonormal, and S S^T G is not G's part in it"
        if reason:
            raise ValueError(
                f"{self.path}: {stage} does not work here: {reason}; "
                "take project_back() alone"
            )

    def still(self) -> jax.Array:
        """The `turn` of a basis that stands still, I: (*batch, r, r)."""
        eye = jnp.eye(self.rank, dtype=self.gradient.dtype)
        return jnp.broadcast_to(eye, (*self.batch, self.rank, self.rank))

    def keys(self, key: jax.Array) -> jax.Array:
        """One key per matrix of the batch, shape `batch`.

        Derived from the leaf's path, so that they depend neither on the other
        leaves of the tree nor on the host or the sharding.
        """
        key = jax.random.fold_in(key, zlib.crc32(self.path.encode()))
        if not self.batch:
            return key
        return jax.random.split(key, math.prod(self.batch)).reshape(self.batch)


def are_coordinates(basis: jax.Array) -> bool:
    """Whether a basis is a list of coordinates, (*batch, r) integers."""
    return jnp.issubdtype(basis.dtype, jnp.integer)


def is_frame(x: Any) -> bool:
    return isinstance(x, Frame)


def map_frames(
    f: Callable[..., Any],
    tree: Any,
    *rest: Any,
    plain: Callable[..., Any] = lambda leaf, *_: leaf,
) -> Any:
    """`jax.tree.map` with `f` on Frames and `plain` (the identity) on other leaves.

    Example:
      >>> import optax, lowrank_optax as lro
      >>> negate = optax.stateless(lambda frames, params: lro.map_frames(
      ...     lambda frame: frame.replace(low_step=-frame.low_step), frames))
    """
    return jax.tree.map(
        lambda x, *xs: f(x, *xs) if is_frame(x) else plain(x, *xs),
        tree,
        *rest,
        is_leaf=is_frame,
    )


def nothing(*_: Any) -> optax.MaskedNode:
    """What a stage's state has at a leaf of full rank."""
    return optax.MaskedNode()


def frames_of(tree: Any) -> list[Frame]:
    """The Frames of a tree, in its order."""
    return [x for x in jax.tree.leaves(tree, is_leaf=is_frame) if is_frame(x)]


def update_frames(f: Callable[..., Any], tree: Any, state: Any) -> tuple[Any, Any]:
    """`f(frame, its state) -> (frame, state)` on every Frame; two trees come back.

    Other leaves and their states stay.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> def shrink(frame, factor):  # the body of a stage's update, with its state
      ...     return frame.replace(low_step=factor * frame.low_step), factor / 2
      >>> lro.update_frames(shrink, {"bias": jnp.ones(2)}, {"bias": None})[1]
      {'bias': None}
    """
    leaves, structure = jax.tree.flatten(tree, is_leaf=is_frame)
    states = structure.flatten_up_to(state)
    pairs = [
        f(x, s) if is_frame(x) else (x, s) for x, s in zip(leaves, states, strict=True)
    ]
    return (
        structure.unflatten([x for x, _ in pairs]),
        structure.unflatten([s for _, s in pairs]),
    )
