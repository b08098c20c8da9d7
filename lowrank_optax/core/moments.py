"""Moments: the fields of an optimizer's state that rotate with the basis."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.core.aliases import Tree
from lowrank_optax.core.frame import is_frame


class SubspaceState(NamedTuple):
    """State of `in_subspace`, `rotate_moments` and `reset_moments`.

    Basis rules that follow the momentum look for it in here, since other stages may
    have optimizers of their own, with moments of the same shape.

    Attributes:
      inner_state: the transformation's, on trees of (*batch, r, n) arrays.
    """

    inner_state: Tree


class Moments(NamedTuple):
    """The fields of a state that are moments; see `register_moments`."""

    first: str
    second: str | None
    count: str


_MOMENTS: dict[type, Moments] = {}
# Wrappers' states that store another state in another form: (unpack, pack).
_STORED: dict[type, tuple[Callable[[Tree], Tree], Callable[[Tree, Tree], Tree]]] = {}


def register_moments(
    state_type: type, *, first: str, second: str | None = None, count: str = "count"
) -> None:
    """Registers the fields of an optimizer's state that are moments.

    `rotate_moments` rotates them with the basis, and `power_iterate` and
    `correlation_aware` follow the first moment. Those of Adam, `optax.trace`,
    `optax.ema`, Lion and `scale_by_adam_mini` are registered.

    Args:
      state_type: the NamedTuple class of the state.
      first: the field of M, a linear function of past gradients.
      second: the field of V, a running average of squared gradients from zero; None
        for a state without one.
      count: the field of the number of steps, for the bias correction; read only with
        `second`.

    Raises:
      ValueError: what is no NamedTuple class, or one without these fields.

    Example:
      >>> import typing
      >>> class HeavyBallState(typing.NamedTuple):
      ...     velocity: typing.Any
      >>> lro.steps.register_moments(HeavyBallState, first="velocity")
    """
    if not isinstance(state_type, type) or not hasattr(state_type, "_fields"):
        raise ValueError(
            f"register_moments() needs the NamedTuple class of an optimizer's state, "
            f"such as optax.ScaleByAdamState, not {state_type!r}"
        )
    wanted = {first} if second is None else {first, second, count}
    fields = state_type._fields
    if missing := sorted(wanted - {*fields}):
        raise ValueError(
            f"{state_type.__name__} has no fields {missing}; pass names from {fields}"
        )
    _MOMENTS[state_type] = Moments(first, second, count)


register_moments(optax.ScaleByAdamState, first="mu", second="nu")
register_moments(optax.TraceState, first="trace")
register_moments(optax.EmaState, first="ema")
register_moments(optax.ScaleByLionState, first="mu")


def register_storage(
    state_type: type,
    unpack: Callable[[Tree], optax.OptState],
    pack: Callable[[Tree, optax.OptState], Tree],
) -> None:
    """Registers a wrapper's state that stores another: unpack(x), pack(x, new)."""
    _STORED[state_type] = unpack, pack


def map_moments(
    f: Callable[..., Tree], state: Tree, *others: Tree, owner: str = ""
) -> Tree:
    """f(its fields, state, ...) on each registered state of a nest of them."""
    kind = type(state)
    if kind in _STORED:
        unpack, pack = _STORED[kind]
        return pack(state, map_moments(f, *map(unpack, (state, *others))))
    if kind in _MOMENTS:
        return f(_MOMENTS[kind], state, *others)
    if isinstance(state, dict):
        owner = owner or kind.__name__
        return kind(
            (k, map_moments(f, v, *(o[k] for o in others), owner=owner))
            for k, v in state.items()
        )
    if isinstance(state, (tuple, list)):
        named = hasattr(state, "_fields")
        owner = kind.__name__ if named else owner
        rows = zip(state, *others, strict=True)
        parts = [map_moments(f, *row, owner=owner) for row in rows]
        return kind(*parts) if named else kind(parts)
    arrays = [x for x in jax.tree.leaves(state) if jnp.ndim(x)]
    if arrays:
        raise ValueError(
            f"rotate_moments() cannot rotate {owner or kind.__name__}, which has an "
            f"array of shape {arrays[0].shape}; name its moments with "
            "lowrank_optax.steps.register_moments(), or use in_subspace(inner), which "
            "does not rotate moments"
        )
    return state


def first_moments(state: Tree) -> Iterator[Tree]:
    """The trees of first moments in the stages' states."""
    kind = type(state)
    if kind in _MOMENTS:
        yield getattr(state, _MOMENTS[kind].first)
    elif kind in _STORED:
        yield from first_moments(_STORED[kind][0](state))
    elif isinstance(state, (dict, tuple, list)):
        for part in state.values() if isinstance(state, dict) else state:
            yield from first_moments(part)


def with_momentum(frames: optax.Updates, state: optax.OptState) -> optax.Updates:
    """The Frames with the first moment that the step inside `state` holds for them."""

    def is_step(x: object) -> bool:
        return isinstance(x, SubspaceState)

    def is_masked(x: object) -> bool:
        return isinstance(x, optax.MaskedNode)

    leaves, structure = jax.tree.flatten(frames, is_leaf=is_masked)
    for step in filter(is_step, jax.tree.leaves(state, is_leaf=is_step)):
        for found in first_moments(step.inner_state):
            moments, like = jax.tree.flatten(found, is_leaf=is_masked)
            if like != structure:  # optax.flatten has one moment for all leaves
                continue
            for i, (frame, m) in enumerate(zip(leaves, moments, strict=True)):
                if is_frame(frame) and frame.momentum is None and not is_masked(m):
                    leaves[i] = frame.replace(momentum=m)
    return structure.unflatten(leaves)
