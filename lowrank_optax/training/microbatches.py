"""Micro-batches: gradients summed in the subspace, r rows in place of m."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.core.frame import BASIS_RULE
from lowrank_optax.core.trees import count_of, frames_of, map_frames
from lowrank_optax.training.backward import Load, in_backward, read, write


class Projected(NamedTuple):
    """What a step needs of a gradient.

    Attributes:
      low: a tree like the gradient: S^T G (*batch, r, n) where a matrix is projected,
        the gradient itself elsewhere, in float32 (float64 for float64 leaves).
      bases: S (*batch, m, r), by path, where it was chosen from this gradient; none
        between refreshes, where it is in the state.
    """

    low: Any
    bases: dict[str, jax.Array]


def project_gradient(
    tx: optax.GradientTransformation,
    gradient: optax.Updates,
    state: optax.OptState,
    params: optax.Params | None = None,
    *,
    bases: Mapping[str, jax.Array] | None = None,
    refresh: bool = False,
    **extra_args: Any,
) -> Projected:
    """S^T G, which is all that a step needs of G where no residual is given back.

    GaLore's step is a function of G~ = S^T G alone, and G~ is linear in G: so the sum
    over k micro-batches may be kept as r rows in place of m,

        G~ = (S^T G_1 + ... + S^T G_k) / k

    and `tx.update(low, state, params, projected=True)` takes the step of the mean
    gradient, to rounding. At a refresh the basis is chosen from the first micro-batch's
    gradient, the only one that is there by itself, where the paper takes the whole
    batch's; random bases are the same. `bases` hands it on to the other micro-batches
    and to the update:

        first = lro.training.project_gradient(tx, g_1, state, params, refresh=True)
        other = lro.training.project_gradient(
            tx, g_2, state, params, refresh=True, bases=first.bases)
        low = jax.tree.map(lambda a, b: (a + b) / 2, first.low, other.low)
        updates, state = tx.update(
            low, state, params, projected=True, refresh=True, bases=first.bases)

    What stands before `low_rank` in a chain sees each micro-batch's gradient here and
    the sum's S^T G at the update: clip afterwards, or by the norm of S^T G. The rest of
    `tx.update` is not computed under jit.

    Args:
      tx: a transformation with one `low_rank` in it.
      gradient: a micro-batch's.
      state: the state before the step.
      params: the parameters.
      bases: those that the step's first micro-batch chose.
      refresh: whether the step is a refresh.
      extra_args: for `tx.update`; `layer`, for the layer of a stack.

    Raises:
      ValueError: a transformation with no `low_rank` or more than one; at the update, a
        stage that needs the gradient itself: `recover_residual`, `sign_residual`,
        `scale_channels`, `error_feedback`.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> tx = lro.galore(0.01, rank=2, refresh_every=200, dimension_numbers=None)
      >>> params = {"w": jnp.ones((4, 8))}
      >>> state = tx.init(params)
      >>> lro.training.project_gradient(tx, params, state, params).low["w"].shape
      (2, 8)
    """
    tx, seen = optax.with_extra_args_support(tx), []
    tx.update(
        gradient,
        state,
        params,
        **{**extra_args, "refresh": refresh, "bases": bases, "see": seen.append},
    )
    if len(seen) != 1:
        raise ValueError(
            f"a gradient is projected by one low_rank(), and this transformation has "
            f"{len(seen)}; sum whole gradients"
        )
    chosen = {
        f.path: f.need("basis", BASIS_RULE)
        for f in frames_of(seen[0])
        if refresh and not f.full_rank
    }
    low = map_frames(lambda f: f.need("low", "project()"), seen[0])
    return Projected(low, chosen)


class LayerSums(NamedTuple):
    """Stacked layers and the sums of their projected gradients.

    Attributes:
      params: a tree of `jax.Ref`s, or of arrays once closed; layers along axis 0.
      state: the same of the transformation's state, as `per_layer` makes it.
      sums: the same, `Projected`: `low` is a sum, `bases` the first micro-batch's.
    """

    params: Any
    state: Any
    sums: Any


def open_sums(
    tx: optax.GradientTransformation,
    params: optax.Params,
    state: optax.OptState,
    *,
    load: Load = lambda params: params,
    refresh: bool = False,
) -> LayerSums:
    """References to the layers and to sums of zero, for `sum_in_backward`.

    Args:
      tx: a transformation with one `low_rank` in it.
      params: a tree of arrays (L, ...), as they are kept.
      state: `per_layer(tx).init(params)`.
      load: as in `sum_in_backward`.
      refresh: whether the step is a refresh.

    Raises:
      ValueError: what `project_gradient` raises.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> tx = lro.galore(0.01, rank=2, refresh_every=200, dimension_numbers=None)
      >>> params = {"w": jnp.ones((12, 4, 8))}
      >>> layers = lro.training.open_sums(
      ...     tx, params, lro.training.per_layer(tx).init(params))
      >>> layers.sums.low["w"].shape
      (12, 2, 8)
    """
    count = count_of(params)

    def first() -> Projected:
        weights, own = load(read(params, 0)), read(state, 0)
        return project_gradient(tx, weights, own, weights, refresh=refresh, layer=0)

    zeros = jax.tree.map(
        lambda x: jnp.zeros((count, *x.shape), x.dtype), jax.eval_shape(first)
    )
    return LayerSums(*jax.tree.map(jax.new_ref, (params, state, zeros)))


def close_sums(layers: LayerSums) -> LayerSums:
    """The arrays; the references are gone.

    Args:
      layers: what `open_sums` gave.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> tx = lro.galore(0.01, rank=2, refresh_every=200, dimension_numbers=None)
      >>> params = {"w": jnp.ones((12, 4, 8))}
      >>> layers = lro.training.open_sums(
      ...     tx, params, lro.training.per_layer(tx).init(params))
      >>> float(lro.training.close_sums(layers).sums.low["w"].max())
      0.0
    """
    return jax.tree.map(jax.freeze, layers)


def sum_in_backward(
    apply: Callable[..., Any],
    tx: optax.GradientTransformation,
    *,
    load: Load = lambda params: params,
    refresh: bool = False,
    first: bool = False,
) -> Callable[..., Any]:
    """A layer whose backward pass adds its projected gradient to a sum.

    For gradient accumulation without a sum of full gradients: never more than one
    layer's gradient is there, and r x n numbers for each matrix. The step follows when
    all micro-batches are through:

        layers = lro.training.open_sums(tx, params, state)
        layer = lro.training.sum_in_backward(block, tx)
        for x in microbatches:      # jax.lax.scan, in earnest
            jax.grad(loss)(rest, x) # loss as in `update_in_backward`
        params, state, sums = lro.training.close_sums(layers)
        params, state = lro.training.update_layers(
            tx, sums.low, state, params, refresh=False, projected=True)

    At a refresh the first micro-batch chooses the bases (`project_gradient`), and
    `bases=sums.bases` goes to `update_layers`.

    Args:
      apply: (weights of one layer, x, *inputs) to y, any trees; `inputs` get gradients.
      tx: a transformation with one `low_rank` in it.
      load: from one layer's part of `params` to the weights that `apply` takes.
      refresh: whether the step is a refresh.
      first: whether this is the step's first micro-batch; matters at a refresh alone.

    Returns:
      layer(i, layers, x, *inputs) to y, with `layers` from `open_sums`.

    Raises:
      ValueError: what `project_gradient` raises.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> tx = lro.galore(0.01, rank=2, refresh_every=200, dimension_numbers=None)
      >>> params = jnp.full((12, 8, 8), 0.01)
      >>> layers = lro.training.open_sums(
      ...     tx, params, lro.training.per_layer(tx).init(params))
      >>> layer = lro.training.sum_in_backward(lambda w, x: x + jnp.tanh(x @ w), tx)
      >>> def loss(x):
      ...     return jnp.sum(jax.lax.scan(
      ...         lambda x, i: (layer(i, layers, x), None), x, jnp.arange(12))[0])
      >>> gradient = jax.grad(loss)(jnp.ones(8))
      >>> bool(jnp.all(lro.training.close_sums(layers).sums.low != 0))
      True
    """

    def use(index: jax.Array, layers: LayerSums, gradient: Any) -> None:
        stored, state, sums = read(layers, index)
        bases = sums.bases if refresh and not first else None
        own = project_gradient(
            tx, gradient, state, load(stored), bases=bases, refresh=refresh, layer=index
        )
        write(layers.sums.low, index, jax.tree.map(jnp.add, sums.low, own.low))
        if refresh and first:
            write(layers.sums.bases, index, own.bases)

    return in_backward(apply, load, use)
