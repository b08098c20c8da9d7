"""The same samples from the same key, bit for bit, on every way to spread the work.

One device, four devices under pmap, and eight in one mesh, by jit and by shard_map: the
same gradients and the same key must give the same bases at every refresh. The updates,
sums over n or m numbers that a mesh may add up in another order, agree to rounding.
"""

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lowrank_optax as lro
from tests.helpers.marks import NIGHTLY, slow_but

STEPS, R = 5, 5
# A leaf's shape without and its layout on a mesh of eight.
LEAVES = {
    "rows": ((24, 16), P("d")),
    "columns": ((16, 24), P(None, "d")),
    "layers": ((8, 16, 24), P("d")),
    "vector": ((24,), P("d")),
}
# Four times the rounding of a sum of a few dozen float32 products of size one, after
# Adam's division has made every update about one.
ROUNDING: dict[str, Any] = {"rtol": 0, "atol": 2e-5}

RULES = {
    "dominant_svd": lro.dominant_svd,
    "sara_sample": functools.partial(lro.sara_sample, 3),
    "walk": functools.partial(lro.grassmann_walk, 3, walk_rank=None),
    "jump": functools.partial(lro.grassmann_jump, 3),
}


def optimizer(rule, decomposition):
    """Refreshes at steps 0, 2 and 4."""
    turned = rule == "walk"  # the long chain for one rule, to save time
    adam = optax.scale_by_adam()
    stages = optax.chain(
        RULES[rule](decomposition=decomposition),
        lro.project(),
        lro.rotate_moments(adam) if turned else lro.in_subspace(adam),
        lro.recover_residual(1.01) if turned else lro.project_back(),
    )
    return lro.low_rank(stages, rank=R, refresh_every=2, dimension_numbers=lro.STACKED)


@functools.cache
def gradients():
    rng = np.random.default_rng(0)
    return {
        name: rng.normal(size=(STEPS, *shape)).astype(np.float32)
        for name, (shape, _) in LEAVES.items()
    }


def at(t):
    return {name: g[t] for name, g in gradients().items()}


def trajectory(update, state, place=lambda g: g):
    """Bases and updates of every step, as NumPy arrays."""
    bases, updates = [], []
    for t in range(STEPS):
        u, state = update(place(at(t)), state)
        bases.append(jax.device_get(optax.tree.get(state, "basis")))
        updates.append(jax.device_get(u))
    return jax.tree.map(lambda *xs: np.stack(xs), *zip(bases, updates, strict=True))


@functools.cache
def on_one_device(rule, decomposition):
    tx = optimizer(rule, decomposition)
    return trajectory(jax.jit(tx.update), tx.init(at(0)))


def mesh_of(devices, kind=AxisType.Auto):
    return jax.make_mesh((devices,), ("d",), axis_types=(kind,))


def check(found, rule, decomposition):
    bases, updates = found
    true_bases, true_updates = on_one_device(rule, decomposition)
    for name, basis in true_bases.items():
        np.testing.assert_array_equal(bases[name], basis, err_msg=name)
        if name == "vector":  # of full rank, without a basis
            assert (basis.shape, basis.dtype) == ((STEPS,), np.bool_)
            assert not basis.any()
            continue
        for t in (2, 4):
            # So that equal bits say something about later refreshes too.
            assert np.any(basis[t] != basis[t - 1])
    for name, update in true_updates.items():
        np.testing.assert_allclose(updates[name], update, **ROUNDING, err_msg=name)


def on_a_mesh(rule, decomposition, specs, kind=AxisType.Auto):
    tx = optimizer(rule, decomposition)
    mesh = mesh_of(8, kind)
    place = functools.partial(
        jax.device_put, device={k: NamedSharding(mesh, s) for k, s in specs.items()}
    )
    with jax.set_mesh(mesh):
        return trajectory(jax.jit(tx.update), jax.jit(tx.init)(place(at(0))), place)


SHARDED = {name: spec for name, (_, spec) in LEAVES.items()}
REPLICATED = dict.fromkeys(LEAVES, P())


def rules(*quick, of=(("sara_sample", None), ("walk", "gram"), ("jump", None))):
    """The rules and decompositions as parameters, all but the quick at night."""
    return pytest.mark.parametrize(
        ("rule", "decomposition"),
        [pytest.param(*x, marks=() if x in quick else NIGHTLY) for x in of],
    )


@rules(
    *(("sara_sample", None), ("walk", "gram")),
    of=[*itertools.product(RULES, (None, "gram"))],
)
def test_jit_over_a_mesh(rule, decomposition):
    check(on_a_mesh(rule, decomposition, SHARDED), rule, decomposition)


@pytest.mark.slow
def test_jit_over_a_mesh_with_whole_gradients():
    check(on_a_mesh("walk", None, REPLICATED), "walk", None)


@pytest.mark.parametrize("rule", slow_but(["sara_sample"], ["sara_sample", "walk"]))
def test_jit_over_a_mesh_of_explicit_axes(rule):
    """What jax.make_mesh gives unless told otherwise."""
    check(on_a_mesh(rule, None, REPLICATED, AxisType.Explicit), rule, None)


@rules(("sara_sample", None))
def test_pmap(rule, decomposition):
    tx = optimizer(rule, decomposition)
    devices = jax.devices()[:4]
    spread = functools.partial(jax.tree.map, lambda x: jnp.stack([x] * 4))
    found = trajectory(
        jax.pmap(tx.update, devices=devices),
        jax.pmap(tx.init, devices=devices)(spread(at(0))),
        spread,
    )
    for i in range(4):
        check(jax.tree.map(lambda x, i=i: x[:, i], found), rule, decomposition)


@rules(("walk", "gram"))
def test_shard_map(rule, decomposition):
    """Each device has its share of the gradient; they are summed inside."""
    tx = optimizer(rule, decomposition)
    mesh = mesh_of(8)

    @jax.jit
    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(P("d"), P()),
        out_specs=P(),
        check_vma=False,
    )
    def update(shares, state):
        grads = jax.tree.map(lambda g: jax.lax.psum(g[0], "d"), shares)
        return tx.update(grads, state)

    def split(g):
        # Zeros but for one device's share, so that the sum is exact in any order.
        return jax.tree.map(lambda x: np.stack([x] + [0 * x] * 7), g)

    check(trajectory(update, tx.init(at(0)), split), rule, decomposition)


@pytest.mark.parametrize(
    "dtype", [jnp.float32, pytest.param(jnp.bfloat16, marks=NIGHTLY)]
)
def test_the_step_stays_sharded(dtype):
    """Whole matrices are for the refresh alone: updates and moments stay spread.

    It also guards the tests above, in which work must really be on eight devices.
    """
    tx = optimizer("walk", None)
    mesh = mesh_of(8)
    specs = {name: NamedSharding(mesh, s) for name, s in SHARDED.items()}
    with jax.set_mesh(mesh):
        g = jax.device_put({k: x.astype(dtype) for k, x in at(0).items()}, specs)
        updates, state = jax.jit(tx.update)(g, jax.jit(tx.init)(g))
    moments = optax.tree.get(state, "mu")
    for tree in (g, updates, moments):
        whole = [name for name in LEAVES if tree[name].sharding.is_fully_replicated]
        assert not whole


# --- the other rules ---


class _Seen(NamedTuple):
    seen: Any


def watch():
    """Keeps S of the last step, dense: S I, which is exact."""

    def init(params):
        zeros = lro.stages.map_frames(
            lambda f: jnp.zeros(f.basis_shape, f.gradient.dtype), params
        )
        return _Seen(zeros)

    def update(updates, state, params=None):
        return updates, _Seen(
            lro.stages.map_frames(lambda f: f.up(f.no_rotation()), updates)
        )

    return optax.GradientTransformation(init, update)


OTHER_RULES = {
    "coordinates": lro.bases.coordinates(3),
    "gaussian": lro.bases.gaussian(3),
    "track": lro.bases.grassmann_track(None),
    "walk of one direction": lro.grassmann_walk(3),
    "dct_columns": lro.bases.dct_columns(),
    "switch_basis": lro.bases.switch_basis(3),
    "4 bits": lro.bases.quantize_basis(lro.sara_sample(3)),
}
# Their bases come from sums of every step, which a mesh adds up in another order: the
# first moment, or the gradient of a loss.
TO_ROUNDING = {
    "power_iterate": lro.bases.power_iterate(b1=0.9),
    "correlation_aware": lro.bases.correlation_aware(recompute_every=2),
    "online_pca": lro.bases.online_pca(optax.sgd(0.05)),
}


@pytest.mark.parametrize(
    "name",
    slow_but([], [*OTHER_RULES, *TO_ROUNDING], slow=["4 bits", "power_iterate"]),
)
def test_the_other_rules_over_a_mesh(name):
    stages = optax.chain(
        (OTHER_RULES | TO_ROUNDING)[name],
        watch(),
        lro.project(),
        lro.in_subspace(optax.scale_by_adam()),
        lro.project_back(),
    )
    tx = lro.low_rank(stages, rank=R, refresh_every=2, dimension_numbers=lro.STACKED)

    def walk(place=lambda g: g):
        state, seen = jax.jit(tx.init)(place(at(0))), []
        update = jax.jit(tx.update)
        for t in range(STEPS):
            updates, state = update(place(at(t)), state)
            bases = optax.tree.get(state, "seen")
            # The vector, of full rank, passes the watch as a gradient.
            matrices = {k: s for k, s in bases.items() if k != "vector"}
            seen.append(jax.device_get((matrices, updates)))
        return jax.tree.map(lambda *xs: np.stack(xs), *seen)

    true_bases, true_updates = walk()
    mesh = mesh_of(8)
    layout = {k: NamedSharding(mesh, s) for k, s in SHARDED.items()}
    with jax.set_mesh(mesh):
        bases, updates = walk(functools.partial(jax.device_put, device=layout))
    for leaf, basis in true_bases.items():
        np.testing.assert_array_equal(bases[leaf][:2], basis[:2], err_msg=leaf)
        if name in OTHER_RULES:
            np.testing.assert_array_equal(bases[leaf], basis, err_msg=leaf)
        else:
            np.testing.assert_allclose(bases[leaf], basis, **ROUNDING, err_msg=leaf)
        for t in (2, 4):
            assert np.any(basis[t] != basis[t - 1])
    for leaf, update in true_updates.items():
        # G~ of a Gaussian basis is larger, and an update S G~^O up to about 5.
        np.testing.assert_allclose(updates[leaf], update, rtol=0, atol=1e-4)
