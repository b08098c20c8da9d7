"""Gradients in the subspace: r rows in place of m, which can be summed."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import optax

from lowrank_optax.bracket.inside import Inside
from lowrank_optax.core.aliases import Tree
from lowrank_optax.core.checks import transformation
from lowrank_optax.core.sharding import has_explicit_axes
from lowrank_optax.core.trees import frames_of, map_frames


class Projected(NamedTuple):
    """The parts of a gradient that a step needs.

    Attributes:
      low: a tree like the gradient: S^T G (*batch, r, n) where a matrix is projected,
        the gradient itself elsewhere, in float32 (float64 for float64 leaves).
      bases: S (*batch, m, r), by path, where it was chosen from this gradient; empty
        between refreshes, where the state has it.
    """

    low: Tree
    bases: dict[str, jax.Array]


def project_gradient(
    tx: optax.GradientTransformation,
    gradient: optax.Updates,
    state: optax.OptState,
    params: optax.Params | None = None,
    *,
    bases: Mapping[str, jax.Array] | None = None,
    refresh: bool = False,
    layer: int | jax.Array | None = None,
    **extra_args: Any,
) -> Projected:
    """Returns S^T G, which is all that GaLore's step needs of a gradient.

    G~ = S^T G is linear in G. So the sum over k microbatches takes r rows instead of m,
    and `update_projected` takes the step of the mean gradient:

        G~ = (S^T G_1 + ... + S^T G_k) / k

    At a refresh, the first microbatch's gradient chooses the bases. Pass its `bases` to
    the other microbatches. The paper uses the whole batch's gradient. Under jit only
    what S^T G needs is computed. A transformation before `low_rank` in a chain runs on
    each microbatch's gradient here, and on the sum of S^T G at the update. Clip only
    after the sum.

    Args:
      tx: a transformation with one `low_rank` in it.
      gradient: a microbatch's.
      state: the state before the step.
      params: the parameters.
      bases: those that the step's first microbatch chose.
      refresh: whether the step is a refresh.
      layer: the layer of a stack, as for `per_layer`.
      extra_args: for `tx.update`.

    Raises:
      ValueError: a transformation with no `low_rank` or more than one; a mesh of
        Explicit axes.

    Example:
      >>> tx = lro.galore(0.01, rank=2, refresh_every=200, dimension_numbers=None)
      >>> params = {"w": jnp.ones((4, 8))}
      >>> state = tx.init(params)
      >>> lro.training.project_gradient(tx, params, state, params).low["w"].shape
      (2, 8)
    """
    if has_explicit_axes():
        raise ValueError(
            "project_gradient() and sum_in_backward() need a mesh whose axes are all "
            "AxisType.Auto; this one has Explicit axes. Make it with "
            "jax.make_mesh(..., axis_types=(jax.sharding.AxisType.Auto,) * ndim)"
        )
    seen: list[optax.Updates] = []
    inside = Inside(layer=layer, bases=bases or {}, record=seen.append)
    transformation("project_gradient()", tx, "lowrank_optax.galore(0.01)").update(
        gradient, state, params, refresh=refresh, inside=inside, **extra_args
    )
    if len(seen) != 1:
        raise ValueError(
            f"project_gradient() needs one low_rank(), and this transformation has "
            f"{len(seen)}; sum full gradients"
        )
    chosen = {
        f.path: f.need("basis")
        for f in frames_of(seen[0])
        if refresh and not f.full_rank and not f.folded
    }
    low = map_frames(lambda f: f.need("low"), seen[0])
    return Projected(low, chosen)


def update_projected(
    tx: optax.GradientTransformation,
    projected: Projected,
    state: optax.OptState,
    params: optax.Params | None,
    *,
    refresh: bool = False,
    **extra_args: Any,
) -> tuple[optax.Updates, optax.OptState]:
    """`tx.update` from projected gradients that were summed.

    Args:
      projected: what `project_gradient` returned, summed; its `bases` are the first
        microbatch's.
      tx, state, params, refresh, extra_args: as in `project_gradient`.

    Returns:
      Updates like the parameters, and the new state.

    Raises:
      ValueError: no parameters; arrays of another shape; a stage that needs the full
        gradient: `recover_residual`, `sign_residual`, `scale_gradient`,
        `error_feedback`.

    Example:
      >>> tx = lro.galore(0.01, rank=2, refresh_every=200, dimension_numbers=None)
      >>> params = {"w": jnp.ones((4, 8))}
      >>> state, how = tx.init(params), {"refresh": True}
      >>> first = lro.training.project_gradient(tx, params, state, params, **how)
      >>> second = lro.training.project_gradient(
      ...     tx, params, state, params, bases=first.bases, **how)
      >>> low = jax.tree.map(lambda a, b: (a + b) / 2, first.low, second.low)
      >>> updates, state = lro.training.update_projected(
      ...     tx, first._replace(low=low), state, params, **how)
      >>> updates["w"].shape
      (4, 8)
    """
    inner = transformation("update_projected()", tx, "lowrank_optax.galore(0.01)")
    return inner.update(
        projected.low,
        state,
        params,
        refresh=refresh,
        inside=Inside(bases=projected.bases, low=True),
        **extra_args,
    )
