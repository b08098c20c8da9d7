"""What a stage is: an optax transformation over trees of Frames, told the time."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax


class Clock(NamedTuple):
    """What `low_rank` tells its stages about time, as the extra argument `clock`.

    Attributes:
      step: () int32, accepted optimizer steps before this one.
      refresh: () bool, whether this step is due for a new basis; a Python bool where
        the caller said so, and then the program holds one of the two kinds of step
        (`branch`, `both`). One unbatched predicate for all matrices, so that `lax.cond`
        runs one branch only.
      cycle: () int32, how many refreshes were done before this one.
    """

    step: jax.Array
    refresh: bool | jax.Array
    cycle: jax.Array


def branch(
    predicate: bool | jax.Array,
    yes: Callable[..., Any],
    no: Callable[..., Any],
    *operands: Any,
) -> Any:
    """`lax.cond`, and no conditional where the predicate is a Python bool."""
    if isinstance(predicate, bool):
        return yes(*operands) if predicate else no(*operands)
    return jax.lax.cond(predicate, yes, no, *operands)


def both(static: bool | jax.Array, other: jax.Array) -> bool | jax.Array:
    """`static` and `other`, a Python bool as long as that can be."""
    if isinstance(static, bool):
        return other if static else False
    return static & other


def stage(
    init: Callable[..., Any], update: Callable[..., tuple[Any, Any]]
) -> optax.GradientTransformationExtraArgs:
    """An optax transformation of two functions that name the state they work on.

    optax's protocols take any state, and a checker refuses functions of one.
    """
    return optax.GradientTransformationExtraArgs(init, update)


def simple_stage(
    init: Callable[..., Any], update: Callable[..., tuple[Any, Any]]
) -> optax.GradientTransformationExtraArgs:
    """A stage from `update(frames, state)`."""
    return stage(init, lambda frames, state, params=None, **_: update(frames, state))


def timed_stage(
    init: Callable[..., Any], update: Callable[..., tuple[Any, Any]]
) -> optax.GradientTransformationExtraArgs:
    """A stage from `update(frames, state, clock)`; ValueError outside `low_rank`."""

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


def clock_of(clock: Clock | None) -> Clock:
    if clock is None:
        raise ValueError("this stage works inside low_rank(), which tells it the time")
    return clock
