"""Step: any optax transformation, in the subspace or before it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.basis import clock_of
from lowrank_optax.frame import Clock, Frame, is_frame, map_frames, nothing


class PerMatrixState(NamedTuple):
    """State of `in_subspace(inner, per_matrix=True)`.

    Attributes:
      states: `inner`'s state for each leaf by itself; for a matrix leaf its arrays,
        the step count too, have the batch axes in front.
    """

    states: Any


def in_subspace(
    inner: optax.GradientTransformation, *, per_matrix: bool = False
) -> optax.GradientTransformationExtraArgs:
    """Takes `inner`'s step on the low-rank gradients: G~^O = inner(G~).

    `inner` is any optax transformation; it sees a tree in which every Frame is replaced
    by its (*batch, r, n) array, leaves of full rank stay as they are, and `params`, if
    they were given, are S^T W (dead code under jit unless `inner` reads them). Its
    state is that of the (r, n) arrays. At a refresh the moments stay as they are, now
    in other coordinates: this is what GaLore and Fira do. `rotate_moments` turns them,
    `reset_moments` forgets them.

    Args:
      inner: the transformation, `optax.scale_by_adam()` for example.
      per_matrix: run `inner` on each leaf by itself, and under `jax.vmap` over the
        batch axes, so that it sees one matrix of a stacked kernel at a time. For an
        `inner` that works entry by entry (Adam, Lion, momentum) that changes nothing;
        one that takes means or norms over a leaf (Adafactor, clipping by block, trust
        ratios) needs it.

    Raises:
      ValueError: when `project` does not stand before it; when `inner` accumulates
        gradients (`optax.MultiSteps`) after an `error_feedback`.

    Example:
      >>> import lowrank_optax as lro
      >>> stages = optax.chain(lro.dominant_svd(), lro.project(),
      ...     lro.in_subspace(optax.scale_by_adam()), lro.project_back(scale=0.25))
    """
    inner = optax.with_extra_args_support(inner)
    each = _per_matrix(inner) if per_matrix else None

    def init(params: Any) -> Any:
        zeros = map_frames(lambda f: jnp.zeros(f.low_shape, f.gradient.dtype), params)
        return each.init(zeros, params) if each else inner.init(zeros)

    def update(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        frames = updates
        if params is not None:
            params = map_frames(
                lambda f, w: f.down(w), frames, params, plain=lambda _, w: w
            )
        low = map_frames(lambda f: f.need("low", "project()"), frames)
        if each:
            steps, state = each.update(low, state, params, frames, extra_args)
        else:
            steps, state = inner.update(low, state, params, **extra_args)
        reason = ""
        if _accumulates(state):
            reason = (
                "the step accumulates gradients, and is zero at most steps; accumulate "
                "before low_rank()"
            )

        def stepped(f: Frame, step: Any) -> Frame:
            if reason and f.fed_back:
                raise ValueError(f"{f.path}: error_feedback() does not work: {reason}")
            return f.replace(low_step=step, no_residual=f.no_residual or reason)

        frames = map_frames(stepped, frames, steps, plain=lambda _, step: step)
        return frames, state

    return optax.GradientTransformationExtraArgs(init, update)


class ResetState(NamedTuple):
    """State of `reset_moments`.

    Attributes:
      low: `inner`'s state for the matrices, new at every refresh.
      full: `inner`'s state for the leaves of full rank, which is never reset.
    """

    low: Any
    full: Any


def reset_moments(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """`in_subspace`, with `inner` started anew on the matrices at every refresh.

    At steps 0, T, 2T, ... its state becomes inner.init(0): M = V = 0, and Adam's step
    count, with the bias correction, begins again at 0 (Zmushko et al. 2025, "FRUGAL",
    and Grass, Muhamed et al. 2024). Leaves of full rank have a state of their own,
    which goes on.

    Args:
      inner: the transformation, `optax.scale_by_adam()` for example.

    Raises:
      ValueError: when `project` does not stand before it.

    Example:
      >>> import lowrank_optax as lro
      >>> stages = optax.chain(lro.coordinates(key=0), lro.project(),
      ...     lro.reset_moments(optax.scale_by_adam()), lro.sign_residual())
    """
    inner = optax.with_extra_args_support(inner)
    stage = in_subspace(inner)

    def low_of(tree: Any, frames: Any) -> Any:
        return map_frames(lambda _, x: x, frames, tree, plain=nothing)

    def full_of(tree: Any, frames: Any) -> Any:
        return map_frames(
            lambda *_: optax.MaskedNode(), frames, tree, plain=lambda _, x: x
        )

    def init(params: Any) -> Any:
        return ResetState(
            stage.init(low_of(params, params)), inner.init(full_of(params, params))
        )

    def update(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        clock: Clock | None = None,
        **extra_args: Any,
    ) -> tuple[Any, Any]:
        frames, now = updates, clock_of(clock)
        extra_args["clock"] = now

        def part(select: Any) -> tuple[Any, Any]:
            return (
                select(frames, frames),
                None if params is None else select(params, frames),
            )

        low, low_params = part(low_of)
        old = jax.tree.map(
            lambda new, old: jnp.where(now.refresh, new, old),
            stage.init(low),
            state.low,
        )
        low, low_state = stage.update(low, old, low_params, **extra_args)
        full, full_params = part(full_of)
        full, full_state = inner.update(full, state.full, full_params, **extra_args)
        out = map_frames(
            lambda _, x, __: x, frames, low, full, plain=lambda _, __, x: x
        )
        return out, ResetState(low_state, full_state)

    return optax.GradientTransformationExtraArgs(init, update)


def in_full_space(
    inner: optax.GradientTransformation, *, per_matrix: bool = False
) -> optax.GradientTransformationExtraArgs:
    """Replaces the matrices' gradients before a basis is chosen: G <- inner(G).

    For what a method does in full space before it projects (FLora's factored second
    moment). Leaves of full rank pass through `inner` too.

    Args:
      inner: the transformation; it sees (*batch, m, n) arrays, m <= n.
      per_matrix: as in `in_subspace`.

    Raises:
      ValueError: what `inner` raises.

    Example:
      >>> import lowrank_optax as lro
      >>> stages = optax.chain(
      ...     lro.in_full_space(optax.scale_by_factored_rms(), per_matrix=True),
      ...     lro.gaussian(key=0), lro.project(),
      ...     lro.rotate_moments(optax.ema(0.9)), lro.project_back())
    """
    inner = optax.with_extra_args_support(inner)
    each = _per_matrix(inner) if per_matrix else None

    def init(params: Any) -> Any:
        zeros = map_frames(lambda f: jnp.zeros_like(f.gradient), params)
        return each.init(zeros, params) if each else inner.init(zeros)

    def update(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        frames = updates
        full = map_frames(lambda f: f.gradient, frames)
        if each:
            full, state = each.update(full, state, params, frames, extra_args)
        else:
            full, state = inner.update(full, state, params, **extra_args)
        frames = map_frames(
            lambda f, g: f.replace(gradient=g), frames, full, plain=lambda _, g: g
        )
        return frames, state

    return optax.GradientTransformationExtraArgs(init, update)


class _PerMatrix(NamedTuple):
    init: Callable[..., Any]
    update: Callable[..., Any]


def _per_matrix(inner: optax.GradientTransformationExtraArgs) -> _PerMatrix:
    """`inner` on each leaf by itself, under vmap over its batch axes."""

    def init(zeros: Any, frames: Any) -> PerMatrixState:
        return PerMatrixState(
            map_frames(
                lambda f, x: _vmapped(inner.init, f.batch)(x),
                frames,
                zeros,
                plain=lambda _, x: inner.init(x),
            )
        )

    def update(
        updates: Any, state: Any, params: Any, frames: Any, extra_args: Any
    ) -> tuple[Any, PerMatrixState]:
        leaves, structure = jax.tree.flatten(frames, is_leaf=is_frame)

        def one(state: Any, update: Any, param: Any = None) -> tuple[Any, Any]:
            return inner.update(update, state, param, **extra_args)

        trees = [state.states, updates, *([] if params is None else [params])]
        pairs = [
            _vmapped(one, leaf.batch if is_frame(leaf) else ())(*args)
            for leaf, *args in zip(
                leaves, *map(structure.flatten_up_to, trees), strict=True
            )
        ]
        return (
            structure.unflatten([u for u, _ in pairs]),
            PerMatrixState(structure.unflatten([s for _, s in pairs])),
        )

    return _PerMatrix(init, update)


def _accumulates(state: Any) -> bool:
    def accumulates(x: Any) -> bool:
        return isinstance(x, optax.MultiStepsState)

    return any(map(accumulates, jax.tree.leaves(state, is_leaf=accumulates)))


def _vmapped(f: Callable[..., Any], batch: tuple[int, ...]) -> Callable[..., Any]:
    for _ in batch:
        f = jax.vmap(f)
    return f
