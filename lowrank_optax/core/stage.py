"""Stages: optax transformations over trees of Frames, with the time as an argument."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from lowrank_optax.core.aliases import Tree
from lowrank_optax.core.checks import transformation
from lowrank_optax.core.frame import Frame
from lowrank_optax.core.paths import path_of
from lowrank_optax.core.trees import (
    frames_of,
    map_frames,
    map_subspaces,
    nothing,
    update_frames,
)


class Clock(NamedTuple):
    """The time, which `low_rank` passes to its stages as the extra argument `clock`.

    Attributes:
      step: () int32, accepted optimizer steps before this one.
      refresh: () bool, whether all bases are due at this step; `Frame.due` says it of
        each matrix where refreshes are staggered. A Python bool where the caller passed
        one; the program then holds one kind of step only. One predicate without batch
        axes for all matrices, so that `lax.cond` runs one branch.
      cycle: () int32, refreshes before this one, of every matrix that is due.
    """

    step: jax.Array
    refresh: bool | jax.Array
    cycle: jax.Array


def branch(
    predicate: bool | jax.Array,
    yes: Callable[..., Tree],
    no: Callable[..., Tree],
    *operands: Tree,
) -> Tree:
    """`lax.cond`, or the branch itself where the predicate is a Python bool."""
    if isinstance(predicate, bool):
        return yes(*operands) if predicate else no(*operands)
    return jax.lax.cond(predicate, yes, no, *operands)


def both(static: bool | jax.Array, other: jax.Array) -> bool | jax.Array:
    """`static and other`; a Python bool where `static` is False."""
    if isinstance(static, bool):
        return other if static else False
    return static & other


def stage(
    init: Callable[..., Tree], update: Callable[..., tuple[Tree, Tree]]
) -> optax.GradientTransformationExtraArgs:
    """Builds a `GradientTransformationExtraArgs`.

    Use it instead of the class when `init` and `update` annotate a concrete state type,
    which type checkers reject against optax's protocols.
    """
    return optax.GradientTransformationExtraArgs(init, update)


def simple_stage(
    init: Callable[..., Tree], update: Callable[..., tuple[Tree, Tree]]
) -> optax.GradientTransformationExtraArgs:
    """Builds a stage from `update(frames, state)`."""
    return stage(init, lambda frames, state, params=None, **_: update(frames, state))


def timed_stage(
    init: Callable[..., Tree], update: Callable[..., tuple[Tree, Tree]]
) -> optax.GradientTransformationExtraArgs:
    """Builds a stage from `update(frames, state, clock)`; needs to be in `low_rank`."""

    def with_clock(
        frames: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        *,
        clock: Clock | None = None,
        **_: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        del params
        return update(frames, state, clock_of(clock))

    return stage(init, with_clock)


def frame_stage(
    state_type: type[Tree],
    one: Callable[..., tuple[Tree, ...]],
    *first: Callable[[Frame], jax.Array],
) -> optax.GradientTransformationExtraArgs:
    """Builds a stage from `one(frame, its arrays...) -> (frame, arrays...)`.

    Args:
      state_type: the NamedTuple class of the state, with a tree for each array.
      one: the update of one Frame; other leaves stay.
      *first: each makes the first array of a Frame.
    """

    def init(params: optax.Params) -> optax.OptState:
        return state_type(*(map_frames(f, params, plain=nothing) for f in first))

    def update(
        frames: optax.Updates,
        state: Tree,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        del params
        check_inside(_maker(one), frames, extra_args)
        frames, *trees = update_frames(one, frames, *state)
        return frames, state_type(*trees)

    return stage(init, update)


def timed_frame_stage(
    state_type: type[Tree],
    one: Callable[..., tuple[Tree, ...]],
    *first: Callable[[Frame], jax.Array],
) -> optax.GradientTransformationExtraArgs:
    """`frame_stage` of `one(frame, its arrays..., clock)`, inside `low_rank` alone."""

    def init(params: optax.Params) -> Tree:
        return state_type(*(map_frames(f, params, plain=nothing) for f in first))

    def update(frames: optax.Updates, state: Tree, now: Clock) -> tuple[Tree, Tree]:
        frames, *trees = update_frames(lambda *row: one(*row, now), frames, *state)
        return frames, state_type(*trees)

    return timed_stage(init, update)


def stateless_stage(
    one: Callable[[Frame], Frame],
) -> optax.GradientTransformationExtraArgs:
    """Builds a stage without a state from `one(frame) -> frame`; other leaves stay."""

    def update(
        frames: optax.Updates,
        state: optax.EmptyState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        del params
        check_inside(_maker(one), frames, extra_args)
        return map_frames(one, frames), state

    return stage(lambda _: optax.EmptyState(), update)


def _maker(one: Callable[..., Tree]) -> str:
    """The public function that `one` is the inside of."""
    name = getattr(one, "__qualname__", "this stage")
    return f"{name.partition('.')[0]}()"


def check_inside(name: str, frames: optax.Updates, extra_args: Tree) -> None:
    """ValueError where a stage runs outside of `low_rank`, and finds no Frames.

    Inside, a tree may have no Frame either, where all leaves are of full rank.
    """
    leaves = jax.tree_util.tree_leaves_with_path(frames)
    if extra_args.get("clock") is None and leaves and not frames_of(frames):
        raise ValueError(
            f"{path_of(leaves[0][0])}: {name} found an array in place of a Frame; it "
            "works inside low_rank() alone: put it into the chain that low_rank() gets"
        )


_ROLES = {
    "basis": "basis rule",
    "low_step": "step, such as in_subspace() or rotate_moments(),",
    "step": "way back, such as project_back() or recover_residual(),",
}


def check_wrapped(frame: Frame, name: str) -> None:
    """ValueError unless the stages that `name` wraps end with `project`."""
    if frame.low is None:
        raise ValueError(
            f"{frame.path}: {name} wraps a basis rule and project(); put project() "
            f"before its bracket closes: {name[:-1]}optax.chain(dominant_svd(), "
            "project()))"
        )


def check_first(frame: Frame, field: str) -> None:
    """ValueError where another stage has set `field` already."""
    if getattr(frame, field) is not None:
        raise ValueError(
            f"{frame.path}: a second {_ROLES[field]} in one low_rank() would replace "
            "what the first has made; remove one of the two"
        )


def check_only_rule(frames: optax.Updates) -> None:
    """ValueError where another basis rule stands before this one."""
    for frame in frames_of(frames):
        check_first(frame, "basis")


def around(
    stages: optax.GradientTransformation,
    state_type: type[Tree],
    first: Callable[[Frame], jax.Array],
    before: Callable[[Frame, jax.Array], Frame],
    after: Callable[[Frame, jax.Array], tuple[Frame, jax.Array]],
) -> optax.GradientTransformationExtraArgs:
    """Builds a stage that runs `stages` between two functions of a Frame and its array.

    Args:
      stages: the stages.
      state_type: the NamedTuple class of the state: the arrays, the state of `stages`.
      first: makes the first array of a Frame below full rank.
      before: what `stages` get, of a Frame below full rank.
      after: the Frame and its new array, of every Frame.
    """
    stages = transformation(
        _maker(before), stages, "optax.chain(dominant_svd(), project())"
    )

    def init(params: optax.Params) -> optax.OptState:
        arrays = map_subspaces(first, params, other=nothing)
        return state_type(arrays, stages.init(params))

    def update(
        updates: optax.Updates,
        state: Tree,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        check_inside(_maker(before), updates, extra_args)
        arrays, inner_state = state
        frames = map_subspaces(before, updates, arrays)
        frames, inner_state = stages.update(frames, inner_state, params, **extra_args)
        frames, arrays = update_frames(after, frames, arrays)
        return frames, state_type(arrays, inner_state)

    return stage(init, update)


def check_no_turns(frames: optax.Updates, name: str, instead: str) -> None:
    """ValueError where matrices are refreshed in turn, and stage `name` takes none."""
    for frame in frames_of(frames):
        if frame.due is not None:
            raise ValueError(
                f"{frame.path}: {name} does not work with stagger=True, which "
                f"refreshes the matrices one after the other; {instead}"
            )


def clock_of(clock: Clock | None) -> Clock:
    """`clock`; ValueError for None, which a stage gets outside `low_rank`."""
    if clock is None:
        raise ValueError("this stage needs a clock: put it inside low_rank()")
    return clock
