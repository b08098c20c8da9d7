"""What is measured of subspaces, against numpy in float64, and that no step changes."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lowrank_optax as lro
from lowrank_optax.core.frame import Frame
from lowrank_optax.core.stage import Clock
from tests.helpers import sharded
from tests.helpers.battery import (
    build,
    full_tree,
    gradients,
    tree_of,
)
from tests.helpers.marks import NIGHTLY, slow_but

L, M, N, R, T, K = 2, 5, 7, 2, 2, 4
few = settings(derandomize=True, deadline=None, max_examples=20)
ALL_OF_IT: dict[str, Any] = {"anchor": 1, "spectrum": 2}
SOME = st.integers(0, 2**32 - 1)
STAGE = functools.partial(lro.measure_subspace, **ALL_OF_IT)


@pytest.fixture
def x64() -> Any:
    with jax.enable_x64(True):
        yield


def normal(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(size=shape)


def orthonormal(*shape: int, seed: int = 0) -> Any:
    return np.linalg.qr(normal(*shape, seed=seed))[0]


def bracket(rule: Any, *more: Any, **changes: Any) -> Any:
    """The least chain around a rule, and what is to measure right behind it."""
    stages = optax.chain(
        rule,
        *more,
        lro.project(),
        lro.in_subspace(optax.identity()),
        lro.project_back(),
    )
    options = {"rank": R, "refresh_every": T, "dimension_numbers": lro.STACKED}
    return lro.low_rank(stages, **options | changes)


def run(tx: Any, grads: list[Any]) -> tuple[list[Any], Any]:
    """The updates of each step on constant weights, and the last state."""
    update, params, out = jax.jit(tx.update), tree_of(), []
    state = tx.init(params)
    for grad in grads:
        updates, state = update(grad, state, params)
        out.append(updates)
    return out, state


def after_each_step(
    tx: Any, grads: list[Any], static: bool = False
) -> list[dict[str, Any]]:
    """The measurements that the state holds after each step."""
    update, state, seen = (
        jax.jit(tx.update, static_argnames="refresh"),
        tx.init(grads[0]),
        [],
    )
    for t, g in enumerate(grads):
        how = {"refresh": t % T == 0} if static else {}
        _, state = update(g, state, g, **how)
        seen.append(jax.device_get(lro.measurements(state)))
    return seen


# --- the equations, once more in numpy ---


def overlap(u: Any, v: Any) -> float:
    """(1 / r) sum_i ||U^T V_:,i||^2 (SARA paper, section 4.3)."""
    return sum(np.linalg.norm(u.T @ v[:, i]) ** 2 for i in range(R)) / R


def share(s: Any, g: Any) -> float:
    """Eq. 3 of the GrassWalk paper."""
    return float(np.linalg.norm(s.T @ g) / np.linalg.norm(g))


def derivative(s: Any, g: Any) -> Any:
    """The singular values of d/dS min_A ||S A - G||_F^2, every product formed."""
    a = np.linalg.lstsq(s, g, rcond=None)[0]
    return np.linalg.svd(2 * (s @ a - g) @ a.T, compute_uv=False)


def expected(t: int, bases: Any, g: Any, before: Any) -> lro.measuring.Measurement:
    """Of one matrix with the bases S_0, S_1, ... of steps 0, T, 2T, ..."""
    k, at = t // T, ALL_OF_IT["anchor"]
    values = before.spectrum
    if t % T == 0 and k > 0:
        values = derivative(bases[k - 1], g)[: ALL_OF_IT["spectrum"]]
    return lro.measuring.Measurement(
        energy=share(bases[k], g),
        overlap=overlap(bases[k], bases[k - 1]) if k > 0 else np.nan,
        anchor_overlap=overlap(bases[k], bases[at]) if k >= at else np.nan,
        spectrum=values,
    )


@pytest.mark.parametrize("static", [False, True])
def test_all_measures_against_numpy(x64: Any, static: bool) -> None:
    bases = {"wide": orthonormal(K, L, M, R), "tall": orthonormal(K, L, M, R, seed=1)}
    shapes = {"wide": (L, M, N), "tall": (L, N, M)}  # the tall one is turned
    grads = [
        {k: normal(*s, seed=10 * t + i) for i, (k, s) in enumerate(shapes.items())}
        for t in range(K * T)
    ]
    rule = lro.bases.replay(jax.tree.map(jnp.asarray, bases))
    tx = bracket(rule, lro.measure_subspace(**ALL_OF_IT))
    seen = after_each_step(tx, jax.tree.map(jnp.asarray, grads), static)
    nothing = lro.measuring.Measurement(spectrum=np.full(2, np.nan))
    for name in shapes:
        for i in range(L):
            last = nothing
            for t, g in enumerate(grads):
                g = g[name][i] if name == "wide" else g[name][i].T
                last = expected(t, bases[name][:, i], g, last)
                for ours, theirs in zip(seen[t][name], last, strict=True):
                    # Sums of some ten float64 products, and the root of their sum.
                    np.testing.assert_allclose(ours[i], theirs, rtol=1e-12)


def test_coordinates_are_measured_as_the_columns_that_they_are(x64: Any) -> None:
    """Rows 0 1, 2 3, 3 4 and again 0 1, of five."""
    tx = bracket(
        lro.bases.coordinates(order="ascending"),
        lro.measure_subspace(anchor=0, spectrum=R),
    )
    grads = [{"w": jnp.asarray(normal(M, N, seed=t))} for t in range(4 * T)]
    seen = [x["w"] for x in after_each_step(tx, grads)[::T]]
    assert [float(x.overlap) for x in seen[1:]] == [0.0, 0.5, 0.0]
    assert [float(x.anchor_overlap) for x in seen] == [1.0, 0.0, 0.0, 1.0]
    for k, rows in enumerate([(0, 1), (2, 3), (3, 4)]):
        s, g = np.eye(M)[:, rows], np.asarray(grads[k * T]["w"])
        np.testing.assert_allclose(seen[k].energy, share(s, g), rtol=1e-12)
        after = np.asarray(grads[(k + 1) * T]["w"])
        np.testing.assert_allclose(
            seen[k + 1].spectrum, derivative(s, after)[:R], rtol=1e-12
        )


# --- what the numbers mean ---


@jax.jit
def after_a_turn(old: Any, new: Any, g: Any) -> Any:
    stage = lro.measure_subspace(spectrum=R)
    frame = Frame(gradient=g, rank=R, path="w")
    state = stage.init(frame)._replace(started=jnp.array(True))
    frame = frame.replace(
        basis=new, previous=old, rotation=new.T @ old, refreshed=jnp.array(True)
    )
    clock = Clock(jnp.int32(3), True, jnp.int32(1))
    return stage.update(frame, state, clock=clock)[1]


def measured(old: Any, new: Any, g: Any) -> lro.measuring.Measurement:
    """The measures of one frame whose basis goes from `old` to `new`."""
    found = lro.measurements({"w": after_a_turn(old, new, g)})
    return next(iter(found.values()))


@few
@given(SOME)
def test_they_are_of_subspaces_and_not_of_their_bases(seed: int) -> None:
    """Another basis of each, by a rotation, and signs among it, changes nothing."""
    with jax.enable_x64(True):
        old, new = (orthonormal(M, R, seed=seed + i) for i in range(2))
        turn = [orthonormal(R, R, seed=seed + i) for i in range(2)]
        g = normal(M, N, seed=seed + 5)
        plain = measured(old, new, g)
        other = measured(old @ turn[0], new @ turn[1], g)
        for x, y in zip(plain[:2], other[:2], strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-12)
        # A Gram matrix: values are rounded by sqrt(eps) of the largest at most.
        atol = 1e-7 * float(plain.spectrum[0])
        np.testing.assert_allclose(plain.spectrum, other.spectrum, atol=atol)
        assert 0 <= plain.energy <= 1
        assert 0 <= plain.overlap <= 1


@few
@given(SOME, st.floats(1e-12, 1e12))
def test_the_gradients_scale_changes_the_derivative_alone(
    seed: int, scale: float
) -> None:
    old, new = (orthonormal(M, R, seed=seed + i).astype(np.float32) for i in range(2))
    g = normal(M, N, seed=seed + 5).astype(np.float32)
    plain, scaled = measured(old, new, g), measured(old, new, np.float32(scale) * g)
    np.testing.assert_allclose(plain.energy, scaled.energy, rtol=1e-5)
    assert plain.overlap == scaled.overlap
    # Of second order in G, and its smaller values by sqrt(eps) of the largest.
    largest = float(plain.spectrum[0])
    np.testing.assert_allclose(
        np.asarray(scaled.spectrum, float) / scale**2,
        plain.spectrum,
        atol=1e-3 * largest,
    )


def test_identical_and_complementary_subspaces(x64: Any) -> None:
    q = orthonormal(4, 4)
    one, other = q[:, :R], q[:, R:]
    inside = one @ normal(R, N)
    same = measured(one, one, inside)
    np.testing.assert_allclose([same.energy, same.overlap], 1, rtol=1e-12)
    np.testing.assert_allclose(same.spectrum, 0, atol=1e-12)
    apart = measured(one, other, inside)
    np.testing.assert_allclose([apart.energy, apart.overlap], 0, atol=1e-12)


def test_random_subspaces_overlap_by_r_over_m() -> None:
    """So do they hold r / m of the energy's square, as they know nothing of it."""
    count, m, r = 400, 16, 4
    tx = bracket(lro.grassmann_jump(key=0), lro.measure_subspace(), rank=r)
    g = {"w": jnp.asarray(normal(count, m, 3 * m), jnp.float32)}
    found = after_each_step(tx, [g] * (2 * T + 1))[-1]["w"]
    # Five standard errors of a mean of 400: a deviation of 0.05 for the overlap, and
    # of 0.02 for the share in a gradient without a direction of its own.
    assert abs(np.mean(found.overlap) - r / m) < 5 * 0.05 / count**0.5
    assert 0.03 < np.std(found.overlap) < 0.07
    assert abs(np.mean(found.energy**2) - r / m) < 5 * 0.025 / count**0.5


def test_the_dominant_subspace_holds_the_most(x64: Any) -> None:
    g = {"w": jnp.asarray(normal(M, N))}
    values = np.linalg.svd(g["w"], compute_uv=False)
    tx = bracket(lro.dominant_svd(), lro.measure_subspace(spectrum=1))
    first, *_, last = after_each_step(tx, [g] * (T + 1))
    best = np.sqrt(np.sum(values[:R] ** 2) / np.sum(values**2))
    np.testing.assert_allclose(first["w"].energy, best, rtol=1e-12)
    # And at the same gradient it does not move, nor could it become better.
    np.testing.assert_allclose(last["w"].overlap, 1, rtol=1e-12)
    np.testing.assert_allclose(last["w"].spectrum, 0, atol=1e-12)


# --- when there is nothing to say ---


def test_before_there_are_two_bases_there_is_no_overlap() -> None:
    """And before the first gradient that is not zero there is no basis."""
    g = jnp.asarray(normal(L, M, N), jnp.float32)
    late = g.at[1].set(0)
    tx = bracket(lro.sara_sample(key=0), lro.measure_subspace(anchor=0))
    seen = after_each_step(tx, [{"w": x} for x in (late, late, late, g, g, g, g)])
    energy, both, anchors = (
        np.stack([getattr(x["w"], name) for x in seen])
        for name in ("energy", "overlap", "anchor_overlap")
    )
    assert np.all(energy[:3, 1] == 0)
    assert np.all(energy[3:] > 0)
    # Refreshes at 0, 2, 4 and 6; the second layer has its first basis at step 3.
    first = [np.isnan(both[:, i]) for i in range(L)]
    assert first[0].tolist() == [True] * 2 + [False] * 5
    assert first[1].tolist() == [True] * 4 + [False] * 3
    anchored = [~np.isnan(anchors[:, i]) for i in range(L)]
    assert anchored[0].tolist() == [True] * 7
    assert anchored[1].tolist() == [False] * 4 + [True] * 3
    np.testing.assert_allclose(anchors[0, 0], 1, rtol=1e-6)


def test_a_frozen_basis_is_its_own_anchor() -> None:
    tx = bracket(lro.bases.frozen(lro.dominant_svd()), lro.measure_subspace(anchor=1))
    g = {"w": jnp.asarray(normal(M, N), jnp.float32)}
    seen = after_each_step(tx, [g] * (2 * T + 1))
    assert all(np.isnan(x["w"].overlap) for x in seen)
    assert [bool(np.isnan(x["w"].anchor_overlap)) for x in seen] == [True] * 2 + [
        False
    ] * 3
    np.testing.assert_allclose(seen[-1]["w"].anchor_overlap, 1, rtol=1e-6)


def test_a_refused_step_measures_nothing() -> None:
    tx = bracket(lro.sara_sample(key=0), lro.measure_subspace(**ALL_OF_IT))
    g = {"w": jnp.asarray(normal(M, N), jnp.float32)}
    bad = {"w": g["w"].at[0, 0].set(jnp.nan)}
    seen = after_each_step(tx, [g, g, bad, g])
    for before, after in zip(seen[1]["w"], seen[2]["w"], strict=True):
        np.testing.assert_array_equal(before, after)
    assert not np.isnan(seen[3]["w"].overlap)  # the refresh that was due then


def test_whole_spaces_and_vectors_are_not_measured() -> None:
    tx = bracket(
        lro.dominant_svd(), lro.measure_subspace(**ALL_OF_IT), rank=(("w", R), ("", M))
    )
    params = {"w": jnp.ones((M, N)), "all": jnp.ones((M, N)), "bias": jnp.ones(3)}
    with pytest.warns(UserWarning, match="all"):
        state = tx.init(params)
    assert [*lro.measurements(state)] == ["w"]
    assert [*lro.measurements(jax.jit(tx.update)(params, state)[1])] == ["w"]


# --- no step is another ---


def same_bits(a: Any, b: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


# One of each way back, moments that turn or begin anew, columns and coordinates.
@pytest.mark.parametrize(
    "name",
    slow_but(
        ["grass_walk", "frugal_coordinates"],
        [
            *("galore_sara", "fira", "grass_walk", "frugal_coordinates", "ldadam"),
            "dct_adamw",
        ],
    ),
)
def test_a_stage_that_measures_changes_no_bit_of_a_step(name: str) -> None:
    tx = build(name)
    measured = lro.add_stage(tx, lro.measure_subspace(**ALL_OF_IT))
    plain, state = run(tx, gradients())
    ours, own = run(measured, gradients())
    same_bits(ours, plain)
    same_bits(optax.tree.get(own, "mu"), optax.tree.get(state, "mu"))
    assert [*lro.measurements(own)] == ["matrix"]


def test_it_may_stand_in_a_named_optimizers_basis() -> None:
    rule, stage = lro.sara_sample(key=7), lro.measure_subspace()
    inside = build("grass_jump", key=None, basis=optax.chain(rule, stage))
    behind = lro.add_stage(build("grass_jump", key=None, basis=rule), stage)
    updates, state = run(inside, gradients())
    others, other = run(behind, gradients())
    same_bits(updates, others)
    same_bits(updates, run(build("grass_jump_sara"), gradients())[0])
    for ours, theirs in zip(
        *(lro.measurements(x)["matrix"][:2] for x in (state, other)), strict=True
    ):
        # The same sums of some ten float32 numbers, in two programs.
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "passes", "where"),
    [
        ("galore", 1, "basis"),
        ("fira", 0, "end"),
        pytest.param("galore", 1, "end", marks=NIGHTLY),
        pytest.param("fira", 0, "basis", marks=NIGHTLY),
    ],
)
def test_what_an_ordinary_step_costs(name: str, passes: int, where: str) -> None:
    """No product, and one more sum over the gradient where no residual has it."""
    m, n, r = 16, 256, 4
    params, rule, stage = {"w": jnp.ones((m, n))}, lro.dominant_svd(), STAGE()

    def compiled(tx: Any) -> Any:
        update = jax.jit(functools.partial(tx.update, refresh=False))
        return update.lower(params, tx.init(params), params).compile()

    make = functools.partial(
        getattr(lro, name), 0.1, rank=r, refresh_every=T, dimension_numbers=None
    )
    plain = compiled(make())
    if where == "basis":
        ours = compiled(make(basis=optax.chain(rule, stage)))
    else:
        ours = compiled(lro.add_stage(make(), stage))
    products = [len(re.findall(r" dot\(", x.as_text())) for x in (plain, ours)]
    assert products[0] == products[1] > 0
    more = {
        what: ours.cost_analysis()[what] - plain.cost_analysis()[what]
        for what in ("flops", "bytes accessed")
    }
    # A square and a sum for each number of G, and what is small: numbers of S^T G, and
    # the kept anchor, which is no argument that was there before.
    assert more["flops"] <= passes * (2 * m * n + n) + 2 * r * n
    assert more["bytes accessed"] <= 4 * (passes * m * n + r * n + 2 * m * r + 4 * n)


# --- where there are layers, meshes and wrappers ---


def layered() -> Any:
    rule = lro.grassmann_jump(key=0)
    return lro.add_stage(bracket(rule, dimension_numbers=lro.STACKED), STAGE())


def stacked(t: int) -> Any:
    return {"w": jnp.asarray(normal(L, 8, 16, seed=t), jnp.float32)}


@functools.cache
def of_the_stack() -> Any:
    return after_each_step(layered(), [stacked(t) for t in range(2 * T + 1)], True)


def check_like_the_stack(state: Any) -> None:
    found = jax.device_get(lro.measurements(state))
    for ours, theirs in zip(found["w"], of_the_stack()[-1]["w"], strict=True):
        # Sums of a hundred float32 products, added up in another order.
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_layers_by_themselves_are_measured_like_the_stack() -> None:
    tx, by_layer = layered(), lro.training.per_layer(layered())

    @functools.partial(jax.jit, static_argnames="refresh")
    def step(g: Any, states: Any, refresh: bool) -> Any:
        _, one = by_layer.update(g, states[0], g, refresh=refresh)
        _, two = lro.training.update_layers(tx, g, states[1], g, refresh=refresh)
        return one, two

    states = (by_layer.init(stacked(0)),) * 2
    for t in range(2 * T + 1):
        states = step(stacked(t), states, refresh=t % T == 0)
    for state in states:
        check_like_the_stack(state)


def test_the_backward_pass_measures_what_it_updates() -> None:
    """The gradient of sum(C W) is C, whatever x is."""
    tx, params = layered(), stacked(0)

    @functools.partial(jax.jit, static_argnames="refresh")
    def step(g: Any, state: Any, refresh: bool) -> Any:
        layers = lro.training.Layers.open(params, state)
        layer = lro.training.update_in_backward(
            lambda w, x, c: x + jnp.sum(w["w"] * c), tx, refresh=refresh
        )

        def loss(x: Any) -> Any:
            def body(x: Any, i: Any) -> Any:
                return layer(i, layers, x, g["w"][i]), None

            return jax.lax.scan(body, x, jnp.arange(L))[0]

        jax.grad(loss)(jnp.float32(0))
        return layers.close().state

    state = lro.training.per_layer(tx).init(params)
    for t in range(2 * T + 1):
        state = step(stacked(t), state, refresh=t % T == 0)
    check_like_the_stack(state)


@pytest.mark.parametrize(
    "kind", [AxisType.Auto, pytest.param(AxisType.Explicit, marks=NIGHTLY)]
)
def test_on_a_mesh(kind: AxisType) -> None:
    mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(kind,))
    cut = {"w": NamedSharding(mesh, P(None, None, "fsdp"))}
    tx = layered()
    shardings = lro.state_shardings(tx, stacked(0), cut)
    own = {name: optax.tree.get(shardings, name)["w"].spec for name in ALL_OF_IT}
    assert own == {"spectrum": P(), "anchor": P(None, "fsdp")}
    with jax.set_mesh(mesh):
        init = jax.jit(tx.init)
        if kind is AxisType.Auto:
            init = jax.jit(tx.init, out_shardings=shardings)
        state = init(jax.device_put(stacked(0), cut))
        update = jax.jit(tx.update, static_argnames="refresh")
        for t in range(2 * T + 1):
            g = jax.device_put(stacked(t), cut)
            _, state = update(g, state, g, refresh=t % T == 0)
        check_like_the_stack(state)


@pytest.mark.parametrize("refresh", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_no_matrix_moves_to_be_measured(refresh: bool) -> None:
    """Between refreshes its sums go with those that are there; then bases do."""
    plain, mesh = sharded.named("grass_jump"), sharded.mesh_of("both")
    found = [
        sorted(sharded.moved(sharded.compiled_step(tx, mesh, refresh=refresh)))
        for tx in (plain, lro.add_stage(plain, STAGE()))
    ]
    if not refresh:
        assert found[0] == found[1]
    for kind, size in found[1]:
        assert size <= sharded.BASES or (kind, size) in found[0]


def test_sums_in_the_subspace_have_overlaps_and_no_energy() -> None:
    rule = lro.sara_sample(key=0)
    grads, weights = [stacked(t) for t in range(T + 1)], stacked(9)

    def steps(stage: Any) -> Any:
        tx = bracket(rule, stage)
        state = tx.init(weights)

        @functools.partial(jax.jit, static_argnames="refresh")
        def step(g: Any, state: Any, refresh: bool) -> Any:
            how: Any = {"refresh": refresh}
            low = lro.training.project_gradient(tx, g, state, weights, **how)
            return lro.training.update_projected(tx, low, state, weights, **how)[1]

        for t, g in enumerate(grads):
            state = step(g, state, refresh=t % T == 0)
        return lro.measurements(state)["w"]

    plain = after_each_step(bracket(rule, lro.measure_subspace()), grads)[-1]["w"]
    found = steps(lro.measure_subspace(energy=False))
    np.testing.assert_allclose(found.overlap, plain.overlap, rtol=1e-6)
    with pytest.raises(ValueError, match=r"w: measure_subspace\(\) .* full gradients"):
        steps(lro.measure_subspace(overlap=False))


def test_optax_finds_the_parameters_in_its_state() -> None:
    tx, params = lro.add_stage(build("galore_sara"), STAGE()), full_tree()
    state = tx.init(params)
    marked = optax.tree.map_params(tx, lambda _: "of a parameter", state)
    for tree in optax.tree.get(marked, "anchor"), optax.tree.get(marked, "energy"):
        assert {*jax.tree.leaves(tree)} == {"of a parameter"}
    after = jax.eval_shape(tx.update, params, state, params)[1]
    assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, state)


def test_measurements_are_found_in_any_wrapper() -> None:
    def make(learning_rate: float) -> Any:
        return lro.add_stage(build("galore", learning_rate=learning_rate), STAGE())

    labels = {"matrix": "low", "vector": "full", "frozen": None}
    injected = optax.inject_hyperparams(make)(learning_rate=0.1)
    both = optax.partition({"low": injected, "full": optax.sgd(1.0)}, labels)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.MultiSteps(both, 2))
    params = tree_of()
    state = tx.init(params)
    assert np.isnan(lro.measurements(state)["matrix"].energy)
    update = jax.jit(tx.update)
    for g in gradients(2):
        _, state = update(g, state, params)
    assert 0 < lro.measurements(state)["matrix"].energy < 1
    assert lro.measurements(optax.adam(1.0).init(params)) == {}
    inside = jax.jit(lambda s: lro.measurements(s)["matrix"].energy)
    assert inside(state) == lro.measurements(state)["matrix"].energy


# --- what is refused ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"anchor": -1}, "anchor must be an int of at least 0, not -1"),
        ({"spectrum": 0.5}, "spectrum must be an int of at least 0, not 0.5"),
        ({"energy": False, "overlap": False}, "nothing to measure"),
    ],
)
def test_arguments_that_mean_nothing(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lro.measure_subspace(**arguments)


@pytest.mark.parametrize("name", ["apollo", "coap", "q_galore", "flora"])
def test_bases_that_are_not_orthonormal_are_refused(name: str) -> None:
    tx, params = lro.add_stage(build(name), lro.measure_subspace()), tree_of()
    with pytest.raises(ValueError, match=r"matrix: measure_subspace\(\).*orthonormal"):
        jax.eval_shape(tx.update, params, tx.init(params), params)


def test_it_has_its_place_behind_the_basis_rule() -> None:
    stage, g = lro.measure_subspace(), {"w": jnp.ones((M, N))}
    tx = bracket(stage, lro.dominant_svd())
    with pytest.raises(ValueError, match=r"w: the Frame has no `basis` yet; put a"):
        tx.update(g, tx.init(g))
    with pytest.raises(ValueError, match=r"put it inside low_rank\(\)"):
        stage.update(g, stage.init(g))
    with pytest.raises(ValueError, match=r"add_stage\(\) extends low_rank"):
        lro.add_stage(optax.chain(build("galore")), stage)


def test_one_thing_is_measured_once() -> None:
    tx = lro.add_stage(build("galore"), lro.measure_subspace(overlap=False))
    other = lro.add_stage(tx, lro.measure_subspace(energy=False))
    (found,) = lro.measurements(other.init(tree_of())).values()
    assert np.isnan(found.energy)
    assert np.isnan(found.overlap)
    twice = lro.add_stage(tx, lro.measure_subspace())
    with pytest.raises(ValueError, match=r"matrix: two .* measured its energy"):
        lro.measurements(twice.init(tree_of()))
