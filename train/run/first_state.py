"""The first state of a run: shapes, shardings, and how to make it."""

from collections.abc import Callable
from functools import partial

import jax
from jax.sharding import Mesh

import lowrank_optax as lro
from models import Params
from train.engine.mesh import replicated
from train.engine.step import (
    TrainState,
    Work,
    dense,
    init_state,
    init_weights,
    store_weights,
)
from train.run.start import Shardings


def initial(
    work: Work, mesh: Mesh, given: Callable[[Shardings], Params] | None = None
) -> tuple[Callable[[jax.Array], TrainState], TrainState]:
    """Returns a function from a key to the first state, and that state's shapes.

    The state is sharded as it is made, and its shapes have shardings. The key draws the
    weights, unless `given` returns some, on the devices and stored as any run does.
    """
    like = like_of(work, mesh)
    shardings = jax.tree.map(lambda x: x.sharding, like)
    draw = jax.jit(partial(init_weights, work), out_shardings=shardings.params)
    store = jax.jit(partial(store_weights, work), out_shardings=shardings.params)
    rest = jax.jit(partial(init_state, work), out_shardings=shardings, donate_argnums=0)

    def make(key: jax.Array) -> TrainState:
        if given is None:
            return rest(draw(key))
        weights = given(partial(work.shards.shardings, mesh))
        as_stored = _shapes(weights) == _shapes(like.params)
        return rest(weights if as_stored else store(weights))

    # One after the other: what drawing the weights takes is free again then.
    return make, like


def _shapes(params: Params) -> Params:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)


def like_of(work: Work, mesh: Mesh) -> TrainState:
    """The shapes and shardings of a `TrainState`; allocates nothing."""
    params = jax.eval_shape(partial(init_weights, work), jax.random.key(0))
    weights = jax.eval_shape(partial(dense, work), params)
    state = jax.eval_shape(partial(init_state, work), params)
    shardings = jax.tree.map(lambda _: replicated(mesh), state)._replace(
        params=work.shards.shardings(mesh, params),
        opt_state=lro.state_shardings(
            work.optimizer.tx, weights, work.shards.shardings(mesh, weights)
        ),
    )
    return jax.tree.map(
        lambda x, own: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=own),
        state,
        shardings,
    )
