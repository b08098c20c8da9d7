"""Gradients averaged in the subspace, by shard_map and by pmap, and what that moves."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import lowrank_optax as lro
from tests.helpers.marks import NIGHTLY
from tests.helpers.sharded import moved

M, N, R, T, DEVICES = 24, 40, 4, 2, 4
SHAPES = {"w": (M, N), "b": (N,)}


@functools.cache
def shares(t):
    """A gradient for each device."""
    rng = np.random.default_rng(t)
    return {
        k: rng.standard_normal((DEVICES, *s), np.float32) for k, s in SHAPES.items()
    }


def weights():
    return {k: jnp.ones(s) for k, s in SHAPES.items()}


def galore(**options):
    options = {"rank": R, "refresh_every": T, "dimension_numbers": None} | options
    return lro.galore(0.1, **options)


def by_shard_map(tx, specs=None):
    mesh = jax.make_mesh((DEVICES,), ("d",), axis_types=(AxisType.Auto,))

    @functools.partial(jax.jit, static_argnames="refresh")
    def step(share, state, params, refresh):
        @functools.partial(
            jax.shard_map,
            mesh=mesh,
            in_specs=(P("d"), P(), P()),
            out_specs=P(),
            check_vma=False,
        )
        def on_each(share, state, params):
            own = jax.tree.map(lambda x: x[0], share)
            return tx.update(own, state, params, refresh=refresh)

        return on_each(share, state, params)

    return step


def by_pmap(tx):
    @functools.cache  # a function of its own would be compiled at every step
    def on_each(refresh):
        return jax.pmap(
            functools.partial(tx.update, refresh=refresh),
            axis_name="d",
            in_axes=(0, None, None),
            out_axes=None,
            devices=jax.devices()[:DEVICES],
        )

    def step(share, state, params, refresh):
        return on_each(refresh)(share, state, params)

    return step


SARA = {"basis": lro.sara_sample(0), "weight_decay": 0.1}


@pytest.mark.parametrize(
    ("how", "options"),
    [
        (by_shard_map, SARA),
        (by_pmap, {}),
        pytest.param(by_shard_map, {}, marks=NIGHTLY),
        pytest.param(by_pmap, SARA, marks=NIGHTLY),
    ],
)
def test_the_step_is_that_of_the_mean_gradient(how, options):
    tx, params = galore(**options), weights()
    step = how(lro.training.average_gradients(tx, "d"))
    state, plain = tx.init(params), tx.init(params)
    update = jax.jit(tx.update, static_argnames="refresh")
    for t in range(2 * T):
        refresh = t % T == 0
        updates, state = step(shares(t), state, params, refresh=refresh)
        mean = jax.tree.map(lambda x: jnp.mean(x, 0), shares(t))
        expected, plain = update(mean, plain, params, refresh=refresh)
        # Updates of up to 0.1; a mean of four, and sums of 24, in another order.
        close = functools.partial(np.testing.assert_allclose, rtol=0, atol=2e-6)
        jax.tree.map(close, updates, expected)
    close(optax.tree.get(state, "mu")["w"], optax.tree.get(plain, "mu")["w"])


def test_between_refreshes_r_rows_move_in_place_of_m():
    tx, params = galore(), weights()
    step = by_shard_map(lro.training.average_gradients(tx, "d"))
    state = tx.init(params)

    def sizes(refresh):
        compiled = step.lower(shares(0), state, params, refresh=refresh).compile()
        return [size for _, size in moved(compiled)]

    assert max(sizes(refresh=False)) == R * N
    assert max(sizes(refresh=True)) == M * N


def test_what_needs_the_gradient_itself_is_refused_at_the_first_step():
    params = weights()
    for make in (lro.fira, lro.apollo, lro.frugal, lro.grass_jump, lro.ldadam):
        key = {"key": 0} if make in (lro.apollo, lro.grass_jump) else {}
        tx = make(0.1, rank=R, refresh_every=T, dimension_numbers=None, **key)
        step = by_shard_map(lro.training.average_gradients(tx, "d"))
        first = functools.partial(step, refresh=True)
        state = jax.eval_shape(tx.init, params)
        with pytest.raises(ValueError, match="w: this stage needs the full gradient"):
            jax.eval_shape(first, shares(0), state, params)


def test_it_must_be_told_when_and_of_what():
    tx = galore()
    state, each = tx.init(weights()), lro.training.average_gradients(tx, "d")
    with pytest.raises(ValueError, match="refresh=None: pass True or False"):
        each.update(weights(), state, weights())
    with pytest.raises(ValueError, match="parameters"):
        by_shard_map(each)(shares(0), state, None, refresh=False)
