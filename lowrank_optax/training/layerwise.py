"""Layers one at a time: states with a layer axis, and updates in the backward pass."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.bracket.bracket import LowRankState
from lowrank_optax.bracket.inside import NOTHING_INSIDE, Inside, auto_update
from lowrank_optax.core.aliases import Tree
from lowrank_optax.core.checks import transformation
from lowrank_optax.core.sharding import on_auto_axes
from lowrank_optax.core.stage import stage
from lowrank_optax.core.trees import count_of, squared_norm
from lowrank_optax.training.backward import Load, in_backward, read, write
from lowrank_optax.training.chosen import chosen_together, updates_together
from lowrank_optax.training.projected import Projected

Apply = Callable[..., Tree]


def per_layer(
    tx: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Runs `tx` on each layer of stacked parameters by itself.

    Every leaf has the layers along its first axis, and so has every array of the state,
    which is `jax.vmap(tx.init)` of the parameters. What `tx` computes over a tree (a
    norm, a finite flag, a mean) is that of one layer. Layers draw different random
    numbers (docs/guides/layer_by_layer.md).

    With `refresh=False` (see `low_rank`) `jax.vmap` updates all layers together. With
    `refresh=True` it does so on a mesh, and where all bases are faster to choose in one
    call: those of the library's rules for matrices with a side up to 1024, but for
    wrapped and Gaussian ones. Otherwise a loop updates the layers: under `vmap` both
    branches of a conditional would run, and a batch of large factorizations takes
    longer than a loop. What `low_rank(stagger=True)` refreshes with `refresh=False`,
    one loop over the matrices of all layers does.

    Args:
      tx: any optax transformation; extra arguments are passed on to it.

    Raises:
      ValueError: leaves without one number of layers along their first axes; what `tx`
        raises.

    Example:
      >>> params = {"mlp": {"kernel": jnp.ones((12, 16, 64))}}  # 12 layers
      >>> tx = lro.training.per_layer(lro.galore(0.01, rank=4, refresh_every=200))
      >>> state = tx.init(params)
      >>> optax.tree.get(state, "mu")["mlp"]["kernel"].shape
      (12, 4, 64)
    """
    inner = transformation("per_layer()", tx, "lowrank_optax.galore(0.01)")

    def init(params: optax.Params) -> optax.OptState:
        index = jnp.arange(count_of(params))
        state = jax.vmap(inner.init)(params)

        def own(x: Tree) -> Tree:
            if not _is_key(x):
                return x  # an array, or a low_rank's state: its update gets the layer
            return jax.vmap(jax.random.fold_in)(x, index)

        return jax.tree.map(own, state, is_leaf=lambda x: isinstance(x, LowRankState))

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        *,
        inside: Inside = NOTHING_INSIDE,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        bases = chosen_together(inner, updates, state, params, extra_args, inside)
        count = count_of(updates)

        def one(
            i: jax.Array, carry: tuple[Tree, Tree], other: Tree
        ) -> tuple[Tree, Tree]:
            p, chosen = other
            own = inside.replace(layer=i, layers=count, bases=chosen)
            return inner.update(*carry, p, inside=own, **extra_args)

        block = count if updates_together(extra_args, bases) else 1
        # The update takes the gradient's place, the new state the old one's.
        return _in_blocks(one, (updates, state), (params, bases.by_path), block)

    return stage(init, auto_update(update))


def _in_blocks(
    f: Callable[[jax.Array, Tree, Tree], Tree], carry: Tree, other: Tree, block: int
) -> Tree:
    """`carry` with layer i replaced by f(i, layer i of carry, layer i of other).

    `block` layers at a time under `jax.vmap`; without it where that is one.
    """
    count = count_of(carry)
    if block >= count:
        return jax.vmap(f)(jnp.arange(count), carry, other)

    def body(i: jax.Array, carry: Tree) -> Tree:
        if block == 1:
            new = f(i, read(carry, i), read(other, i))
            return jax.tree.map(lambda x, y: x.at[i].set(y), carry, new)
        start = i * block
        take = partial(
            jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=block
        )
        index = start + jnp.arange(block)
        new = jax.vmap(f)(index, *jax.tree.map(take, (carry, other)))
        put = partial(jax.lax.dynamic_update_slice_in_dim, start_index=start, axis=0)
        return jax.tree.map(put, carry, new)

    return jax.lax.fori_loop(0, count // block, body, carry)


def _even(block: int, count: int) -> int:
    """The largest divisor of `count` up to `block`."""
    return max(k for k in range(1, max(1, min(block, count)) + 1) if count % k == 0)


def update_layers(
    tx: optax.GradientTransformation,
    gradient: optax.Updates | Projected,
    state: optax.OptState,
    params: optax.Params,
    *,
    block: int | None = None,
    load: Load = lambda params: params,
    apply_updates: Apply = lambda params, updates, index: optax.apply_updates(
        params, updates
    ),
    operands: tuple[Tree, ...] = (),
    **extra_args: Any,
) -> tuple[optax.Params, optax.OptState]:
    """Takes the step of `update_in_backward` from the gradients of all layers.

        U_i, state_i <- tx.update(G_i, state_i, W_i),   W_i <- W_i + U_i

    in place and `block` layers at a time, so that no more than a block's updates, casts
    and products exist at any time.

    Args:
      gradient: a tree of arrays (L, ...), or the `Projected` of `sum_in_backward`.
      state: `per_layer(tx).init(params)`.
      params: the weights, as they are stored.
      block: how many layers are updated together, rounded down to a divisor of L; None
        for all. One at a time at some refreshes, which `per_layer` names.
      operands: arrays that `apply_updates` gets, such as this step's random key.
      tx, load, apply_updates: as in `update_in_backward`.
      extra_args: for `tx.update`; `refresh` and `accept`, for `low_rank`.

    Returns:
      The new weights and the new state; jit it, and donate the old ones.

    Raises:
      ValueError: leaves without one number of layers along their first axes; what `tx`
        raises.

    Example:
      >>> params, tx = {"w": jnp.ones((12, 8, 8))}, optax.sgd(0.5)
      >>> state = lro.training.per_layer(tx).init(params)
      >>> new, state = lro.training.update_layers(tx, params, state, params, block=4)
      >>> float(new["w"][3, 0, 0])
      0.5
    """

    inside = NOTHING_INSIDE
    if isinstance(gradient, Projected):
        gradient, inside = gradient.low, Inside(bases=gradient.bases, low=True)

    def update(
        gradient: Tree,
        state: Tree,
        params: Tree,
        operands: tuple[Tree, ...],
        *,
        inside: Inside,
        **extra_args: Any,
    ) -> tuple[Tree, Tree]:
        count = count_of(params)
        bases = chosen_together(tx, gradient, state, params, extra_args, inside, load)

        def one(
            i: jax.Array, carry: tuple[Tree, Tree], other: Tree
        ) -> tuple[Tree, Tree]:
            g, chosen = other
            own = inside.replace(layers=count, bases=chosen)
            step = _step(tx, load, apply_updates, extra_args, own)
            return step(i, g, *carry, *operands)

        size = _even(count if block is None else block, count)
        if not updates_together(extra_args, bases):
            size = 1
        return _in_blocks(one, (params, state), (gradient, bases.by_path), size)

    return on_auto_axes(
        update,
        *(gradient, state, params, operands),
        like=(params, state),
        inside=inside,
        **extra_args,
    )


def _step(
    tx: optax.GradientTransformation,
    load: Load,
    apply_updates: Apply,
    extra_args: Mapping[str, object],
    inside: Inside,
) -> Callable[..., tuple[Tree, Tree]]:
    """step(i, G_i, stored W_i, state_i, *operands) to (new W_i, new state_i)."""
    inner = transformation("update_layers()", tx, "lowrank_optax.galore(0.01)")

    def step(i: jax.Array, g: Tree, stored: Tree, s: Tree, *operands: Tree) -> Tree:
        own = inside.replace(layer=i)
        updates, s = inner.update(g, s, load(stored), inside=own, **extra_args)
        return apply_updates(stored, updates, i, *operands), s

    return step


class Layers(NamedTuple):
    """Stacked layers that are updated in place.

    Attributes:
      params: a tree of `jax.Ref`s, or of arrays once closed; layers along axis 0.
      state: the same of the transformation's state, as `per_layer` makes it.
      squares: (L,) float32, the sum of the squares of each layer's last gradient.
      operands: arrays that `apply_updates` gets.
    """

    params: Tree
    state: Tree
    squares: Tree
    operands: tuple[Tree, ...] = ()

    @classmethod
    def open(
        cls, params: optax.Params, state: optax.OptState, *operands: Tree
    ) -> "Layers":
        """References to the layers, for `update_in_backward`.

        Args:
          params: a tree of arrays (L, ...).
          state: `per_layer(tx).init(params)`.
          operands: arrays that its `apply_updates` gets, such as this step's key.

        Raises:
          ValueError: leaves without one number of layers along their first axes.
        """
        squares = jnp.zeros(count_of(params), jnp.float32)
        refs = jax.tree.map(jax.new_ref, (params, state, squares))
        return cls(refs[0], refs[1], refs[2], operands)

    def close(self) -> "Layers":
        """The arrays with all updates in them; the references end here."""
        return self._replace(
            params=jax.tree.map(jax.freeze, self.params),
            state=jax.tree.map(jax.freeze, self.state),
            squares=jax.freeze(self.squares),
        )


def update_in_backward(
    apply: Callable[..., Tree],
    tx: optax.GradientTransformation,
    *,
    load: Load = lambda params: params,
    apply_updates: Apply = lambda params, updates, index: optax.apply_updates(
        params, updates
    ),
    **extra_args: Any,
) -> Callable[..., Tree]:
    """A layer whose backward pass ends with its own update.

        U_i, state_i <- tx.update(G_i, state_i, W_i),   W_i <- W_i + U_i

    in place, so that no more than one layer's gradient and update exist at any time.
    The step is that of `per_layer(tx)`, up to rounding (docs/guides/layer_by_layer.md).

    Args:
      apply: (weights of one layer, x, *inputs) to y, any trees; `inputs` get gradients.
      tx: any optax transformation.
      load: from one layer's part of `params` to the weights that `apply` takes and `tx`
        sees; for weights that are stored in another form.
      apply_updates: (one layer's part of `params`, updates, i, *operands) to the new
        part. A function in a backward pass cannot close over arrays: pass them as the
        layers' `operands`.
      extra_args: static arguments of `tx.update`; `refresh`, for `low_rank`.

    Returns:
      layer(i, layers, x, *inputs) to y, with `layers` from `Layers.open`.

    Raises:
      ValueError: what `tx` raises, in the backward pass.

    Example:
      >>> tx, params = optax.adamw(1e-3), jnp.full((12, 8, 8), 0.1)
      >>> state = lro.training.per_layer(tx).init(params)
      >>> layers = lro.training.Layers.open(params, state)
      >>> layer = lro.training.update_in_backward(lambda w, x: x + jnp.tanh(x @ w), tx)
      >>> def loss(x):
      ...     return jnp.sum(jax.lax.scan(
      ...         lambda x, i: (layer(i, layers, x), None), x, jnp.arange(12))[0])
      >>> gradient = jax.grad(loss)(jnp.ones(8))
      >>> bool(jnp.all(layers.close().params < params))
      True
    """
    tx = transformation("update_in_backward()", tx, "lowrank_optax.galore(0.01)")

    def use(index: jax.Array, layers: Layers, gradient: Tree) -> None:
        inside = Inside(layers=len(layers.squares))
        step = _step(tx, load, apply_updates, extra_args, inside)
        stored, state = read((layers.params, layers.state), index)
        new = step(index, gradient, stored, state, *layers.operands)
        write((layers.params, layers.state), index, new)
        layers.squares[index] = squared_norm(gradient)

    return in_backward(apply, load, use)


def _is_key(x: Tree) -> bool:
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
