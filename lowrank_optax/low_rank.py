"""The bracket: opens a Frame for every matrix leaf, and closes it again."""

import functools
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.frame import Clock, Frame, are_coordinates, is_frame
from lowrank_optax.layout import (
    DimensionNumbers,
    Layout,
    Rank,
    check_rank,
    layout_of,
    path_of,
    rank_of,
    specs_of,
)
from lowrank_optax.moments import with_momentum


class LowRankState(NamedTuple):
    """State of `low_rank`.

    Attributes:
      count: () int32, optimizer steps accepted.
      skipped: () int32, steps refused because a gradient was not finite.
      inner_state: the stages' states.
    """

    count: jax.Array
    skipped: jax.Array
    inner_state: Any


class _Leaf(NamedTuple):
    """What the bracket decided for one leaf; `layout` None means full rank."""

    path: str
    layout: Layout | None
    rank: int


def low_rank(
    inner: optax.GradientTransformation,
    *,
    rank: Rank,
    refresh_every: int,
    dimension_numbers: DimensionNumbers = None,
    precision: jax.lax.PrecisionLike = None,
) -> optax.GradientTransformationExtraArgs:
    """Runs `inner`, a chain of stages, on a `Frame` in place of every matrix leaf.

    A stage chain says where the subspace is, how the gradient goes in, which step is
    taken there, and how it comes back:

        optax.chain(sara_sample(key=0), project(),
                    rotate_moments(optax.scale_by_adam()), recover_residual(1.01))

    A stock optax transformation stands inside `in_subspace` or `rotate_moments`, or
    outside the bracket: between stages it would take a Frame's basis for an update.

    The bracket alone knows how a leaf is stored. It turns each matrix so that
    m <= n ("without loss of generality", both papers), keeps further axes as batch
    axes (stacked layers), and computes in float32 (float64 for float64 leaves),
    whatever the leaf's dtype; updates come back in the gradient's shape and dtype.
    Scalars, vectors, and leaves that a rule keeps at full rank pass as plain arrays:
    the step inside `in_subspace` or `rotate_moments` is taken on them directly. So
    does a matrix whose rank would be min(m, n) or more.

    A basis is due at steps 0, T, 2T, ... (T = `refresh_every`), from that step's
    gradient. Every step whose gradient has a NaN or an Inf is skipped: the updates
    are zero, no state changes, `skipped` counts it, and a refresh that was due
    happens at the next finite step. Transformations that you chain after the bracket
    (weight decay, schedules) see such a step as one with a zero gradient; in the named
    optimizers they are skipped with it.

    Args:
      inner: the stages; `init` and `update` get trees of Frames and plain leaves, and
        `update` the extra argument `clock` (a `Clock`). Its `params`, if given, are
        the weights, turned like the gradients.
      rank: r: an int, a float fraction of the smaller side, or pairs (regular
        expression, rank or None for full rank), the first found in the path.
      refresh_every: T, in accepted steps, at least 1.
      dimension_numbers: which axes are a matrix's rows and columns. None: leaves of
        two axes. Else `optax.contrib.MuonDimensionNumbers` for all leaves, pairs
        (regular expression, `MuonDimensionNumbers` | "matrix" | None), a tree of
        them, or a function from the tree of parameters to one.
      precision: of the products with S, as `jax.lax.dot_general` takes it; None is
        JAX's default for the backend. Factorisations always run at the highest.

    Returns:
      A transformation from full-shape gradients to full-shape updates, with a
      `LowRankState`.

    Raises:
      ValueError: rank below 1, a leaf that no rule covers, a leaf of three or more
        axes without dimension numbers, dimension numbers that do not fit, or a
        stage chain with no way back.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro, optax
      >>> stages = optax.chain(lro.dominant_svd(), lro.project(),
      ...     lro.in_subspace(optax.scale_by_adam()), lro.project_back(0.25))
      >>> tx = lro.low_rank(stages, rank=2, refresh_every=200)
      >>> params = {"w": jnp.ones((8, 4)), "b": jnp.ones(4)}
      >>> updates, state = tx.update(params, tx.init(params))
      >>> updates["w"].shape, optax.tree.get(state, "mu")["w"].shape
      ((8, 4), (2, 8))
    """
    check_rank(rank)
    whole = isinstance(refresh_every, int) and not isinstance(refresh_every, bool)
    if not whole or refresh_every < 1:
        raise ValueError(
            f"refresh_every must be a Python int of at least 1, not {refresh_every!r}; "
            "pass static_args=lowrank_optax.static_args(...) to inject_hyperparams"
        )
    inner = optax.with_extra_args_support(inner)

    def decide(tree: Any) -> Any:
        specs = specs_of(dimension_numbers, tree)

        def leaf(keys: Any, x: Any) -> _Leaf:
            path = path_of(keys)
            if (spec := specs[path]) is not None:
                layout = layout_of(path, x.shape, spec)
                if (r := rank_of(rank, path, layout)) is not None:
                    return _Leaf(path, layout, r)
            return _Leaf(path, None, 0)

        return jax.tree_util.tree_map_with_path(leaf, tree)

    def open_frame(leaf: _Leaf, x: jax.Array) -> Any:
        if leaf.layout is None:
            return _at_least_f32(x)
        return Frame(
            gradient=_at_least_f32(leaf.layout.to_matrix(x)),
            rank=leaf.rank,
            path=leaf.path,
            columns=leaf.layout.columns,
            precision=precision,
        )

    def turn(leaf: _Leaf, x: jax.Array) -> jax.Array:
        return _at_least_f32(x if leaf.layout is None else leaf.layout.to_matrix(x))

    def close(leaf: _Leaf, x: jax.Array, out: Any) -> jax.Array:
        if leaf.layout is not None:
            step = out.need("step", "project_back() or recover_residual() at the end,")
            out = leaf.layout.from_matrix(step)
        return out.astype(x.dtype)

    def init(params: Any) -> Any:
        frames = _map_leaves(open_frame, decide(params), params)
        # Two arrays: one in two places could not be donated.
        count, skipped = jnp.zeros([], jnp.int32), jnp.zeros([], jnp.int32)
        return LowRankState(count, skipped, inner.init(frames))

    def update(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        leaves = decide(updates)
        clock = Clock(
            step=state.count,
            refresh=state.count % refresh_every == 0,
            cycle=state.count // refresh_every,
        )
        frames = _map_leaves(open_frame, leaves, updates)
        out, inner_state = inner.update(
            with_momentum(frames, state.inner_state),
            state.inner_state,
            None if params is None else _map_leaves(turn, leaves, params),
            **{**extra_args, "clock": clock},
        )
        finite = _all_finite(updates, frames, out)
        steps = _map_leaves(close, leaves, updates, out)
        return (
            jax.tree.map(lambda u: jnp.where(finite, u, jnp.zeros_like(u)), steps),
            LowRankState(
                count=state.count + finite,
                skipped=state.skipped + ~finite,
                inner_state=jax.tree.map(
                    functools.partial(jnp.where, finite), inner_state, state.inner_state
                ),
            ),
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _map_leaves(f: Any, leaves: Any, *trees: Any) -> Any:
    return jax.tree.map(f, leaves, *trees, is_leaf=lambda x: isinstance(x, _Leaf))


def _at_least_f32(x: jax.Array) -> jax.Array:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _all_finite(updates: Any, frames: Any, out: Any) -> jax.Array:
    """Whether every gradient is finite, read off G~ where there is one.

    Each entry of G enters every entry of its column of G~ = S^T G, and a NaN or an Inf
    survives any product, even with zero. So the r rows of G~ tell as much as the m rows
    of G, for a fraction of the reads. Not where S is coordinates; and where a stage put
    another gradient in G's place, both are looked at.
    """

    def finite(x: jax.Array, f: Any, o: Any) -> jax.Array:
        seen = [x]
        if is_frame(o) and o.gradient is not f.gradient:
            seen = [x, o.gradient]
        elif is_frame(o) and o.low is not None:
            basis = o.need("basis", "a basis rule such as dominant_svd()")
            seen = [x if are_coordinates(basis) else o.low]
        flags = [jnp.all(jnp.isfinite(x)) for x in seen]
        return functools.reduce(operator.and_, flags)

    flags = jax.tree.leaves(jax.tree.map(finite, updates, frames, out))
    return functools.reduce(operator.and_, flags, jnp.array(True))
