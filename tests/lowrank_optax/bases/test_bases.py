"""The bases of the family: their laws, what they follow, and when they move."""

import dataclasses
import functools
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import subspace_angles

import lowrank_optax as lro
from lowrank_optax.bases.follow import follow
from lowrank_optax.core.frame import Frame
from lowrank_optax.core.linalg import leading, orthonormality_error
from lowrank_optax.core.stage import Clock
from tests.helpers.numpy_reference import sample_probabilities

M, N, R, B1 = 8, 12, 3, 0.9
few = settings(derandomize=True, deadline=None, max_examples=20)


def normal(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def frame_of(g: Any, rank: int = R, path: str = "w") -> Frame:
    return Frame(gradient=jnp.asarray(g), rank=rank, path=path, precision=None)


class Walk(NamedTuple):
    """What a rule said at each step, stacked."""

    basis: Any
    rotation: Any
    low: Any
    back: Any
    state: Any


def scanned(rule: Any, gradients: Any, refresh: Any, rank: int = R) -> Walk:
    """`rule` alone under lax.scan, next to a first moment that turns with its basis."""

    def step(carry: Any, x: Any) -> Any:
        (state, m), (t, due, cycle, g) = carry, x
        clock = Clock(step=t, refresh=due, cycle=cycle)
        frame = frame_of(g, rank).replace(momentum=m)
        out, state = rule.update(frame, state, clock=clock)
        turn = out.no_rotation() if out.rotation is None else out.rotation
        low = out.down(out.gradient)
        moment = B1 * turn @ m + (1 - B1) * low
        return (state, moment), Walk(out.basis, turn, low, out.up(low), state)

    first = frame_of(gradients[0], rank)
    start = (rule.init(first), jnp.zeros(first.low_shape, first.gradient.dtype))
    cycle = jnp.cumsum(refresh) - refresh
    times = jnp.arange(len(gradients))
    return jax.lax.scan(step, start, (times, refresh, cycle, gradients))[1]


def walk(rule: Any, gradients: Any, every: int = 1, rank: int = R) -> Walk:
    due = jnp.arange(len(gradients)) % every == 0
    run = jax.jit(lambda gs: scanned(rule, gs, due, rank))
    return run(jnp.asarray(gradients))


def bracket(rule: Any, step: Any = None, **changes: Any) -> Any:
    """The least chain around a rule: its update is S S^T G."""
    stages = optax.chain(
        rule,
        lro.project(),
        step or lro.in_subspace(optax.identity()),
        lro.project_back(),
    )
    given: dict[str, Any] = {
        "rank": R,
        "refresh_every": 1,
        "dimension_numbers": lro.STACKED,
    }
    return lro.low_rank(stages, **{**given, **changes})


def updates_of(tx: Any, gradients: Any) -> Any:
    """Updates and states of a tree of (K, ...) gradients."""

    def step(state: Any, g: Any) -> Any:
        updates, state = tx.update(g, state, g)  # any params: some ask for them
        return state, (updates, state)

    def run(gs: Any) -> Any:
        return jax.lax.scan(step, tx.init(jax.tree.map(lambda x: x[0], gs)), gs)[1]

    return jax.jit(run)(jax.tree.map(jnp.asarray, gradients))


def same_bits(a: Any, b: Any) -> bool:
    return bool(np.array_equal(np.asarray(a), np.asarray(b)))


def captured(s: Any, g: Any) -> Any:
    """||S^T G||^2 / ||G||^2 for an orthonormal S, of each matrix."""
    low = np.swapaxes(s, -1, -2) @ g
    return (low**2).sum((-2, -1)) / (g**2).sum((-2, -1))


# ------------------------------------------------------------------ every rule

RULES: dict[str, Any] = {
    "coordinates": lambda key: lro.bases.coordinates(key),
    "ascending": lambda _: lro.bases.coordinates(order="ascending"),
    "sample_rows": lambda key: lro.bases.sample_rows(key),
    "gaussian": lambda key: lro.bases.gaussian(key),
    "gaussian stored": lambda key: lro.bases.gaussian(key, stored=True),
    "track": lambda _: lro.bases.grassmann_track(),
    "track by line search": lambda _: lro.bases.grassmann_track(None),
    "random_after": lambda key: lro.bases.random_after(2, key),
    "online_pca": lambda _: lro.bases.online_pca(),
    "power_iterate": lambda _: lro.bases.power_iterate(b1=B1),
    "correlation_aware": lambda _: lro.bases.correlation_aware(recompute_every=3),
    "frozen": lambda key: lro.bases.frozen(lro.sara_sample(key)),
    "lazy": lambda key: lro.bases.lazy_refresh(lro.sara_sample(key), window=1),
    "4 bits": lambda key: lro.bases.quantize_basis(lro.sara_sample(key)),
    "switch": lambda key: lro.bases.switch_basis(key),
}
DRAWN = {
    "switch",
    "coordinates",
    "sample_rows",
    "gaussian",
    "gaussian stored",
    "random_after",
    "frozen",
    "lazy",
    "4 bits",
}
LOOSE = {  # no promise of an orthonormal basis
    "gaussian",
    "gaussian stored",
    "online_pca",
    "correlation_aware",
    "4 bits",
}
each_rule = pytest.mark.parametrize("rule", RULES)

KINDS = [
    normal(M, N),
    np.zeros((M, N), np.float32),
    np.ones((M, N), np.float32),
    normal(M, 2) @ normal(2, N, seed=1),  # rank two
    (normal(M, M) * 10.0 ** -np.arange(M)).astype(np.float32) @ normal(M, N),
    np.eye(M, N, dtype=np.float32) * (np.arange(M) == 2)[:, None],  # one entry
    np.float32(1e-30) * normal(M, N),
    np.float32(1e30) * normal(M, N),
]
# Refreshes at every step, each kind first and each after the others, one order per
# layer; then at every third.
ORDERS = np.stack([KINDS[i:] + KINDS[:i] for i in range(len(KINDS))], axis=1)
GRADIENTS = np.concatenate([ORDERS, normal(6, *ORDERS.shape[1:])])
DUE = np.array([True] * len(KINDS) + [False, False, True] * 2)
KEYS = np.array([1, 1, 2])


@functools.cache
def walks(rule: str) -> Walk:
    """The same walk with each of the keys, in front."""

    @jax.jit
    def run(keys: Any, gradients: Any) -> Any:
        return jax.lax.map(
            lambda key: scanned(RULES[rule](key), gradients, jnp.asarray(DUE)), keys
        )

    return run(KEYS, GRADIENTS)


@each_rule
def test_any_gradient_gives_a_basis(rule: str) -> None:
    found = walks(rule)
    assert np.isfinite(found.rotation).all()
    assert np.isfinite(found.low).all()
    if np.issubdtype(found.basis.dtype, np.integer):
        assert found.basis.shape == (3, *GRADIENTS.shape[:2], R)
        assert (np.diff(found.basis) > 0).all()  # distinct, sorted rows
        assert found.basis.min() >= 0
        assert found.basis.max() < M
    elif rule not in LOOSE:
        # A few tens of float32 roundings, as what `orthonormalize` lets pass.
        assert orthonormality_error(found.basis) < 1e-5
    else:
        assert np.isfinite(found.basis).all()


@each_rule
def test_a_rule_says_whether_its_bases_are_orthonormal(rule: str) -> None:
    made, said = RULES[rule](1), []
    now = jnp.zeros([], jnp.int32)

    def update(g: Any, m: Any) -> Any:
        frame = frame_of(g).replace(momentum=m)
        clock = Clock(step=now, refresh=now == 0, cycle=now)
        out, _ = made.update(frame, made.init(frame), clock=clock)
        said.append(out.orthonormal)
        return out.basis

    jax.eval_shape(update, normal(M, N), jnp.zeros((R, N)))
    assert said == [rule not in LOOSE]


@each_rule
def test_the_key_decides_the_draw(rule: str) -> None:
    found = walks(rule)
    assert same_bits(found.basis[0], found.basis[1])
    assert same_bits(found.rotation[0], found.rotation[1])
    assert same_bits(found.low[0], found.low[1])
    for t in np.flatnonzero(DUE):
        if rule in DRAWN:
            # Not yet random; a zero gradient's basis is replaced at the next step.
            other = t < {"random_after": 2, "switch": 1}.get(rule, 0)
            assert same_bits(found.basis[0, t], found.basis[2, t]) == other
        else:
            assert same_bits(found.basis[0, t], found.basis[2, t])


@each_rule
def test_the_turn_is_that_of_the_bases(rule: str) -> None:
    """And the basis stands still, to the bit, between refreshes."""
    if rule == "online_pca":  # it moves at every step, and says no turn
        assert (np.diff(walks(rule).basis[0, 1:], axis=0) != 0).any((1, 2, 3)).all()
        return
    basis, turn = walks(rule).basis[0], walks(rule).rotation[0]
    if np.issubdtype(basis.dtype, np.integer):
        dense = np.swapaxes(np.eye(M)[basis], -1, -2)
    else:
        dense = np.float64(basis)
    for t in range(1, len(DUE)):
        if DUE[t]:
            expected = np.swapaxes(dense[t], -1, -2) @ dense[t - 1]
            # Float32 rounding of sums of M products of entries up to about 3.
            np.testing.assert_allclose(turn[t], expected, atol=1e-5)
        else:
            assert same_bits(basis[t], basis[t - 1])
            assert same_bits(turn[t], np.broadcast_to(np.eye(R), turn[t].shape))


# ------------------------------------------------------------------ gaussian


@pytest.mark.parametrize("every", [1, 3])
def test_redrawn_and_stored_projections_are_the_same_bits(every: int) -> None:
    gradients = normal(7, 2, M, N)
    drawn = walk(lro.bases.gaussian(5), gradients, every)
    stored = walk(lro.bases.gaussian(5, stored=True), gradients, every)
    assert same_bits(drawn.basis, stored.basis)
    # The turn of step 0, from no basis at all, is never used.
    assert same_bits(drawn.rotation[1:], stored.rotation[1:])
    assert same_bits(drawn.low, stored.low)
    assert same_bits(drawn.back, stored.back)
    for t in range(1, 7):
        assert same_bits(drawn.basis[t], drawn.basis[t - 1]) == (t % every != 0)


def test_a_whole_optimizer_cannot_tell_which_is_stored() -> None:
    gradients = {"w": normal(7, 2, M, N), "b": normal(7, 5)}
    step = lro.rotate_moments(optax.ema(0.9))
    drawn, stored = (
        updates_of(
            bracket(lro.bases.gaussian(5, stored=kept), step, refresh_every=2),
            gradients,
        )[0]
        for kept in (False, True)
    )
    jax.tree.map(np.testing.assert_array_equal, drawn, stored)


def test_outside_of_scan_too() -> None:
    gradients = normal(4, M, N)
    tx = bracket(lro.bases.gaussian(5), refresh_every=2)
    state, update = tx.init({"w": gradients[0]}), jax.jit(tx.update)
    for g in gradients:
        updates, state = update({"w": jnp.asarray(g)}, state)
    found, _ = updates_of(tx, {"w": gradients})
    # Products of 8 and of 3 terms of size about 10, in float32.
    np.testing.assert_allclose(updates["w"], found["w"][-1], rtol=0, atol=2e-5)


def test_the_state_of_a_gaussian_is_two_keys() -> None:
    tree = {"a": frame_of(normal(M, N)), "b": jnp.ones(5)}
    state: Any = lro.bases.gaussian(0).init(tree)
    for key in (state.rng_key, state.basis):
        assert jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key)
        assert key.shape == ()
    # And a bool for each leaf, as every rule has.
    assert jax.tree.map(bool, state.started) == {"a": True, "b": False}
    stored: Any = lro.bases.gaussian(0, stored=True).init(tree)
    assert jax.tree.map(jnp.shape, stored.basis) == {"a": (M, R), "b": ()}


@pytest.mark.parametrize("rank", [1, 4])
def test_entries_are_normal_with_variance_one_over_r(rank: int) -> None:
    layers = 2000
    basis = walk(lro.bases.gaussian(3), np.zeros((1, layers, M, N)), rank=rank).basis[0]
    x = np.float64(basis).reshape(-1) * math.sqrt(rank)
    # Four and a half standard deviations of each mean, on fixed seeds: x, x^2 and x^4
    # of a standard normal have variances 1, 2 and 96.
    for power, mean, variance in [(1, 0, 1), (2, 1, 2), (4, 3, 96)]:
        error = (x**power).mean() - mean
        assert abs(error) < 4.5 * math.sqrt(variance / x.size), power
    # E[S S^T] = I: entries of the mean over layers, of variance (1 + [i = j]) / r.
    outer = np.einsum("lir,ljr->ij", np.float64(basis), np.float64(basis)) / layers
    bound = 4.5 * np.sqrt((1 + np.eye(M)) / rank / layers)
    assert (np.abs(outer - np.eye(M)) < bound).all()


def test_layers_leaves_and_refreshes_draw_apart() -> None:
    rule = lro.bases.gaussian(3)
    frames = {
        "w": frame_of(np.zeros((2, M, N))),
        "v": frame_of(np.zeros((M, N)), R, "v"),
    }

    def step(state: Any, now: Any) -> Any:
        clock = Clock(step=now, refresh=now >= 0, cycle=now)
        out, state = rule.update(frames, state, clock=clock)
        return state, (out["w"].basis, out["v"].basis)

    run = jax.jit(lambda: jax.lax.scan(step, rule.init(frames), jnp.arange(3))[1])
    apart = [np.asarray(x).reshape(-1, M, R) for x in run()]
    for x, y in itertools.combinations(np.concatenate(apart), 2):
        assert not same_bits(x, y)


# ------------------------------------------------------------------ coordinates


def test_random_rows_are_uniform_without_replacement() -> None:
    layers, m, r = 4000, 6, 2
    rows = walk(lro.bases.coordinates(0), np.zeros((1, layers, m, 7)), rank=r).basis[0]
    assert rows.shape == (layers, r)
    assert rows.dtype == jnp.int32
    assert (np.diff(rows) > 0).all()
    pairs, counts = np.unique(rows, axis=0, return_counts=True)
    assert len(pairs) == math.comb(m, r)
    # Four and a half standard deviations of a frequency, on a fixed seed.
    p = 1 / math.comb(m, r)
    assert np.abs(counts / layers - p).max() < 4.5 * math.sqrt(p * (1 - p) / layers)


@pytest.mark.parametrize("order", ["ascending", "descending"])
def test_rows_in_turn_are_all_covered_and_then_begin_again(order: Any) -> None:
    sizes = [(m, r) for m in range(2, 10) for r in range(1, m)]
    frames = {str(x): frame_of(np.zeros((x[0], 10)), rank=x[1]) for x in sizes}
    rule = lro.bases.coordinates(order=order)

    def step(state: Any, now: Any) -> Any:
        clock = Clock(step=now, refresh=now >= 0, cycle=now)
        out, state = rule.update(frames, state, clock=clock)
        return state, {name: frame.basis for name, frame in out.items()}

    run = jax.jit(lambda: jax.lax.scan(step, rule.init(frames), jnp.arange(18))[1])
    found = run()
    for m, r in sizes:
        seen, blocks = np.asarray(found[str((m, r))]), -(-m // r)
        assert same_bits(seen, seen[:, :1] + np.arange(r))  # r neighbours
        assert seen.min() >= 0
        assert seen.max() < m
        assert set(seen[:blocks].reshape(-1)) == set(range(m))
        assert same_bits(seen[:blocks], seen[blocks : 2 * blocks])
        assert seen[0, 0] == (0 if order == "ascending" else m - r)


@few
@given(seed=st.integers(0, 2**31))
def test_gather_and_scatter_are_products_with_unit_columns(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = np.stack([np.sort(rng.choice(M, R, replace=False)) for _ in range(4)])
    rows = rows.reshape(2, 2, R)
    dense = np.swapaxes(np.eye(M, dtype=np.float32)[rows], -1, -2)
    x, y = normal(2, 2, M, 5, seed=seed), normal(2, 2, R, 5, seed=seed)
    # Sums with all terms but one zero are exact: bit for bit.
    jax.tree.map(
        np.testing.assert_array_equal, _both_ways(rows, x, y), _both_ways(dense, x, y)
    )


@jax.jit
def _both_ways(basis: Any, x: Any, y: Any) -> Any:
    frame = frame_of(jnp.zeros((2, 2, M, N))).replace(basis=basis)
    return frame.down(x), frame.up(y)


@pytest.mark.parametrize(
    "rule", [lro.bases.coordinates(order="ascending"), lro.bases.sample_rows(0)]
)
def test_a_nan_in_a_row_that_is_not_taken_skips_the_step(rule: Any) -> None:
    tx = bracket(rule, lro.in_subspace(optax.scale_by_adam()), refresh_every=9)
    update = jax.jit(tx.update)
    g = normal(M, N)
    g[M - 1] *= 1e-6  # no row that sample_rows would take
    _, state = update({"w": g}, tx.init({"w": g}))
    assert M - 1 not in optax.tree.get(state, "basis")["w"]
    for bad in (np.nan, np.inf):
        g[M - 1, 2] = bad
        updates, after = update({"w": g}, state)
        assert same_bits(updates["w"], np.zeros((M, N)))
        assert (after.count, after.skipped) == (1, 1)
        same = jax.tree.map(lambda x, y: jnp.all(x == y), state[2], after[2])
        assert all(jax.tree.leaves(same))


def test_layers_take_turns() -> None:
    """FRUGAL's block-wise mode: Adam on one layer of four, signs on the others."""
    layers, steps, every = 4, 12, 3
    g = {"mlp": {"kernel": normal(steps, layers, M, N)}}
    tx = lro.frugal(
        -1.0,
        rank=0.25,
        refresh_every=every,
        basis=lro.bases.coordinates(order="descending"),
        dimension_numbers=lro.LAYERS,
    )
    found, states = updates_of(tx, g)
    assert optax.tree.get(states, "basis")["mlp"]["kernel"].shape == (steps, 1)
    adam, update = optax.scale_by_adam(), found["mlp"]["kernel"]
    for start in range(0, steps, every):
        active = layers - 1 - start // every
        state = adam.init(g["mlp"]["kernel"][0, active])
        for t in range(start, start + every):
            now = g["mlp"]["kernel"][t]
            expected, state = adam.update(now[active], state)
            # The same few float32 operations, in another program.
            np.testing.assert_allclose(update[t, active], expected, rtol=1e-5)
            for layer in set(range(layers)) - {active}:
                assert same_bits(update[t, layer], np.sign(now[layer]))


# ------------------------------------------------------------------ sample_rows


def test_rows_are_sampled_by_norm_without_replacement() -> None:
    norms, count = [4.0, 2.0, 1.0, 0.5], 4000
    # Rows of equal norm but other direction and sign would be drawn alike.
    unit = normal(4, 5)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    g = np.tile(unit * np.array(norms, np.float32)[:, None], (1, count, 1, 1))
    rows = walk(lro.bases.sample_rows(0), g, rank=2).basis[0]
    pairs = [tuple(x) for x in np.asarray(rows).tolist()]
    for pair, p in sample_probabilities(norms).items():
        # Four and a half standard deviations of a frequency, on fixed seeds.
        bound = 4.5 * math.sqrt(p * (1 - p) / count)
        assert abs(pairs.count(pair) / count - p) < bound, (pair, p)


def test_zero_rows_come_last_and_the_first_of_them_fill_up() -> None:
    g = np.zeros((1, 200, M, N), np.float32)
    g[..., [3, 6], :] = normal(2, N)
    g[..., 6, :] *= 1e-6
    rows = walk(lro.bases.sample_rows(0), g).basis[0]
    assert same_bits(rows, np.tile([0, 3, 6], (200, 1)))
    none = walk(lro.bases.sample_rows(0), np.zeros((1, 200, M, N))).basis[0]
    assert same_bits(np.unique(none), np.arange(M))  # all zero: any of them


# ------------------------------------------------------------------ tracking


def turning(shape: tuple[int, int], steps: int, angle: float) -> Any:
    """Gradients of rank R whose span turns by `angle` a step, out of where it was."""
    m, n = sorted(shape)
    rng = np.random.default_rng(shape[0])
    q = np.linalg.qr(rng.normal(size=(m, 2 * R)))[0]
    t = angle * np.arange(steps)[:, None, None]
    span = np.cos(t) * q[:, :R] + np.sin(t) * q[:, R:]
    # Singular values of one, in other directions each time.
    right = np.linalg.qr(rng.normal(size=(steps, n, R)))[0]
    g = (span @ np.swapaxes(right, 1, 2)).astype(np.float32)
    return g if shape == (m, n) else np.swapaxes(g, 1, 2)


SHAPES = {"wide": (8, 12), "tall": (12, 8), "square": (9, 9)}


def test_tracking_follows_what_a_frozen_basis_loses() -> None:
    steps, angle = 150, 0.01
    gradients = {k: turning(shape, steps, angle) for k, shape in SHAPES.items()}

    def shares(rule: Any) -> Any:
        """||S^T G||^2 / ||G||^2, of each step."""
        found, _ = updates_of(bracket(rule), gradients)
        return {
            k: (np.square(found[k]) / R).sum((1, 2)) for k in gradients
        }  # ||G||^2 = R

    frozen = shares(lro.bases.frozen(lro.dominant_svd()))
    # 0.4: of a lag along a singular value of one, 2 * 0.4 is made good at once.
    for rule in (lro.bases.grassmann_track(0.4), lro.bases.grassmann_track(None)):
        for k, share in shares(rule).items():
            # One of R directions moves at a time: each lags R steps, and two more for
            # what a step of 0.8 leaves. cos^2(5 * 0.01) = 0.9975.
            assert share.min() > 0.99, k
            expected = np.cos(angle * np.arange(steps)) ** 2
            # To float32 rounding of R products of 12.
            np.testing.assert_allclose(frozen[k], expected, atol=1e-5)
    assert all(share[-1] < 0.01 for share in frozen.values())


@functools.cache
def tracked(step_size: float | None) -> Any:
    """Bases of 2000 refreshes on white noise: full-size steps for ever."""
    gradients = normal(2000, M, N)
    if step_size is None:
        return walk(lro.bases.grassmann_track(None), gradients).basis
    return _tracked(step_size, gradients)


@jax.jit
def _tracked(step_size: Any, gradients: Any) -> Any:
    rule = lro.bases.grassmann_track(step_size)
    return scanned(rule, gradients, jnp.arange(len(gradients)) >= 0).basis


each_size = pytest.mark.parametrize("step_size", [10.0, 0.05, None])


@each_size
def test_two_thousand_refreshes_stay_orthonormal(step_size: Any) -> None:
    bases = tracked(step_size)
    assert orthonormality_error(bases) < 1e-5
    assert subspace_angles(bases[0], bases[-1]).max() > 0.5


@each_size
def test_only_one_direction_turns_at_a_refresh(step_size: Any) -> None:
    s = np.float64(tracked(step_size)[:100])
    projectors = s @ np.swapaxes(s, -1, -2)
    values = np.linalg.svd(np.diff(projectors, axis=0), compute_uv=False)
    # sin(angle), twice; and then rounding of float32 bases.
    assert values[..., 1].min() > 1e-4
    assert values[..., 2].max() < 2e-6


def test_a_zero_gradient_leaves_the_basis_where_it_is() -> None:
    g = np.concatenate([normal(2, M, N), np.zeros((50, M, N), np.float32)])
    basis = walk(lro.bases.grassmann_track(None), g).basis
    # One Newton-Schulz step off orthonormality, a few eps, and no drift after it.
    np.testing.assert_allclose(basis[2:], basis[1:2].repeat(50, 0), atol=1e-6)


@few
@given(seed=st.integers(0, 2**31), log_scale=st.floats(-12, 12))
def test_the_line_search_finds_the_best_angle(seed: int, log_scale: float) -> None:
    """Whatever the scale: no rotation in the same plane keeps more of the gradient."""
    first, g = normal(2, M, N, seed=seed)
    s, new = _searched(first, g * np.float32(10**log_scale))
    # The plane: the directions of the two projectors that are not common.
    gap = new @ new.T - s @ s.T
    values, vectors = np.linalg.eigh(gap)
    plane = vectors[:, [0, -1]]
    common = s - plane @ (plane.T @ s)
    angles = np.linspace(0, np.pi, 181)
    lines = plane @ np.stack([np.cos(angles), np.sin(angles)])
    best = (np.linalg.norm(lines.T @ g, axis=1) ** 2).max() + _kept(common, g)
    found = np.linalg.norm(new.T @ g) ** 2
    before = np.linalg.norm(s.T @ g) ** 2
    # Half a degree off the best is 1e-4 of the plane's share; rounding is 1e-6.
    assert found >= before * (1 - 1e-6)
    assert found >= best * (1 - 1e-5)
    assert values[-1] > 1e-4  # it did turn


def _kept(common: Any, g: Any) -> float:
    """||P G||^2 for the projector P on the span of `common`, of rank R - 1."""
    u, values, _ = np.linalg.svd(common, full_matrices=False)
    assert values[-1] < 1e-3 < values[-2]
    return float(np.linalg.norm(u[:, :-1].T @ g) ** 2)


@jax.jit
def _two_tracked(g: Any) -> Any:
    return scanned(lro.bases.grassmann_track(None), g, jnp.arange(2) >= 0).basis


def _searched(first: Any, g: Any) -> Any:
    bases = _two_tracked(jnp.stack([first, g]))
    return np.float64(bases)


# ------------------------------------------------------------------ random_after


def test_singular_vectors_before_the_switch_and_random_bases_from_it_on() -> None:
    gradients = normal(8, 2, M, N)
    # Refreshes at 0, 2, 4, 6; the switch falls between two of them.
    found = walk(lro.bases.random_after(3, key=0), gradients, every=2)
    tops = np.asarray(jax.jit(lambda g: leading(g, R))(jnp.asarray(gradients)))
    for t in (0, 2):
        assert same_bits(found.basis[t], tops[t])
    for t in (4, 6):
        for layer in range(2):
            angles = subspace_angles(found.basis[t, layer], tops[t, layer])
            assert angles.max() > 0.1  # smaller in less than 1e-4 of random ones
    assert orthonormality_error(found.basis) < 1e-5
    at_once = walk(lro.bases.random_after(0, key=0), gradients[:1]).basis
    assert not same_bits(at_once[0], tops[0])


def test_late_bases_are_uniform() -> None:
    m, count = 6, 3000
    g = np.zeros((1, count, m, 8))
    s = np.float64(walk(lro.bases.random_after(0, key=0), g, rank=2).basis[0])
    projector = (s @ s.swapaxes(1, 2)).mean(0)
    # Four and a half standard deviations of a diagonal entry, Beta(r/2, (m - r)/2);
    # those beside it have a smaller one.
    deviation = math.sqrt(2 * 2 * (m - 2) / (m**2 * (m + 2)) / count)
    np.testing.assert_allclose(projector, 2 / m * np.eye(m), atol=4.5 * deviation)


# ------------------------------------------------------------------ online_pca


def stream(steps: int) -> Any:
    """An unrelated gradient, then noisy ones of one span; two layers of two scales."""
    rng = np.random.default_rng(7)
    q = np.linalg.qr(rng.normal(size=(M, 2 * R)))[0]
    g = q[:, :R] @ rng.normal(size=(steps, R, N)) + 0.1 * rng.normal(size=(steps, M, N))
    g[0] = q[:, R:] @ rng.normal(size=(R, N))
    return np.stack([g, 100 * g[:, ::-1]], axis=1).astype(np.float32)


@functools.cache
def learned(penalty: float) -> Walk:
    return _learned(penalty, stream(300))


@jax.jit
def _learned(penalty: Any, gradients: Any) -> Any:
    rule = lro.bases.online_pca(optax.adam(0.02), penalty=penalty)
    return scanned(rule, gradients, jnp.arange(len(gradients)) >= 0)


@pytest.mark.parametrize("penalty", [0.0, 10.0])
def test_online_pca_learns_the_span_that_it_did_not_start_in(penalty: float) -> None:
    found, gradients = learned(penalty), stream(300)
    loss, drift = np.asarray(found.state.loss), np.asarray(found.state.drift)
    assert loss.shape == drift.shape == (300, 2)  # each layer's own
    assert loss[0].max() < 0.01  # P_0 is the first gradient's own
    assert loss[1:6].mean(0).min() > 0.5
    # The noise outside any R dimensions is 0.01 (M - R) / (R + 0.01 M), 2 %.
    assert loss[-50:].mean(0).max() < 0.1
    # What it reports is what was used: loss and drift again, in float64.
    for t, layer in itertools.product((0, 1, 5, 50, 299), (0, 1)):
        p, g = np.float64(found.basis[t, layer]), np.float64(gradients[t, layer])
        g /= np.linalg.norm(g)
        # Sums of a few dozen float32 numbers of size one.
        assert abs(loss[t, layer] - np.linalg.norm(p @ (p.T @ g) - g) ** 2) < 2e-5
        assert abs(drift[t, layer] - np.abs(p.T @ p - np.eye(R)).max()) < 2e-6


def test_a_penalty_keeps_the_drift_small() -> None:
    free, kept = (float(np.max(learned(p).state.drift)) for p in (0.0, 10.0))
    assert free > 0.05
    assert kept < 0.5 * free


def test_online_pca_stands_still_at_step_zero() -> None:
    gradients = normal(3, 2, M, N)
    rule = lro.bases.online_pca(optax.adam(0.02))
    found = walk(rule, gradients)
    top = jax.jit(lambda g: leading(g, R))(jnp.asarray(gradients[0]))
    assert same_bits(found.basis[0], top)
    assert same_bits(found.basis[1], top)
    assert same_bits(found.state.basis[0], top)
    counts = optax.tree.get(found.state, "count")
    assert counts.tolist() == [0, 1, 2]  # the optimizer of P took no step at step 0
    assert same_bits(optax.tree.get(found.state, "nu")[0], np.zeros((2, M, R)))
    assert not same_bits(found.basis[2], top)


# ------------------------------------------------------------------ momentum


def fixed_after_another(steps: int) -> Any:
    """One gradient with a gap after its R-th singular value; the first is another."""
    rng = np.random.default_rng(3)
    u, _ = np.linalg.qr(rng.normal(size=(M, M)))
    v, _ = np.linalg.qr(rng.normal(size=(N, M)))
    values = np.array([4.0, 3, 2] + [0.5] * (M - R))
    g = (u * values) @ v.T
    other = rng.normal(size=(M, N))
    gradients = np.stack([other] + [g] * (steps - 1)).astype(np.float32)
    return u[:, :R], gradients


@pytest.mark.parametrize(
    ("rule", "step"),
    [
        (
            lro.bases.power_iterate(b1=B1),
            lro.rotate_moments(optax.scale_by_adam(B1, 0.99)),
        ),
        (
            lro.bases.power_iterate(b1=B1),
            lro.rotate_moments(optax.ema(B1, debias=False)),
        ),
        (
            lro.bases.correlation_aware(recompute_every=2),
            lro.in_subspace(optax.scale_by_adam()),
        ),
    ],
    ids=["power_iterate", "power_iterate with momentum", "correlation_aware"],
)
def test_momentum_bases_converge_to_the_top_of_a_fixed_gradient(
    rule: Any, step: Any
) -> None:
    top, gradients = fixed_after_another(150)
    _, states = updates_of(bracket(rule, step), {"w": gradients})
    bases = np.float64(optax.tree.get(states, "basis")["w"])
    assert subspace_angles(top, bases[0]).max() > 0.3
    # The last recomputation; the momentum of the first gradient is down to 0.9^149.
    # Angles between float32 bases: some 1e-7 times the ratio 4 / (2 - 0.5).
    assert subspace_angles(top, bases[148]).max() < 1e-5


@pytest.mark.parametrize("name", ["power_iterate", "correlation_aware"])
@pytest.mark.parametrize(
    "inner",
    [optax.identity(), optax.scale_by_rms(), optax.scale_by_factored_rms()],
    ids=["identity", "rms", "factored"],
)
def test_they_need_a_first_moment(name: str, inner: Any) -> None:
    tx = bracket(getattr(lro.bases, name)(), lro.in_subspace(inner))
    tree = {"mlp": {"kernel": normal(M, N)}}
    with pytest.raises(
        ValueError, match=rf"mlp/kernel: {name}\(\) follows the first moment"
    ) as caught:
        jax.eval_shape(tx.update, tree, tx.init(tree), tree)
    assert "take optax.scale_by_adam()" in str(caught.value)


@pytest.mark.parametrize(
    "step",
    [
        lro.in_subspace(optax.scale_by_adam()),
        lro.in_subspace(lro.steps.per_matrix(optax.scale_by_adam())),
        lro.in_subspace(optax.chain(optax.trace(0.9), optax.scale(0.5))),
        lro.in_subspace(optax.scale_by_lion()),
        lro.reset_moments(optax.scale_by_adam()),
        lro.rotate_moments(optax.scale_by_adam()),
    ],
    ids=["adam", "per matrix", "trace", "lion", "reset", "rotated"],
)
def test_the_moment_is_found_in_every_step(step: Any) -> None:
    seen = []

    def choose(frame: Frame, *_: Any) -> Any:
        seen.append((frame.path, jnp.shape(frame.momentum)))
        return jnp.eye(*frame.basis_shape[-2:]) + jnp.zeros(frame.basis_shape)

    g = {"a": normal(2, M, N), "b": normal(5), "c": normal(N, M)}
    tx = bracket(lro.basis_rule(choose), step)
    jax.eval_shape(tx.update, g, tx.init(g))
    assert seen == [("a", (2, R, N)), ("c", (1, R, N))]


def test_a_recomputed_basis_is_orthonormal_and_a_stepped_one_is_not() -> None:
    gradients = 100 * normal(10, 2, M, N)  # of loss gradients far above norm one
    s = walk(lro.bases.correlation_aware(0.5, recompute_every=3), gradients).basis
    errors = [float(orthonormality_error(x)) for x in s]
    for t, error in enumerate(errors):
        assert (error < 1e-5) == (t % 3 == 0), (t, error)
        if t % 3:  # a clipped step, by no more than its size; rounding of S - step
            moved = np.linalg.norm(s[t] - s[t - 1], axis=(-2, -1))
            np.testing.assert_allclose(moved, 0.5, rtol=1e-4)


@pytest.mark.parametrize("bad", [0, -1, 2.0, None])
def test_recompute_every_is_a_positive_int(bad: Any) -> None:
    with pytest.raises(ValueError, match="recompute_every must be an int of at least"):
        lro.bases.correlation_aware(recompute_every=bad)


# ------------------------------------------------------------------ when


@pytest.mark.parametrize("rule", [lro.sara_sample(3), lro.bases.coordinates(3)])
def test_a_frozen_basis_is_that_of_step_zero(rule: Any) -> None:
    gradients = jnp.asarray(normal(6, 2, M, N))
    due = jnp.arange(6) % 2 == 0
    found, moving = jax.jit(
        lambda gs: (
            scanned(lro.bases.frozen(rule), gs, due),
            scanned(rule, gs, due).basis,
        )
    )(gradients)
    assert same_bits(found.basis, np.stack([moving[0]] * 6))
    assert same_bits(found.rotation[1:], np.broadcast_to(np.eye(R), (5, 2, R, R)))
    key = found.state.rng_key
    assert bool(jnp.all(key == key[0]))
    assert not same_bits(moving[-1], moving[0])


def counted(rule: Any, asked: list[tuple[str, int]]) -> Any:
    """`rule`, which notes the leaf and the step whenever it is asked for a basis."""

    def choose(frame: Frame, keys: Any, clock: Clock) -> Any:
        def note(step: Any) -> None:
            asked.append((frame.path, int(step)))

        jax.debug.callback(note, clock.step)
        return rule.rule.choose(frame, keys, clock)

    return follow(dataclasses.replace(rule.rule, choose=choose))


def when(asked: list[tuple[str, int]], name: str) -> list[int]:
    """The steps at which a leaf was asked."""
    jax.effects_barrier()
    return sorted(step for path, step in asked if path == name)


def chosen(rows: Any) -> Any:
    """(K, ..., M, R) bases of the given coordinates."""
    return np.swapaxes(np.eye(M, dtype=np.float32)[np.asarray(rows)], -1, -2)


STILL, ACROSS = [0, 1, 2], [3, 4, 5]


def test_a_leaf_that_stands_still_is_asked_less_and_less_and_another_is_not() -> None:
    steps, every = 70, 2
    moving = [STILL, ACROSS] * steps
    given_bases = {"a": chosen([STILL]), "b": chosen(moving), "c": chosen([STILL])}
    asked: list[tuple[str, int]] = []
    rule = lro.bases.lazy_refresh(
        counted(lro.bases.replay(given_bases), asked), window=2
    )
    g = {k: normal(steps, M, N) for k in "abc"} | {"v": normal(steps, 5)}
    _, states = updates_of(bracket(rule, refresh_every=every), g)
    lazy = states.inner_state[0]
    # Similarities at the first two refreshes after step 0 fill the window: from the
    # second on, the interval doubles at each.
    still = [every * k for k in (0, 1, 2, 4, 8, 16, 32)]
    assert when(asked, "a") == when(asked, "c") == still
    assert when(asked, "b") == list(range(0, steps, every))
    for name in g:
        counts = np.diff(lazy.cycle[name], prepend=0)
        assert np.flatnonzero(counts).tolist() == when(asked, name)
    for name, last in (("a", 32), ("b", 1)):
        interval = np.asarray(lazy.interval[name])
        assert interval[-1] == last
        assert (np.diff(interval) >= 0).all()
        assert interval.min() == 1


def model(
    overlaps: Any, window: int, threshold: float
) -> tuple[list[int], int]:  # Q-GaLore, section 3.2, as lazy_refresh writes it
    """When a leaf is asked, and its last interval; it gets row k at refresh k done."""
    interval, wait, seen, asked = 1, 0, [], []
    for t in range(len(overlaps)):
        if wait:
            wait -= 1
            continue
        asked.append(t)
        if t:
            seen.append(overlaps[len(asked) - 2][len(asked) - 1])
            if len(seen) >= window and np.mean(seen[-window:]) >= threshold:
                interval *= 2
        wait = interval - 1
    return asked, interval


@settings(derandomize=True, deadline=None, max_examples=30)
@given(
    rows=st.lists(
        st.sampled_from([[0, 1, 2], [1, 2, 3], [2, 3, 4], [5, 6, 7]]),
        min_size=24,
        max_size=24,
    ),
    # Between the means of three overlaps in thirds, so that rounding does not decide.
    ninths=st.integers(0, 9),
)
def test_lazy_refreshes_are_those_of_its_model(rows: Any, ninths: int) -> None:
    threshold = (ninths - 0.5) / 9
    overlaps = [[len(set(a) & set(b)) / R for b in rows] for a in rows]
    asked, interval = model(overlaps, 3, threshold)
    bases, counts, intervals = _lazily(chosen(rows), threshold)
    assert np.flatnonzero(np.diff(counts, prepend=0)).tolist() == asked
    assert intervals[-1] == interval
    for t in range(len(rows)):
        done = sum(k <= t for k in asked)
        assert same_bits(bases[t], chosen(rows[done - 1]))


@jax.jit
def _lazily(given_bases: Any, threshold: Any) -> Any:
    rule = lro.bases.lazy_refresh(
        lro.bases.replay({"": given_bases}), threshold=threshold, window=3
    )

    def step(state: Any, t: Any) -> Any:
        clock = Clock(step=t, refresh=t >= 0, cycle=t)
        frame, state = rule.update(
            frame_of(jnp.zeros((M, N)), path=""), state, clock=clock
        )
        return state, (frame.basis, state.cycle, state.interval)

    start = rule.init(frame_of(jnp.zeros((M, N)), path=""))
    return jax.lax.scan(step, start, jnp.arange(len(given_bases)))[1]


@pytest.mark.parametrize(("layers", "grows"), [(2, True), (3, False)])
def test_a_stack_has_one_interval_by_the_mean_over_its_layers(
    layers: int, grows: bool
) -> None:
    # One layer stands still: a mean similarity of 1/2 or 1/3 against 0.4.
    steps = 12
    rows = [[STILL] + [[STILL, ACROSS][t % 2]] * (layers - 1) for t in range(steps)]
    # Odd factors, so that a longer interval does not meet the same basis again.
    asked: list[tuple[str, int]] = []
    replayed = counted(lro.bases.replay({"w": chosen(rows)}), asked)
    rule = lro.bases.lazy_refresh(replayed, window=1, factor=3)
    g = {"w": normal(steps, layers, M, N)}
    _, states = updates_of(bracket(rule), g)
    lazy = states.inner_state[0]
    assert lazy.interval["w"].shape == (steps,)
    assert when(asked, "w") == ([0, 1, 4] if grows else list(range(steps)))


@pytest.mark.parametrize(("name", "bad"), [("window", 0), ("factor", 0.5)])
def test_a_window_and_a_factor_are_positive_ints(name: str, bad: Any) -> None:
    arguments: dict[str, Any] = {name: bad}
    with pytest.raises(ValueError, match=f"{name} must be an int of at least 1"):
        lro.bases.lazy_refresh(lro.dominant_svd(), **arguments)


@pytest.mark.parametrize("wrapper", ["lazy_refresh", "frozen"])
def test_a_basis_without_refreshes_has_none_to_put_off(wrapper: str) -> None:
    wrap = getattr(lro.bases, wrapper)
    for rule in (lro.bases.online_pca(), lro.bases.lazy_refresh(lro.dominant_svd())):
        with pytest.raises(
            ValueError,
            match=rf"^{wrapper}\(\) goes around a basis .* online_pca\(\) moves",
        ):
            wrap(rule)


@pytest.mark.parametrize(
    "rule", [lro.bases.gaussian(0), lro.bases.frozen(lro.dominant_svd())]
)
def test_there_is_nothing_to_compare_a_basis_with(rule: Any) -> None:
    with pytest.raises(
        ValueError, match=r"^lazy_refresh\(\) compares a basis with the"
    ):
        lro.bases.lazy_refresh(rule)
