"""Step: any optax transformation, in the subspace or before it."""

from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.core.aliases import Tree
from lowrank_optax.core.checks import transformation
from lowrank_optax.core.frame import Frame, is_frame
from lowrank_optax.core.linalg import select
from lowrank_optax.core.moments import SubspaceState
from lowrank_optax.core.sharding import low_zeros
from lowrank_optax.core.stage import check_first, stage
from lowrank_optax.core.trees import each_apart, in_turn, map_frames


def per_matrix(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Runs `inner` on each matrix by itself: the last two axes of a leaf.

    `inner` gets one leaf at a time, under `jax.vmap` over the axes before its last two.
    A transformation that takes means or norms over a leaf (Adafactor, clipping by
    block, trust ratios) would otherwise mix the layers of a stacked kernel. The state
    is `inner`'s with a tree like the parameters in place of every array, counts
    included; a leaf of three or more axes has the batch axes in front.

    Args:
      inner: any transformation whose state has the same structure for every leaf.

    Raises:
      ValueError: at init, when the state's structure depends on the leaf.

    Example:
      >>> tx = lro.steps.per_matrix(
      ...     optax.scale_by_factored_rms(min_dim_size_to_factor=1))
      >>> tx.init({"w": jnp.ones((3, 4, 8))}).v_row["w"].shape
      (3, 4)
    """
    inner = transformation("per_matrix()", inner)

    def init(params: optax.Params) -> optax.OptState:
        leaves, structure = jax.tree.flatten(params)
        one = _state_of_one(inner)
        states = [_vmapped(inner.init, x)(x) for x in leaves]
        if any(jax.tree.structure(state) != one for state in states):
            raise ValueError(
                "per_matrix() needs a state of the same structure for every leaf; use "
                "inner without it, or optax.partition"
            )
        return in_turn(structure, one, states)

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        leaves, structure = jax.tree.flatten(updates)
        one = _state_of_one(inner)

        def step(state: Tree, update: Tree, param: Tree = None) -> tuple[Tree, Tree]:
            return inner.update(update, state, param, **extra_args)

        columns = [each_apart(structure, one, state), leaves]
        if params is not None:
            columns.append(structure.flatten_up_to(params))
        pairs = [_vmapped(step, row[1])(*row) for row in zip(*columns, strict=True)]
        return (
            structure.unflatten([u for u, _ in pairs]),
            in_turn(structure, one, [s for _, s in pairs]),
        )

    return stage(init, update)


def in_subspace(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Takes `inner`'s step on the low-rank gradients: G~^O = inner(G~).

    `inner` is any optax transformation. It sees a tree with the (*batch, r, n) array of
    each Frame; leaves of full rank stay as they are, and `params` are S^T W. At a
    refresh the moments stay as they are, now in other coordinates, as in GaLore and
    Fira. `rotate_moments` rotates them, `reset_moments` sets them to zero. Wrap an
    `inner` that takes means or norms over a leaf in `per_matrix`.

    Args:
      inner: the transformation, `optax.scale_by_adam()` for example.

    Raises:
      ValueError: without `project` before it; when `inner` accumulates gradients
        (`optax.MultiSteps`) after an `error_feedback`.

    Example:
      >>> stages = optax.chain(lro.dominant_svd(), lro.project(),
      ...     lro.in_subspace(optax.scale_by_adam()), lro.project_back(scale=0.25))
    """
    inner = transformation("in_subspace()", inner)

    def init(params: optax.Params) -> SubspaceState:
        return SubspaceState(inner.init(map_frames(low_zeros, params)))

    def update(
        updates: optax.Updates,
        state: SubspaceState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, SubspaceState]:
        frames = updates
        if params is not None:  # XLA drops the products unless `inner` reads them
            params = map_frames(
                lambda f, w: f.down(w), frames, params, plain=lambda _, w: w
            )
        low = map_frames(lambda f: f.need("low"), frames)
        steps, new = inner.update(low, state.inner_state, params, **extra_args)
        reason = ""
        if _accumulates(new):
            reason = (
                "the step accumulates gradients, and is zero at most steps; accumulate "
                "before low_rank()"
            )

        def stepped(f: Frame, step: jax.Array) -> Frame:
            check_first(f, "low_step")
            # Before a step only error_feedback() sets `no_residual`.
            if reason and f.no_residual:
                raise ValueError(f"{f.path}: error_feedback() does not work: {reason}")
            return f.replace(low_step=step, no_residual=f.no_residual or reason)

        frames = map_frames(stepped, frames, steps, plain=lambda _, step: step)
        return frames, SubspaceState(new)

    return stage(init, update)


def reset_moments(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """`in_subspace`, with `inner` restarted on a matrix whenever its basis changes.

    Where a basis rule chooses S_t the state becomes inner.init(0): M = V = 0, and
    Adam's step count, with the bias correction, starts again at 0 (Zmushko et al. 2025,
    "FRUGAL", and Grass, Muhamed et al. 2024). A skipped refresh (`lazy_refresh`,
    `frozen`) resets nothing, and leaves of full rank continue.

    Args:
      inner: the transformation, `optax.scale_by_adam()` for example; it runs
        `per_matrix`, so that each matrix has its own step count.

    Raises:
      ValueError: without `project` and a basis rule that sets `refreshed` before it.

    Example:
      >>> stages = optax.chain(lro.bases.coordinates(key=0), lro.project(),
      ...     lro.reset_moments(optax.scale_by_adam()), lro.sign_residual())
    """
    each = per_matrix(transformation("reset_moments()", inner))
    inside = in_subspace(each)

    def update(
        updates: optax.Updates,
        state: SubspaceState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        # Leaf by leaf, since a refresh may be skipped on one and not on another.
        leaves, structure = jax.tree.flatten(updates)
        one = _state_of_one(inner)
        states = each_apart(structure, one, state.inner_state)
        new = cast(SubspaceState, inside.init(updates)).inner_state
        news = each_apart(structure, one, new)
        for i, frame in enumerate(leaves):
            if is_frame(frame) and not frame.full_rank:
                if frame.refreshed is None and frame.basis is not None:
                    raise ValueError(
                        f"{frame.path}: this basis rule changes its basis at every "
                        "step, and reset_moments() would reset as often; use "
                        "in_subspace()"
                    )
                refreshed = frame.need("refreshed")
                states[i] = jax.tree.map(
                    lambda new, old, refreshed=refreshed: select(refreshed, new, old),
                    news[i],
                    states[i],
                )
        state = SubspaceState(in_turn(structure, one, states))
        return inside.update(updates, state, params, **extra_args)

    return stage(inside.init, update)


def in_full_space(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Replaces the matrices' gradients before a basis is chosen: G <- inner(G).

    For methods with a step in full space before the projection (FLora's factored second
    moment). Leaves of full rank pass through `inner` too.

    Args:
      inner: the transformation; it sees (*batch, m, n) arrays, m <= n.

    Raises:
      ValueError: what `inner` raises.

    Example:
      >>> stages = optax.chain(
      ...     lro.steps.in_full_space(
      ...         lro.steps.per_matrix(optax.scale_by_factored_rms())),
      ...     lro.bases.gaussian(key=0), lro.project(),
      ...     lro.rotate_moments(optax.ema(0.9)), lro.project_back())
    """
    inner = transformation("in_full_space()", inner)

    def init(params: optax.Params) -> optax.OptState:
        return inner.init(map_frames(lambda f: jnp.zeros_like(f.gradient), params))

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        frames = updates
        full = map_frames(lambda f: jnp.asarray(f.gradient), frames)
        full, state = inner.update(full, state, params, **extra_args)
        frames = map_frames(
            lambda f, g: f.replace(gradient=g), frames, full, plain=lambda _, g: g
        )
        return frames, state

    return stage(init, update)


def _accumulates(state: optax.OptState) -> bool:
    def accumulates(x: object) -> bool:
        return isinstance(x, optax.MultiStepsState)

    return any(map(accumulates, jax.tree.leaves(state, is_leaf=accumulates)))


def _state_of_one(inner: optax.GradientTransformation) -> Tree:
    """The structure of the state of one array.

    Computed in init and update: building an optimizer must not start a backend, since
    `jax.distributed.initialize` has to come first.
    """
    number = jax.ShapeDtypeStruct((), jnp.float32)
    return jax.tree.structure(jax.eval_shape(inner.init, number))


def _vmapped(f: Callable[..., Tree], leaf: jax.Array) -> Callable[..., Tree]:
    """f under `jax.vmap` over all but the last two axes of the leaf."""
    for _ in leaf.shape[:-2]:
        f = jax.vmap(f)
    return f
