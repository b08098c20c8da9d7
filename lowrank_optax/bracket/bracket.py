"""`low_rank`: opens a Frame for every matrix leaf, runs the stages, and closes it."""

import dataclasses
import functools
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lowrank_optax.bracket.extend import Extensible, extensible
from lowrank_optax.bracket.finite import finite_in_subspace, if_accepted
from lowrank_optax.bracket.fits import Dtypes, check_gradient, fitted
from lowrank_optax.bracket.frames import close_frames, open_frames, oriented
from lowrank_optax.bracket.inside import NOTHING_INSIDE, Inside, auto_update
from lowrank_optax.bracket.leaf import (
    collect,
    decide_leaves,
    is_leaf,
    warn_of_full_rank,
)
from lowrank_optax.bracket.turns import with_turns
from lowrank_optax.core.aliases import Tree
from lowrank_optax.core.checks import check_flag, transformation
from lowrank_optax.core.dimensions import DimensionNumbers
from lowrank_optax.core.moments import with_momentum
from lowrank_optax.core.paths import boxed, unboxed
from lowrank_optax.core.rules import Rank, Square, check_rank, check_square
from lowrank_optax.core.stage import Clock, stage
from lowrank_optax.core.trees import frames_of, map_frames


class LowRankState(NamedTuple):
    """State of `low_rank`.

    Attributes:
      count: () int32, optimizer steps accepted.
      skipped: () int32, steps skipped because a gradient was not finite.
      refreshes: () int32, accepted steps at which bases were due; with `stagger` those
        at which an interval began.
      inner_state: the stages' states.
    """

    count: jax.Array
    skipped: jax.Array
    refreshes: jax.Array
    inner_state: Tree


def low_rank(
    inner: optax.GradientTransformation,
    *,
    rank: Rank,
    refresh_every: int,
    stagger: bool = False,
    dimension_numbers: DimensionNumbers = None,
    square: Square = "input",
    precision: jax.lax.PrecisionLike = None,
) -> Extensible:
    """Runs `inner`, a chain of stages, on a `Frame` in place of every matrix leaf.

    The stages say where the subspace is, how the gradient enters it, which step is
    taken there, and how that comes back:

        optax.chain(sara_sample(key=0), project(),
                    rotate_moments(optax.scale_by_adam()), recover_residual(1.01))

    A Frame has m <= n, and stacked layers as batch axes (docs/concepts/layout.md);
    other leaves are plain arrays (docs/concepts/full_rank.md). `update` has two more
    arguments: `refresh`, a bool, whether bases are due (docs/concepts/refresh.md), and
    `accept`, a () bool, whether the gradient is finite, where the caller knows
    (docs/concepts/skipped_steps.md).

    Args:
      inner: the stages; their `update` gets the extra argument `clock` (a `Clock`).
      rank: r: an int, a float fraction of m, or pairs (regular expression, rank or
        None for full rank), the first found in the path.
      refresh_every: T, in accepted steps, from 1 to 2^31 - 1.
      stagger: whether each matrix has its own step in the interval, so that no step has
        more than ceil(K / T) of K matrices to refresh; at the first step all are.
      dimension_numbers: which axes are a matrix's rows and columns.
      square: the side of a square matrix that is projected, "input" or "output", or
        pairs (regular expression, side).
      precision: of the products with S, as `jax.lax.dot_general` takes it.

    Raises:
      ValueError: rank below 1, a leaf that no rule covers, dimension numbers that do
        not fit, a matrix of integers or complex numbers, or stages without a way back;
        a `stagger` that is no bool or, at init, stages that need all bases of a leaf
        to change at once; at update, a `refresh` that is no bool.
      TypeError: for a stock optax transformation between stages.

    Example:
      >>> stages = optax.chain(lro.dominant_svd(), lro.project(),
      ...     lro.in_subspace(optax.scale_by_adam()), lro.project_back(0.25))
      >>> tx = lro.low_rank(stages, rank=2, refresh_every=200)
      >>> params = {"w": jnp.ones((8, 4)), "b": jnp.ones(4)}
      >>> updates, state = tx.update(params, tx.init(params))
      >>> updates["w"].shape, optax.tree.get(state, "mu")["w"].shape
      ((8, 4), (2, 8))
    """
    transformation("low_rank()", inner, "a chain of stages")
    check_rank(rank)
    refresh_every = _check_interval(refresh_every)
    check_square(square)
    check_flag("stagger", stagger)
    decide = functools.partial(
        decide_leaves, dimension_numbers=dimension_numbers, rank=rank, square=square
    )
    staggered = stagger and refresh_every > 1
    return _Bracket(inner, decide, refresh_every, precision, staggered).transformation()


def full_matrices(
    inner: optax.GradientTransformation,
    *,
    rank: Rank | None = None,
    dimension_numbers: DimensionNumbers = None,
    square: Square = "input",
    precision: jax.lax.PrecisionLike = None,
) -> Extensible:
    """`low_rank` without subspaces: `inner` sees each matrix at full rank.

    Methods without a projection get the rest of `low_rank`: a `Frame` of the gradient
    with m <= n, in float32 or wider; batch axes for stacked layers; and a step that is
    not finite is skipped. A stage sets the Frame's `step`.

    Args:
      inner: the stages.
      rank: r, as in `low_rank`, of stages that store moments at that rank; None where
        no stage reads it.
      dimension_numbers, square, precision: as in `low_rank`.

    Returns:
      A transformation with a `LowRankState` that counts no refreshes.

    Raises:
      ValueError: as `low_rank` does for ranks, leaves and dimension numbers.

    Example:
      >>> sign = optax.stateless(lambda frames, _: lro.stages.map_frames(
      ...     lambda f: f.replace(step=jnp.sign(f.gradient)), frames))
      >>> tx = lro.full_rank.full_matrices(sign)
      >>> g = {"w": jnp.ones((8, 4)), "b": jnp.ones(4)}
      >>> tx.update(g, tx.init(g))[0]["w"].shape
      (8, 4)
    """
    transformation("full_matrices()", inner, "a chain of stages")
    check_rank(1.0 if rank is None else rank)
    check_square(square)
    decide = functools.partial(
        decide_leaves,
        dimension_numbers=dimension_numbers,
        rank=1.0 if rank is None else rank,
        square=square,
    )
    ranked = rank is not None
    return _Bracket(inner, decide, precision=precision, ranked=ranked).transformation()


@dataclasses.dataclass(frozen=True)
class _Bracket:
    """The bracket around `inner`; without subspaces where `refresh_every` is None.

    `ranked` says that its stages read the rank all the same.
    """

    inner: optax.GradientTransformation
    decide: Callable[..., Tree]
    refresh_every: int | None = None
    precision: jax.lax.PrecisionLike = None
    staggered: bool = False
    ranked: bool = False
    known: dict[object, dict[object, Dtypes]] = dataclasses.field(
        default_factory=dict[object, dict[object, Dtypes]], init=False
    )

    def transformation(self) -> Extensible:
        return extensible(stage(self.init, auto_update(self.update)), self.extended)

    def extended(self, more: optax.GradientTransformation) -> Extensible:
        inner = optax.chain(self.inner, more)
        return dataclasses.replace(self, inner=inner).transformation()

    def init(self, params: optax.Params) -> LowRankState:
        params = _arrays(params)
        leaves = self.decide(params)
        decided = jax.tree.leaves(leaves, is_leaf=is_leaf)
        if self.refresh_every is not None:
            warn_of_full_rank(decided)
        elif self.ranked:
            collect(decided)
        frames = open_frames(leaves, params, precision=self.precision)
        # Three arrays, since one buffer in several places cannot be donated.
        count, skipped, refreshes = (jnp.zeros([], jnp.int32) for _ in range(3))
        frames = self.in_turn(frames, count)  # for stages that take no turns, to say so
        return LowRankState(count, skipped, refreshes, self.inner.init(frames))

    def in_turn(
        self, frames: optax.Updates, count: jax.Array, inside: Inside = NOTHING_INSIDE
    ) -> optax.Updates:
        """The Frames, with the turns of a staggered refresh."""
        if not self.staggered or self.refresh_every is None:
            return frames
        return with_turns(frames, count, self.refresh_every, inside)

    def fitted(
        self, state: LowRankState, leaves: Tree, like: optax.Params
    ) -> LowRankState:
        """The state; ValueError for that of another optimizer."""
        if not isinstance(state, LowRankState):
            raise ValueError(
                f"update() got a {type(state).__name__} for its state; restore states "
                "into the structure of tx.init(params)"
            )

        def expected() -> Tree:
            frames = open_frames(leaves, like, precision=self.precision)
            return self.inner.init(frames)

        key = tuple(
            (leaf.path, leaf.shape) for leaf in jax.tree.leaves(leaves, is_leaf=is_leaf)
        )
        known = self.known.setdefault(key, {})
        return state._replace(inner_state=fitted(state.inner_state, expected, known))

    def clock_at(self, state: LowRankState, refresh: bool | jax.Array | None) -> Clock:
        """The time of a step; `refresh` decides where the caller passed it."""
        if self.refresh_every is None:
            refresh = False
        elif refresh is None and self.staggered:
            refresh = state.count == 0
        elif refresh is None:
            refresh = self.refresh_every == 1 or state.count % self.refresh_every == 0
        return Clock(state.count, _check_refresh(refresh), state.refreshes)

    def begins(self, clock: Clock) -> bool | jax.Array:
        """() bool: whether all bases are due, or the first of an interval."""
        if self.staggered and self.refresh_every is not None:
            return clock.refresh | (clock.step % self.refresh_every == 0)
        return clock.refresh

    def update(
        self,
        updates: optax.Updates,
        state: LowRankState,
        params: optax.Params | None = None,
        *,
        refresh: bool | jax.Array | None = None,
        accept: bool | jax.Array | None = None,
        inside: Inside = NOTHING_INSIDE,
        **extra_args: Any,
    ) -> tuple[optax.Updates, LowRankState]:
        boxes, (updates, params) = updates, _arrays((updates, params))
        # S^T G has lost the shape that says how a leaf is a matrix.
        like = params if inside.low else updates
        if like is None:
            raise ValueError("projected gradients need the parameters: pass params")
        if inside.low and self.staggered:
            raise ValueError(
                "stagger=True chooses some bases at each step, from its full gradient; "
                "leave it out where gradients are summed in the subspace"
            )
        leaves = self.decide(like, sliced=inside.layer is not None)
        if params is not None and not inside.low:
            check_gradient(updates, params)
        state = self.fitted(state, leaves, like)
        clock = self.clock_at(state, refresh)
        frames = open_frames(
            leaves, updates, params, precision=self.precision, inside=inside
        )
        if clock.refresh is not True:
            frames = self.in_turn(frames, state.count, inside)
        # A basis rule runs before the step, and may follow its moment of the last step.
        out, inner_state = optax.with_extra_args_support(self.inner).update(
            with_momentum(frames, state.inner_state),
            state.inner_state,
            None if params is None else oriented(leaves, params),
            **{**extra_args, "clock": clock},
        )
        if inside.record is not None and self.refresh_every is not None:
            # `out` has the step of a leaf without a Frame; its gradient is recorded.
            inside.record(map_frames(lambda o, _: o, out, frames, plain=lambda _, g: g))
        # One flag for all leaves: a step is taken as a whole or not at all.
        if accept is None:
            accept = finite_in_subspace(updates, frames, out)
        if accept is not True and clock.refresh is False and _waits(out):
            accept &= state.refreshes > 0  # no step in a basis that nobody chose
        steps = close_frames(leaves, like, out)
        refreshes = state.refreshes + self.begins(clock)
        new = LowRankState(state.count + 1, state.skipped, refreshes, inner_state)
        skipped = state._replace(skipped=state.skipped + 1)
        steps = boxed(if_accepted(accept, steps), boxes)
        return steps, if_accepted(accept, new, skipped)


def _arrays(tree: Tree) -> Tree:
    """The tree without boxes, and with arrays for Python numbers."""
    return jax.tree.map(
        lambda x: x if hasattr(x, "dtype") else jnp.asarray(x), unboxed(tree)
    )


def _waits(out: optax.Updates) -> bool:
    """Whether bases wait for a refresh: not those that move at every step, or never."""
    return any(
        f.refreshed is not None and not f.full_rank and not f.folded
        for f in frames_of(out)
    )


def _check_interval(refresh_every: int) -> int:
    integer = isinstance(refresh_every, numbers.Integral)
    if isinstance(refresh_every, bool) or not integer or not 1 <= refresh_every < 2**31:
        raise ValueError(
            f"refresh_every must be an int from 1 to 2**31 - 1, not {refresh_every!r}; "
            "pass static_args=lowrank_optax.static_args(...) to inject_hyperparams"
        )
    return int(refresh_every)


def _check_refresh(refresh: bool | jax.Array) -> bool | jax.Array:
    if isinstance(refresh, (bool, np.bool_)):
        return bool(refresh)
    if getattr(refresh, "dtype", None) != jnp.bool_ or jnp.ndim(refresh):
        raise ValueError(
            f"refresh={refresh!r}: pass True or False, best as a static argument of "
            "the jitted step, or a () bool array"
        )
    return refresh
