"""Microbatches: sums of projected gradients, added up by the backward pass."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.core.aliases import Tree
from lowrank_optax.core.trees import count_of
from lowrank_optax.training.backward import Load, in_backward, read, write
from lowrank_optax.training.projected import Projected, project_gradient


class LayerSums(NamedTuple):
    """Stacked layers and the sums of their projected gradients.

    Attributes:
      params: a tree of `jax.Ref`s, or of arrays once closed; layers along axis 0.
      state: the same of the transformation's state, as `per_layer` makes it.
      sums: the same, `Projected`: `low` is a sum, `bases` the first microbatch's.
    """

    params: Tree
    state: Tree
    sums: Tree

    @classmethod
    def open(
        cls,
        tx: optax.GradientTransformation,
        params: optax.Params,
        state: optax.OptState,
        *,
        load: Load = lambda params: params,
        refresh: bool = False,
    ) -> "LayerSums":
        """References to the layers and to sums of zero, for `sum_in_backward`.

        Args:
          tx: a transformation with one `low_rank` in it.
          params: a tree of arrays (L, ...), as they are stored.
          state: `per_layer(tx).init(params)`.
          load: as in `sum_in_backward`.
          refresh: whether the step is a refresh.

        Raises:
          ValueError: what `project_gradient` raises.
        """
        count = count_of(params)

        def first() -> Projected:
            weights, own = load(read(params, 0)), read(state, 0)
            return project_gradient(tx, weights, own, weights, refresh=refresh, layer=0)

        zeros = jax.tree.map(
            lambda x: jnp.zeros((count, *x.shape), x.dtype), jax.eval_shape(first)
        )
        return cls(*jax.tree.map(jax.new_ref, (params, state, zeros)))

    def close(self) -> "LayerSums":
        """The arrays; the references end here."""
        return jax.tree.map(jax.freeze, self)


def sum_in_backward(
    apply: Callable[..., Tree],
    tx: optax.GradientTransformation,
    *,
    load: Load = lambda params: params,
    refresh: bool = False,
    first: bool = False,
) -> Callable[..., Tree]:
    """A layer whose backward pass adds its projected gradient to a sum.

    This accumulates gradients without a sum of full gradients. One layer's gradient
    exists at a time, and the sum takes r x n numbers for each matrix. After the last
    microbatch:

        done = layers.close()
        params, state = lro.training.update_layers(
            tx, done.sums, done.state, done.params, refresh=False)

    Args:
      apply: (weights of one layer, x, *inputs) to y, any trees; `inputs` get gradients.
      tx: a transformation with one `low_rank` in it.
      load: from one layer's part of `params` to the weights that `apply` takes.
      refresh: whether the step is a refresh; its first microbatch chooses the bases.
      first: whether this is the step's first microbatch; only read at a refresh.

    Returns:
      layer(i, layers, x, *inputs) to y, with `layers` from `LayerSums.open`.

    Raises:
      ValueError: what `project_gradient` raises.

    Example:
      >>> tx = lro.galore(0.01, rank=2, refresh_every=200, dimension_numbers=None)
      >>> params = jnp.full((12, 8, 8), 0.01)
      >>> state = lro.training.per_layer(tx).init(params)
      >>> layers = lro.training.LayerSums.open(tx, params, state)
      >>> layer = lro.training.sum_in_backward(lambda w, x: x + jnp.tanh(x @ w), tx)
      >>> def loss(x):
      ...     return jnp.sum(jax.lax.scan(
      ...         lambda x, i: (layer(i, layers, x), None), x, jnp.arange(12))[0])
      >>> gradient = jax.grad(loss)(jnp.ones(8))
      >>> bool(jnp.all(layers.close().sums.low != 0))
      True
    """

    def use(index: jax.Array, layers: LayerSums, gradient: Tree) -> None:
        stored, state, sums = read(layers, index)
        bases = sums.bases if refresh and not first else None
        own = project_gradient(
            tx, gradient, state, load(stored), bases=bases, refresh=refresh, layer=index
        )
        write(layers.sums.low, index, jax.tree.map(jnp.add, sums.low, own.low))
        if refresh and first:
            write(layers.sums.bases, index, own.bases)

    return in_backward(apply, load, use)
