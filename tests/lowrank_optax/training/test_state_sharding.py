"""States cut over a mesh: how, that steps come out the same, and what is moved.

Weights cut by "fsdp" and "tensor" along the side that the projection leaves, as a
transformer's are: outputs of q and up, inputs of o and down.
"""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from optax.contrib import MuonDimensionNumbers

import lowrank_optax as lro
from tests.helpers.marks import NIGHTLY, slow_but
from tests.helpers.sharded import (
    BASES,
    BOTH,
    MATRIX,
    RULES,
    D,
    F,
    L,
    R,
    T,
    compiled_step,
    gradient,
    mesh_of,
    moved,
    named,
    on,
    params,
)
from train.config.methods import METHODS

# --- how a state is cut ---


def test_a_state_is_cut_as_its_stages_say():
    mesh = mesh_of("both")
    cut = on(mesh)
    state = lro.state_shardings(named("grass_jump"), params(), cut)
    moments = optax.tree.get(state, "mu")
    assert moments["layers"]["attn"]["o"].spec == P(None, None, BOTH)
    assert moments["layers"]["mlp"]["down"].spec == P(None, None, BOTH)
    assert moments["embed"].spec == P(BOTH)
    basis = optax.tree.get(state, "basis")
    assert basis["layers"]["mlp"]["up"].spec == P(None, BOTH)
    begun = optax.tree.get(state, "started")
    assert begun["layers"]["attn"]["q"].spec == P()
    assert optax.tree.get(state, "rng_key").spec == P()
    error = optax.tree.get(lro.state_shardings(named("ldadam"), params(), cut), "error")
    assert error["layers"]["mlp"]["down"].spec == P(None, None, BOTH)  # turned
    assert all(x.mesh == mesh for x in jax.tree.leaves(state))


def test_where_the_rows_are_cut_too_or_do_not_divide():
    mesh = mesh_of("both")
    shapes = {"rows": (32, 64), "odd": (L, 64, 43), "heads": (32, 8, 12)}
    cut = {"rows": P("fsdp", "tensor"), "odd": P(None, "fsdp"), "heads": P("fsdp")}
    tree = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in shapes.items()}
    cut = {k: NamedSharding(mesh, s) for k, s in cut.items()}
    heads = MuonDimensionNumbers(reduction_axis=0, output_axis=(1, 2))
    tx = lro.galore(
        1e-3,
        rank=R,
        refresh_every=T,
        dimension_numbers=(("heads", heads), ("", lro.STACKED)),
    )
    state = lro.state_shardings(tx, tree, cut)
    moments, basis = optax.tree.get(state, "mu"), optax.tree.get(state, "basis")
    assert moments["rows"].spec == P("fsdp", "tensor")
    assert basis["rows"].spec == P(("fsdp", "tensor"))
    assert moments["odd"].spec == P(None, None, "fsdp")  # its 64 are the columns
    assert basis["odd"].spec == P(None, None, "fsdp")  # 43 rows do not divide, 16 do
    assert moments["heads"].spec == P("fsdp")


def test_per_layer_and_optax_wrappers():
    cut = on(mesh_of("both"))
    layers = lro.training.per_layer(named("galore_adam8bit"))
    state = lro.state_shardings(layers, params()["layers"], cut["layers"])
    codes = optax.tree.get(state, "mu")["attn"]["q"]
    assert codes.spec == P(None, None, BOTH)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.trace(0.9))
    tx = optax.partition(
        {"low": named("galore"), "full": tx},
        {"layers": "low", "embed": "full"},
    )
    state = lro.state_shardings(optax.MultiSteps(tx, 2), params(), cut)
    assert optax.tree.get(state, "trace")["embed"].spec == P(BOTH)
    assert optax.tree.get(state, "acc_grads")["layers"]["attn"]["o"].spec == P(
        None, BOTH
    )


def test_shardings_must_name_one_mesh():
    with pytest.raises(ValueError, match="NamedSharding for each parameter"):
        lro.state_shardings(optax.sgd(1.0), {"w": jnp.ones(8)})
    two = {"a": NamedSharding(mesh_of("fsdp"), P())}
    two["b"] = NamedSharding(mesh_of("both"), P())
    tree = dict.fromkeys(two, jnp.ones(8))
    with pytest.raises(ValueError, match="on 2 meshes"):
        lro.state_shardings(optax.adam(1.0), tree, two)


def test_square_matrices_are_projected_along_the_side_that_is_whole():
    assert lro.training.square_sides(params(), on(mesh_of("both")), RULES) == [
        ("^layers/attn/o$", "output"),
        ("", "input"),
    ]
    tx = named("galore")
    state = jax.eval_shape(tx.init, params())
    turned = jax.eval_shape(
        functools.partial(lro.training.project_gradient, tx), params(), state, params()
    )
    assert turned.low["layers"]["attn"]["o"].shape == (L, R, D)
    with pytest.raises(ValueError, match="square='left': choose"):
        lro.galore(1.0, rank=2, refresh_every=1, square=(("o", "left"),))


def test_8_bit_blocks_lie_on_one_shard():
    tx = lro.quantize_moments(optax.scale_by_adam())
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    cut = {"w": NamedSharding(mesh, P(None, "d"))}
    # 8 blocks of 172, or 16 of 128; and 4 of 128, which eight devices cannot share out.
    for n, blocks, spec in (
        (1376, 8, P(None, "d")),
        (2048, 16, P(None, "d")),
        (512, 4, P()),
    ):
        x = {"w": jnp.ones((64, n))}
        state = jax.eval_shape(tx.init, x)
        assert state.scales[1]["w"].shape == (64, blocks)
        found = lro.state_shardings(tx, x, cut)
        assert found.scales[1]["w"].spec == spec
        assert found.inner_state.mu["w"].spec == P(None, "d")


# --- the same steps ---

# Also those without a subspace, but for Muon, whose products are of whole matrices.
NAMES = [name for name in METHODS if name not in ("adamw", "muon")]
QUICK = ("grass_jump", "spectral_adam", "galore_adam8bit")
SUMS = ("ldadam", "coap", "online_subspace_descent")


def steps(tx, mesh):
    """The updates of four steps, two of them refreshes, and the last state."""
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        place, init = (lambda x: x), jax.jit(tx.init)
        if mesh is not None:
            place = functools.partial(jax.device_put, device=on(mesh))
            if set(mesh.axis_types) == {AxisType.Auto}:
                cut = lro.state_shardings(tx, params(), on(mesh))
                init = jax.jit(tx.init, out_shardings=cut)
        weights = place(gradient(0))
        update = jax.jit(tx.update, static_argnames="refresh")
        state, seen = init(weights), []
        for t in range(2 * T):
            updates, state = update(
                place(gradient(t)), state, weights, refresh=t % T == 0
            )
            seen.append(jax.device_get(updates))
        return seen, state


def bases_of(state):
    bases = jax.tree.leaves(optax.tree.get(state, "basis"))
    return jax.device_get([x for x in bases if x.dtype != jnp.uint32])  # keys


@functools.cache
def on_one_device(name):
    seen, state = steps(named(name), None)
    return seen, bases_of(state)


def check_same(name, seen, state):
    updates, bases = on_one_device(name)
    # Of the learning rate's size, 1e-3, and sums of some hundred float32 products,
    # which a mesh adds up in another order.
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=2e-7)
    jax.tree.map(close, seen, updates)
    # Bases are of whole matrices; but some follow moments, or derivatives, of sums,
    # and have entries of up to one.
    if name in SUMS:
        close = functools.partial(np.testing.assert_allclose, rtol=0, atol=2e-6)
        jax.tree.map(close, bases_of(state), bases)
    else:
        jax.tree.map(np.testing.assert_array_equal, bases_of(state), bases)


@pytest.mark.parametrize(
    "name",
    slow_but(
        ["grass_jump"],
        [
            *("galore", "grass_jump", "ldadam", "q_galore", "online_subspace_descent"),
            *("alice_0", "sumo"),
        ],
    ),
)
def test_the_same_steps_on_a_mesh(name):
    tx, mesh = named(name), mesh_of("both")
    seen, state = steps(tx, mesh)
    check_same(name, seen, state)
    cut = lro.state_shardings(tx, params(), on(mesh))
    for x, sharding in zip(*map(jax.tree.leaves, (state, cut)), strict=True):
        if x.size > 8 * D:  # the compiler may have small ones whole
            assert x.sharding.is_equivalent_to(sharding, x.ndim)


@pytest.mark.parametrize("mesh", slow_but([], ["fsdp", "tensor"]))
def test_the_same_steps_on_a_mesh_of_one_kind(mesh):
    check_same("galore", *steps(named("galore"), mesh_of(mesh)))


@pytest.mark.parametrize(
    "name", slow_but([], ["galore_adam8bit", "ldadam"], slow=["ldadam"])
)
def test_the_same_steps_on_explicit_axes(name):
    """What jax.make_mesh gives: `init` itself returns a state that is cut."""
    tx, mesh = named(name), mesh_of("both", AxisType.Explicit)
    seen, state = steps(tx, mesh)
    check_same(name, seen, state)
    cut = lro.state_shardings(tx, params(), on(mesh))
    for x, sharding in zip(*map(jax.tree.leaves, (state, cut)), strict=True):
        assert x.sharding.is_equivalent_to(sharding, x.ndim)


def layers_of(tree):
    return tree["layers"]


def steps_by_layer(tx, mesh):
    """The layers' weights after each of four steps of `update_layers`."""
    layered = lro.training.per_layer(tx)
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        place, seen = (lambda x: x), []
        if mesh is not None:
            place = functools.partial(jax.device_put, device=on(mesh)["layers"])
        weights = place(gradient(0)["layers"])
        state = jax.jit(layered.init)(weights)
        step = jax.jit(
            lambda g, s, p, refresh: lro.training.update_layers(
                tx, g, s, p, refresh=refresh
            ),
            static_argnames="refresh",
        )
        for t in range(2 * T):
            g = place(gradient(t)["layers"])
            weights, state = step(g, state, weights, refresh=t % T == 0)
            seen.append(jax.device_get(weights))
        return seen


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(AxisType.Auto, marks=pytest.mark.slow),
        pytest.param(AxisType.Explicit, marks=NIGHTLY),
    ],
)
def test_layers_on_a_mesh(kind):
    tx = named("grass_walk")
    expected = steps_by_layer(tx, None)
    # Weights of size one: an update's rounding, and their own.
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6)
    jax.tree.map(close, steps_by_layer(tx, mesh_of("both", kind)), expected)


# Eight devices, of which each gets one of L matrices, padded to eight.
CHANGE_PLACES = {"all-to-all": 8 * D * F / 8, "collective-permute": 8 * D * F / 8}
# A sketch has as many columns as a basis, on the larger side.
SKETCHES = dict.fromkeys(["all-reduce", "all-gather"], L * D * R)
LARGEST = {
    "spectral_adam": CHANGE_PLACES,
    "cosmos": CHANGE_PLACES,
    "mlorc": SKETCHES,
    "mofasgd": {"all-gather": F * 2 * R},
}


@pytest.mark.parametrize("name", slow_but(QUICK, NAMES))
def test_an_ordinary_step_moves_no_matrix(name):
    """It holds for every method, of ldadam and dct_adamw for the steps they never take:
    all of theirs are refreshes. spectral_adam's and cosmos's residuals change places,
    as all gradients do at a refresh; mlorc and mofasgd factorize at every step.
    """
    found = moved(compiled_step(named(name), mesh_of("both"), refresh=False))
    assert BASES < MATRIX
    most = LARGEST.get(name, {})
    for kind, size in found:
        assert size <= most.get(kind, BASES), found


def test_adamw_moves_nothing():
    assert not moved(compiled_step(named("adamw"), mesh_of("both")))


WHOLE = ("galore", "grass_jump", "subtrack", "ldadam", "coap", "dct_adamw")
WHOLE += ("grass_sparse", "online_subspace_descent", "alice", "sumo", "spectral_adam")
WHOLE += ("cosmos",)


@pytest.mark.parametrize("name", slow_but(["grass_jump"], WHOLE, ["spectral_adam"]))
def test_a_refresh_gathers_no_matrix(name):
    """Each changes places once, or a few times: a share of it on each device."""
    found = moved(compiled_step(named(name), mesh_of("both"), refresh=True))
    for kind, size in found:
        assert size <= CHANGE_PLACES.get(kind, BASES), found
