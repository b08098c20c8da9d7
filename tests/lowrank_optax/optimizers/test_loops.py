"""Every optimizer under optax's wrappers and in loops that people write."""

import functools

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh

import lowrank_optax as lro
from tests.helpers.battery import ALL, FIXED, WHOLE, build
from tests.helpers.marks import slow_but
from tests.helpers.stages import normal

T = 10
FEW = ["galore", "grass_jump", "ldadam"]
each = pytest.mark.parametrize("name", slow_but(FEW, ALL))
PARAMS = {"mlp": {"kernel": normal(8, 12)}, "bias": normal(8, seed=1)}
GOAL = jax.tree.map(lambda x: x + 1, PARAMS)


def gradient(params):
    return jax.tree.map(jnp.subtract, params, GOAL)


def distance(params):
    return float(optax.tree.norm(gradient(params)))


def mini_steps(tx, count, refresh, bad=()):
    """Runs mini-steps, with `refresh` decided from the index; `bad` ones are NaN."""

    @functools.partial(jax.jit, static_argnames="refresh")
    def step(params, state, factor, refresh):
        grads = jax.tree.map(lambda g: factor * g, gradient(params))
        updates, state = tx.update(grads, state, params, refresh=refresh)
        return optax.apply_updates(params, updates), state

    params, state = PARAMS, tx.init(PARAMS)
    for i in range(count):
        factor = jnp.nan if i in bad else 1.0
        params, state = step(params, state, factor, refresh=refresh(i, state))
    return params, state


def test_refreshes_that_multi_steps_discards_are_no_silent_ones():
    k = 2

    def run(refresh):
        tx = optax.MultiSteps(lro.galore(0.1, rank=4, refresh_every=T), k)
        return mini_steps(tx, 4 * T, refresh)

    params, state = run(lambda i, _: i % (k * T) == k - 1)
    assert optax.tree.get(state, "refreshes") == 2
    assert optax.tree.get(state, "skipped") == 0
    assert distance(params) < distance(PARAMS)

    params, state = run(lambda i, _: i % T == 0)  # never at a last mini-step
    assert optax.tree.get(state, "skipped") == 4 * T // k
    jax.tree.map(np.testing.assert_array_equal, params, PARAMS)


def test_refreshes_are_kept_after_a_mini_batch_that_multi_steps_leaves_out():
    """By the expression of docs/loop/multi_steps.md, which asks the state."""
    k = 2

    def refresh(_, state):
        last = int(state.mini_step) == k - 1
        return last and int(state.gradient_step) % T == 0

    tx = optax.MultiSteps(
        lro.galore(0.1, rank=4, refresh_every=T),
        k,
        should_skip_update_fn=optax.skip_not_finite,
    )
    params, state = mini_steps(tx, 4 * T + 3, refresh, bad=(0, 3, 17))
    assert optax.tree.get(state, "refreshes") == 2
    assert optax.tree.get(state, "skipped") == 0
    assert distance(params) < distance(PARAMS)


# No subspace, or one that moves at every step, or never.
UNREFRESHED = WHOLE | FIXED | {"online_subspace_descent"}


@each
def test_no_step_in_a_basis_that_nobody_chose(name):
    """With refresh=False from the start, in any loop."""
    tx = build(name, dimension_numbers=None)
    updates, state = jax.jit(functools.partial(tx.update, refresh=False))(
        gradient(PARAMS), tx.init(PARAMS), PARAMS
    )
    moved = any(bool(jnp.any(u != 0)) for u in jax.tree.leaves(updates))
    assert moved == (name in UNREFRESHED)
    assert int(state[0].skipped) == (name not in UNREFRESHED)


@pytest.mark.parametrize("name", slow_but(["grass_jump"], ALL))
def test_arithmetic_on_states(name):
    """Wrappers and serializers that know arrays, and no keys."""
    tx = build(name, dimension_numbers=None)
    params, state, update = PARAMS, tx.init(PARAMS), jax.jit(tx.update)
    for _ in range(2):
        updates, state = update(gradient(params), state, params)
        params = optax.apply_updates(params, updates)
    assert optax.tree.norm(state).shape == ()  # of keys too, which says little
    saved = flax.serialization.to_bytes(state)
    restored = flax.serialization.from_bytes(tx.init(PARAMS), saved)
    for a, b in zip(*map(jax.tree.leaves, (state, restored)), strict=True):
        np.testing.assert_array_equal(a, b)

    sam = optax.contrib.sam(tx, optax.sgd(0.01), sync_period=2, opaque_mode=False)
    update, sam_state, params = jax.jit(sam.update), sam.init(PARAMS), PARAMS
    for _ in range(4):
        updates, sam_state = update(gradient(params), sam_state, params)
        params = optax.apply_updates(params, updates)
    assert distance(params) < distance(PARAMS)


@each
def test_a_state_that_does_not_fit_is_refused(name):
    if "rank" not in lro.static_args(ALL[name][0]):
        return
    tx, other = (build(name, dimension_numbers=None, rank=r) for r in (2, 3))
    state = other.init(PARAMS)
    for kind in (None, True, False):
        given = {} if kind is None else {"refresh": kind}
        shapes = r"does not fit.*mlp/kernel has the shape.*needs the shape"
        with pytest.raises(ValueError, match=shapes):
            tx.update(gradient(PARAMS), state, PARAMS, **given)
    grown = {**PARAMS, "mlp": {"kernel": normal(8, 13)}}
    with pytest.raises(ValueError, match=r"does not fit.*mlp/kernel"):
        jax.jit(tx.update)(grown, tx.init(PARAMS), grown)
    more = {**PARAMS, "attn": {"kernel": normal(8, 8)}}
    with pytest.raises(ValueError, match=r"does not fit.*attn/kernel has no array"):
        tx.update(more, tx.init(PARAMS), more)
    raw = flax.serialization.to_state_dict(tx.init(PARAMS)[0])
    with pytest.raises(ValueError, match="got a dict for its state"):
        tx.update(PARAMS, (raw, tx.init(PARAMS)[1]), PARAMS)


def test_a_gradient_of_another_shape_is_no_fault_of_the_state():
    tx = lro.galore(0.1, rank=2, dimension_numbers=None)
    wrong = {**PARAMS, "mlp": {"kernel": normal(8, 13)}}
    with pytest.raises(
        ValueError, match=r"mlp/kernel: a gradient of the shape \(8, 13"
    ):
        tx.update(wrong, tx.init(PARAMS), PARAMS)
    with pytest.raises(ValueError, match=r"update\(gradients, state, params\)"):
        tx.update(PARAMS, PARAMS, tx.init(PARAMS))


def test_a_state_without_an_added_stage_is_refused():
    """Although the optimizer that was extended knows the state."""
    tx = lro.galore(0.1, rank=2, dimension_numbers=None)
    state = tx.init(PARAMS)
    tx.update(gradient(PARAMS), state, PARAMS)
    more = lro.add_stage(tx, lro.measure_subspace())
    with pytest.raises(ValueError, match="does not fit"):
        more.update(gradient(PARAMS), state, PARAMS)


class Model(nnx.Module):
    def __init__(self, rngs):
        def kernel(*axes):
            return nnx.with_partitioning(nnx.initializers.lecun_normal(), axes)

        self.mlp = nnx.Dict(
            up=nnx.Linear(8, 16, kernel_init=kernel(None, "model"), rngs=rngs),
            down=nnx.Linear(16, 8, kernel_init=kernel("model", None), rngs=rngs),
        )

    def __call__(self, x):
        return self.mlp.down(nnx.relu(self.mlp.up(x)))


@pytest.mark.parametrize("name", slow_but([], ALL, slow=["grass_jump"]))
def test_nnx_optimizer_on_a_mesh_with_annotated_parameters(name):
    x = normal(8, 8)

    def steps(mesh):
        with jax.set_mesh(mesh):
            model = Model(nnx.Rngs(0))
            optimizer = nnx.Optimizer(model, build(name), wrt=nnx.Param)

            @nnx.jit
            def step(model, optimizer, x):
                grads = nnx.grad(lambda model: jnp.mean((model(x) - 1) ** 2))(model)
                optimizer.update(model, grads)

            for _ in range(3):
                step(model, optimizer, x)
            return jax.device_get(nnx.as_pure(nnx.state(model, nnx.Param)))

    one, four = (steps(Mesh(np.array(jax.devices()[:n]), ("model",))) for n in (1, 4))
    for a, b in zip(*map(jax.tree.leaves, (one, four)), strict=True):
        # Sums over devices round in another order: a hundredth of the rate, 0.01,
        # and ten times as much where bfloat16 has rounded, in a polar factor.
        atol = 1e-3 if name in ("spectral_adam", "cosmos") else 1e-4
        np.testing.assert_allclose(a, b, rtol=0, atol=atol)
