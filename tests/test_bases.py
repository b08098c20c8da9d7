"""The bases of the family: their laws, what they follow, and when they move."""

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
from lowrank_optax.frame import Clock, Frame
from lowrank_optax.linalg import leading, orthonormality_error
from tests.numpy_reference import sample_probabilities

M, N, R, B1 = 8, 12, 3, 0.9
few = settings(derandomize=True, deadline=None, max_examples=20)


def normal(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def frame_of(g: Any, rank: int = R, path: str = "w") -> Frame:
    return Frame(gradient=jnp.asarray(g), rank=rank, path=path, precision=None)


class Walk(NamedTuple):
    """What a rule said at each step, stacked."""

    basis: Any
    turn: Any
    low: Any
    back: Any
    state: Any
    orthonormal: bool


def walk(rule: Any, gradients: Any, every: int = 1, rank: int = R) -> Walk:
    """`rule` alone under lax.scan, next to a first moment that turns with its basis."""
    kinds: set[bool] = set()

    def step(carry: Any, x: Any) -> Any:
        (state, m), (t, g) = carry, x
        clock = Clock(step=t, refresh=t % every == 0, cycle=t // every)
        frame = frame_of(g, rank).replace(momentum=m)
        out, state = rule.update(frame, state, clock=clock)
        kinds.add(out.orthonormal)
        turn = out.still() if out.turn is None else out.turn
        low = out.down(out.gradient)
        moment = B1 * turn @ m + (1 - B1) * low
        return (state, moment), (out.basis, turn, low, out.up(low), state)

    @jax.jit
    def run(gs: Any) -> Any:
        first = frame_of(gs[0], rank)
        start = (rule.init(first), jnp.zeros(first.low_shape, first.gradient.dtype))
        return jax.lax.scan(step, start, (jnp.arange(len(gs)), gs))[1]

    return Walk(*run(jnp.asarray(gradients)), *kinds)


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
        updates, state = tx.update(g, state)
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
    "coordinates": lambda key: lro.coordinates(key),
    "ascending": lambda _: lro.coordinates(order="ascending"),
    "sample_rows": lambda key: lro.sample_rows(key),
    "gaussian": lambda key: lro.gaussian(key),
    "gaussian stored": lambda key: lro.gaussian(key, stored=True),
    "track": lambda _: lro.grassmann_track(),
    "track by line search": lambda _: lro.grassmann_track(None),
    "random_after": lambda key: lro.random_after(2, key),
    "online_pca": lambda _: lro.online_pca(),
    "power_iterate": lambda _: lro.power_iterate(b1=B1),
    "correlation_aware": lambda _: lro.correlation_aware(recompute_every=3),
    "frozen": lambda key: lro.frozen(lro.sara_sample(key)),
    "lazy": lambda key: lro.lazy_refresh(lro.sara_sample(key), window=1),
    "4 bits": lambda key: lro.quantize_basis(lro.sara_sample(key)),
}
DRAWN = {
    "coordinates",
    "sample_rows",
    "gaussian",
    "gaussian stored",
    "random_after",
    "frozen",
    "lazy",
    "4 bits",
}
each_rule = pytest.mark.parametrize("rule", RULES)

KINDS = {
    "any": normal(M, N),
    "zero": np.zeros((M, N), np.float32),
    "rank one": np.ones((M, N), np.float32),
    "rank two": normal(M, 2) @ normal(2, N, seed=1),
    "steep": (normal(M, M) * 10.0 ** -np.arange(M)).astype(np.float32) @ normal(M, N),
    "one entry": np.eye(M, N, dtype=np.float32) * (np.arange(M) == 2)[:, None],
    "tiny": np.float32(1e-12) * normal(M, N),
    "large": np.float32(1e12) * normal(M, N),
}


@each_rule
def test_any_gradient_gives_a_basis(rule: str) -> None:
    kinds = list(KINDS.values())
    # Each kind first, and each after the others: one order per layer.
    orders = np.stack([kinds[i:] + kinds[:i] for i in range(len(kinds))], axis=1)
    found = walk(RULES[rule](1), orders)
    assert np.isfinite(found.turn).all()
    assert np.isfinite(found.low).all()
    if np.issubdtype(found.basis.dtype, np.integer):
        assert found.basis.shape == (len(kinds), len(kinds), R)
        assert (np.diff(found.basis) > 0).all()  # distinct, sorted rows
        assert found.basis.min() >= 0
        assert found.basis.max() < M
    elif found.orthonormal:
        # A few tens of float32 roundings, as what `orthonormalize` lets pass.
        assert orthonormality_error(found.basis) < 1e-5
    else:
        assert np.isfinite(found.basis).all()


def test_which_rules_promise_an_orthonormal_basis() -> None:
    g = normal(1, M, N)
    loose = {name for name in RULES if not walk(RULES[name](1), g).orthonormal}
    assert loose == {
        "gaussian",
        "gaussian stored",
        "online_pca",
        "correlation_aware",
        "4 bits",
    }


@each_rule
def test_the_key_decides_the_draw_and_nothing_else_does(rule: str) -> None:
    gradients = normal(5, 2, M, N)
    first, again, other = (walk(RULES[rule](key), gradients) for key in (1, 1, 2))
    assert same_bits(first.basis, again.basis)
    assert same_bits(first.turn, again.turn)
    assert same_bits(first.basis, other.basis) == (rule not in DRAWN)
    # Layers of a stack, which have gradients of their own, draw apart.
    assert not same_bits(first.basis[:, 0], first.basis[:, 1]) or rule == "ascending"


@each_rule
def test_the_turn_is_that_of_the_bases(rule: str) -> None:
    """And the basis stands still, to the bit, between refreshes."""
    found = walk(RULES[rule](1), normal(7, M, N), every=3)
    if rule == "online_pca":  # moves at every step, and says no turn
        return
    dense = found.basis
    if np.issubdtype(dense.dtype, np.integer):
        dense = np.swapaxes(np.eye(M)[dense], -1, -2)
    for t in range(1, 7):
        if t % 3:
            assert same_bits(found.basis[t], found.basis[t - 1])
            assert same_bits(found.turn[t], np.eye(R))
        else:
            expected = np.float64(dense[t]).T @ np.float64(dense[t - 1])
            # Float32 rounding of sums of M products, of entries up to about 3.
            np.testing.assert_allclose(found.turn[t], expected, atol=1e-5)


# ------------------------------------------------------------------ gaussian


@pytest.mark.parametrize("every", [1, 3])
def test_redrawn_and_stored_projections_are_the_same_bits(every: int) -> None:
    gradients = normal(7, 2, M, N)
    drawn = walk(lro.gaussian(5), gradients, every)
    stored = walk(lro.gaussian(5, stored=True), gradients, every)
    assert same_bits(drawn.basis, stored.basis)
    # The turn of step 0, from no basis at all, is never used.
    assert same_bits(drawn.turn[1:], stored.turn[1:])
    assert same_bits(drawn.low, stored.low)
    assert same_bits(drawn.back, stored.back)
    for t in range(1, 7):
        assert same_bits(drawn.basis[t], drawn.basis[t - 1]) == (t % every != 0)


def test_a_whole_optimizer_cannot_tell_which_is_stored() -> None:
    gradients = {"w": normal(7, 2, M, N), "b": normal(7, 5)}
    step = lro.rotate_moments(optax.ema(0.9))
    drawn, stored = (
        updates_of(
            bracket(lro.gaussian(5, stored=kept), step, refresh_every=2), gradients
        )[0]
        for kept in (False, True)
    )
    jax.tree.map(np.testing.assert_array_equal, drawn, stored)


def test_outside_of_scan_too() -> None:
    """Step by step, compiled and not, from a state that went through the host."""
    gradients, bits = normal(4, M, N), []
    for jit in (jax.jit, lambda f: f):
        tx = bracket(lro.gaussian(5), refresh_every=2)
        state, update = tx.init({"w": gradients[0]}), jit(tx.update)
        for g in gradients:
            updates, state = update({"w": jnp.asarray(g)}, state)
        bits.append(updates["w"])
    scanned = updates_of(bracket(lro.gaussian(5), refresh_every=2), {"w": gradients})
    for last in bits:
        # A product of 3 and one of 8 terms of size about 10, in float32.
        np.testing.assert_allclose(last, scanned[0]["w"][-1], rtol=0, atol=2e-5)


def test_the_state_of_a_gaussian_is_two_keys() -> None:
    state = lro.gaussian(0).init({"a": frame_of(normal(M, N)), "b": jnp.ones(5)})
    assert [x.size for x in jax.tree.leaves(state)] == [1, 1]
    stored = lro.gaussian(0, stored=True).init({"a": frame_of(normal(M, N))})
    assert max(x.size for x in jax.tree.leaves(stored)) == M * R


@pytest.mark.parametrize("rank", [1, 4])
def test_entries_are_normal_with_variance_one_over_r(rank: int) -> None:
    layers = 2000
    basis = walk(lro.gaussian(3), np.zeros((1, layers, M, N)), rank=rank).basis[0]
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
    first = walk(lro.gaussian(3), np.zeros((3, 2, M, N))).basis
    apart = [*first.reshape(-1, M, R)]
    rule = lro.gaussian(3)
    other = frame_of(np.zeros((M, N)), path="v")
    zero = jnp.zeros([], jnp.int32)
    clock = Clock(step=zero, refresh=zero == 0, cycle=zero)
    apart.append(rule.update(other, rule.init(other), clock=clock)[0].basis)
    for x, y in itertools.combinations(apart, 2):
        assert not same_bits(x, y)


# ------------------------------------------------------------------ coordinates


def test_random_rows_are_uniform_without_replacement() -> None:
    layers, m, r = 4000, 6, 2
    rows = walk(lro.coordinates(0), np.zeros((1, layers, m, 7)), rank=r).basis[0]
    assert rows.shape == (layers, r)
    assert rows.dtype == jnp.int32
    assert (np.diff(rows) > 0).all()
    pairs, counts = np.unique(rows, axis=0, return_counts=True)
    assert len(pairs) == math.comb(m, r)
    # Four and a half standard deviations of a frequency, on a fixed seed.
    p = 1 / math.comb(m, r)
    assert np.abs(counts / layers - p).max() < 4.5 * math.sqrt(p * (1 - p) / layers)


@few
@given(
    m=st.integers(2, 9),
    data=st.data(),
    order=st.sampled_from(["ascending", "descending"]),
)
def test_rows_in_turn_are_all_covered_and_then_begin_again(
    m: int, data: Any, order: Any
) -> None:
    r = data.draw(st.integers(1, m - 1))
    rule, blocks = lro.coordinates(order=order), -(-m // r)
    frame = frame_of(np.zeros((m, 10)), rank=r)
    state, seen = rule.init(frame), []
    for cycle in range(2 * blocks):
        now = jnp.asarray(cycle, jnp.int32)
        clock = Clock(step=now, refresh=now >= 0, cycle=now)
        out, state = rule.update(frame, state, clock=clock)
        seen.append(np.asarray(out.basis))
    for rows in seen:
        assert same_bits(rows, rows[0] + np.arange(r))  # r neighbours
        assert 0 <= rows[0] <= m - r
    assert set(np.concatenate(seen[:blocks])) == set(range(m))
    for first, second in zip(seen[:blocks], seen[blocks:], strict=True):
        assert same_bits(first, second)
    assert seen[0][0] == (0 if order == "ascending" else m - r)


@few
@given(seed=st.integers(0, 2**31), k=st.integers(1, 6))
def test_gather_and_scatter_are_products_with_unit_columns(seed: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    rows = np.stack([np.sort(rng.choice(M, R, replace=False)) for _ in range(4)])
    rows = rows.reshape(2, 2, R)
    dense = np.swapaxes(np.eye(M, dtype=np.float32)[rows], -1, -2)
    frame = frame_of(np.zeros((2, 2, M, N), np.float32))
    sparse = frame.replace(basis=jnp.asarray(rows))
    full = frame.replace(basis=jnp.asarray(dense))
    x, y = normal(2, 2, M, k, seed=seed), normal(2, 2, R, k, seed=seed)
    # Sums with all terms but one zero are exact: bit for bit.
    assert same_bits(sparse.down(x), full.down(x))
    assert same_bits(sparse.up(y), full.up(y))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize(
    "rule", [lro.coordinates(order="ascending"), lro.sample_rows(0)]
)
def test_a_nan_in_a_row_that_is_not_taken_skips_the_step(rule: Any, bad: float) -> None:
    tx = bracket(rule, lro.in_subspace(optax.scale_by_adam()), refresh_every=9)
    g = normal(M, N)
    g[M - 1] *= 1e-6  # no row that sample_rows would take
    _, state = tx.update({"w": g}, tx.init({"w": g}))
    assert M - 1 not in optax.tree.get(state, "basis")["w"]
    g[M - 1, 2] = bad
    updates, after = jax.jit(tx.update)({"w": g}, state)
    assert same_bits(updates["w"], np.zeros((M, N)))
    assert (after.count, after.skipped) == (1, 1)
    jax.tree.map(
        np.testing.assert_array_equal, after.inner_state, state.inner_state
    )  # no rule here but coordinates(order=...) is without a key


def test_layers_take_turns() -> None:
    """FRUGAL's block-wise mode: Adam on one layer of four, signs on the others."""
    layers, steps, every = 4, 12, 3
    g = {"mlp": {"kernel": normal(steps, layers, M, N)}}
    tx = lro.frugal(
        -1.0,
        rank=0.25,
        refresh_every=every,
        basis=lro.coordinates(order="descending"),
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
    rows = walk(lro.sample_rows(0), g, rank=2).basis[0]
    pairs = [tuple(x) for x in np.asarray(rows).tolist()]
    for pair, p in sample_probabilities(norms).items():
        # Four and a half standard deviations of a frequency, on fixed seeds.
        bound = 4.5 * math.sqrt(p * (1 - p) / count)
        assert abs(pairs.count(pair) / count - p) < bound, (pair, p)


def test_zero_rows_come_last_and_the_first_of_them_fill_up() -> None:
    g = np.zeros((1, 200, M, N), np.float32)
    g[..., [3, 6], :] = normal(2, N)
    g[..., 6, :] *= 1e-6
    rows = walk(lro.sample_rows(0), g).basis[0]
    assert same_bits(rows, np.tile([0, 3, 6], (200, 1)))
    none = walk(lro.sample_rows(0), np.zeros((1, 200, M, N))).basis[0]
    assert same_bits(np.unique(none), np.arange(M))  # all zero: any of them


# ------------------------------------------------------------------ tracking


def turning(shape: tuple[int, int], steps: int, angle: float) -> Any:
    """Gradients of rank R whose span turns by `angle` a step, out of where it was."""
    m, n = shape
    rng = np.random.default_rng(m)
    q = np.linalg.qr(rng.normal(size=(m, 2 * R)))[0]
    t = angle * np.arange(steps)[:, None, None]
    span = np.cos(t) * q[:, :R] + np.sin(t) * q[:, R:]
    # Singular values of one, in other directions each time.
    right = np.linalg.qr(rng.normal(size=(steps, n, R)))[0]
    return (span @ np.swapaxes(right, 1, 2)).astype(np.float32)


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

    frozen = shares(lro.frozen(lro.dominant_svd()))
    # 0.4: of a lag along a singular value of one, 2 * 0.4 is made good at once.
    for rule in (lro.grassmann_track(0.4), lro.grassmann_track(None)):
        for k, share in shares(rule).items():
            # One of R directions moves at a time: each lags R steps, and two more for
            # what a step of 0.8 leaves. cos^2(5 * 0.01) = 0.9975.
            assert share.min() > 0.99, k
            expected = np.cos(angle * np.arange(steps)) ** 2
            # To float32 rounding of R products of 12.
            np.testing.assert_allclose(frozen[k], expected, atol=1e-5)
    assert all(share[-1] < 0.01 for share in frozen.values())


@pytest.mark.parametrize("step_size", [10.0, 0.05, None])
def test_two_thousand_refreshes_stay_orthonormal(step_size: Any) -> None:
    # White noise: full-size steps in random directions, for ever.
    found = walk(lro.grassmann_track(step_size), normal(2000, M, N))
    assert orthonormality_error(found.basis) < 1e-5
    assert subspace_angles(found.basis[0], found.basis[-1]).max() > 0.5


@pytest.mark.parametrize("step_size", [0.05, None])
def test_only_one_direction_turns_at_a_refresh(step_size: Any) -> None:
    s = np.float64(walk(lro.grassmann_track(step_size), normal(20, 2, M, N)).basis)
    projectors = s @ np.swapaxes(s, -1, -2)
    values = np.linalg.svd(np.diff(projectors, axis=0), compute_uv=False)
    # sin(angle), twice; and then rounding of float32 bases.
    assert values[..., 1].min() > 1e-3
    assert values[..., 2].max() < 2e-6


def test_a_zero_gradient_leaves_the_basis_where_it_is() -> None:
    for step_size in (10.0, None):
        g = np.concatenate([normal(2, M, N), np.zeros((50, M, N), np.float32)])
        basis = walk(lro.grassmann_track(step_size), g).basis
        # One Newton-Schulz step off orthonormality, a few eps, and no drift after it.
        np.testing.assert_allclose(basis[2:], basis[1:2].repeat(50, 0), atol=1e-6)


@few
@given(seed=st.integers(0, 2**31), log_scale=st.floats(-6, 6))
def test_the_line_search_finds_the_best_angle(seed: int, log_scale: float) -> None:
    """Whatever the scale: no rotation in the same plane keeps more of the gradient."""
    first, g = normal(2, M, N, seed=seed)
    s, new = _searched(first, g * np.float32(10**log_scale))
    # The plane: the directions of the two projectors that are not common.
    gap = new @ new.T - s @ s.T
    values, vectors = np.linalg.eigh(gap)
    plane = vectors[:, [0, -1]]
    common = s - plane @ (plane.T @ s)
    kept = np.linalg.norm(common.T @ g) ** 2
    angles = np.linspace(0, np.pi, 181)
    lines = plane @ np.stack([np.cos(angles), np.sin(angles)])
    best = (np.linalg.norm(lines.T @ g, axis=1) ** 2).max() + _kept(common, g)
    del kept
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
    return walk(lro.grassmann_track(None), g).basis


def _searched(first: Any, g: Any) -> Any:
    bases = _two_tracked(jnp.stack([first, g]))
    return np.float64(bases)


# ------------------------------------------------------------------ random_after


def test_singular_vectors_before_the_switch_and_random_bases_from_it_on() -> None:
    gradients = normal(8, 2, M, N)
    # Refreshes at 0, 2, 4, 6; the switch falls between two of them.
    found = walk(lro.random_after(3, key=0), gradients, every=2)
    tops = np.asarray(jax.jit(lambda g: leading(g, R))(jnp.asarray(gradients)))
    for t in (0, 2):
        assert same_bits(found.basis[t], tops[t])
    for t in (4, 6):
        for layer in range(2):
            angles = subspace_angles(found.basis[t, layer], tops[t, layer])
            assert angles.max() > 0.1  # smaller in less than 1e-4 of random ones
    assert orthonormality_error(found.basis) < 1e-5
    at_once = walk(lro.random_after(0, key=0), gradients[:1]).basis
    assert not same_bits(at_once[0], tops[0])


def test_late_bases_are_uniform() -> None:
    m, count = 6, 3000
    g = np.tile(np.eye(m, 8, dtype=np.float32), (2, count, 1, 1))
    s = np.float64(walk(lro.random_after(1, key=0), g, rank=2).basis[1])
    projector = (s @ s.swapaxes(1, 2)).mean(0)
    # Four and a half standard deviations of a diagonal entry, Beta(r/2, (m - r)/2);
    # those beside it have a smaller one.
    deviation = math.sqrt(2 * 2 * (m - 2) / (m**2 * (m + 2)) / count)
    np.testing.assert_allclose(projector, 2 / m * np.eye(m), atol=4.5 * deviation)


# ------------------------------------------------------------------ online_pca


def stream(steps: int) -> Any:
    """An unrelated gradient, then noisy ones of one span."""
    rng = np.random.default_rng(7)
    q = np.linalg.qr(rng.normal(size=(M, 2 * R)))[0]
    g = q[:, :R] @ rng.normal(size=(steps, R, N)) + 0.1 * rng.normal(size=(steps, M, N))
    g[0] = q[:, R:] @ rng.normal(size=(R, N))
    return g.astype(np.float32)


@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_online_pca_learns_the_span_that_it_did_not_start_in(penalty: float) -> None:
    rule = lro.online_pca(optax.adam(0.02), penalty=penalty)
    gradients = stream(300)
    found = walk(rule, gradients)
    loss = found.state.loss
    assert loss[0] < 0.01  # P_0 is the first gradient's own
    assert loss[1:6].mean() > 0.5
    # Noise of 0.1 leaves (M - R) M 0.01 of R M ... about 2 % outside any R dimensions.
    assert loss[-50:].mean() < 0.1
    # What it reports is what was used: the loss and the drift, in float64.
    for t in (0, 1, 5, 50, 299):
        p = np.float64(found.basis[t])
        g = np.float64(gradients[t]) / np.linalg.norm(gradients[t])
        # Sums of a few dozen float32 numbers of size one.
        true = np.linalg.norm(p @ (p.T @ g) - g) ** 2
        assert abs(loss[t] - true) < 2e-5
        drift = np.abs(p.T @ p - np.eye(R)).max()
        assert abs(found.state.drift[t] - drift) < 2e-6


def test_a_penalty_keeps_the_drift_small() -> None:
    drift = {
        penalty: np.max(
            walk(
                lro.online_pca(optax.adam(0.02), penalty=penalty), stream(300)
            ).state.drift
        )
        for penalty in (0.0, 10.0)
    }
    assert drift[0.0] > 0.05
    assert drift[10.0] < 0.5 * drift[0.0]


def test_online_pca_stands_still_at_step_zero() -> None:
    gradients = normal(3, 2, M, N)
    rule = lro.online_pca(optax.adam(0.02))
    found = walk(rule, gradients)
    top = jax.jit(lambda g: leading(g, R))(jnp.asarray(gradients[0]))
    assert same_bits(found.basis[0], top)
    assert same_bits(found.basis[1], top)
    assert same_bits(found.state.basis[0], top)
    counts = optax.tree.get(found.state, "count")
    assert counts.tolist() == [0, 1, 2]  # the optimizer of P took no step at step 0
    assert same_bits(optax.tree.get(found.state, "nu")[0], np.zeros((2, M, R)))
    assert not same_bits(found.basis[2], top)
    # Layers learn one by one.
    alone = walk(rule, gradients[:, 1])
    # Adam's first step is the gradient's sign: not where it is rounding, and no such
    # entry is met here; float32 sums of a batch may be in another order.
    np.testing.assert_allclose(found.basis[2][1], alone.basis[2], atol=1e-5)


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
            lro.power_iterate(b1=B1),
            lro.rotate_moments(optax.scale_by_adam(B1, 0.99)),
        ),
        (lro.power_iterate(b1=B1), lro.rotate_moments(optax.ema(B1, debias=False))),
        (
            lro.correlation_aware(recompute_every=2),
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
    tx = bracket(getattr(lro, name)(), lro.in_subspace(inner))
    tree = {"mlp": {"kernel": normal(M, N)}}
    with pytest.raises(
        ValueError, match=rf"mlp/kernel: {name}\(\) follows the first moment"
    ) as caught:
        tx.update(tree, tx.init(tree), tree)
    assert "take optax.scale_by_adam()" in str(caught.value)


@pytest.mark.parametrize(
    "step",
    [
        lro.in_subspace(optax.scale_by_adam()),
        lro.in_subspace(optax.scale_by_adam(), per_matrix=True),
        lro.in_subspace(optax.chain(optax.trace(0.9), optax.scale(0.5))),
        lro.in_subspace(optax.scale_by_lion()),
        lro.reset_moments(optax.scale_by_adam()),
        lro.rotate_moments(optax.scale_by_adam()),
    ],
    ids=["adam", "per matrix", "trace", "lion", "reset", "rotated"],
)
def test_the_moment_is_found_in_every_step(step: Any) -> None:
    g = {"a": normal(2, M, N), "b": normal(5), "c": normal(N, M)}
    tx = bracket(lro.power_iterate(), step, refresh_every=2)
    updates, _ = updates_of(tx, jax.tree.map(lambda x: np.stack([x] * 4), g))
    assert all(np.isfinite(u).all() for u in jax.tree.leaves(updates))


def test_a_recomputed_basis_is_orthonormal_and_a_stepped_one_is_not() -> None:
    found = walk(lro.correlation_aware(0.5, recompute_every=3), normal(10, 2, M, N))
    errors = [float(orthonormality_error(s)) for s in found.basis]
    for t, error in enumerate(errors):
        assert (error < 1e-5) == (t % 3 == 0), (t, error)


def test_a_clipped_step_moves_by_no_more_than_its_size() -> None:
    gradients = 100 * normal(6, 2, M, N)  # gradients of the loss far above norm one
    s = walk(lro.correlation_aware(0.1, recompute_every=100), gradients).basis
    moved = np.linalg.norm(np.diff(s, axis=0), axis=(-2, -1))
    np.testing.assert_allclose(moved, 0.1, rtol=1e-4)  # rounding of S - step


@pytest.mark.parametrize("bad", [0, -1, 2.0, None])
def test_recompute_every_is_a_positive_int(bad: Any) -> None:
    with pytest.raises(ValueError, match="recompute_every must be an int of at least"):
        lro.correlation_aware(recompute_every=bad)


# ------------------------------------------------------------------ when


@pytest.mark.parametrize(
    "rule",
    [lro.dominant_svd(), lro.sara_sample(3), lro.grassmann_walk(3), lro.coordinates(3)],
    ids=["svd", "sara", "walk", "coordinates"],
)
def test_a_frozen_basis_is_that_of_step_zero(rule: Any) -> None:
    gradients = normal(6, 2, M, N)
    found, moving = walk(lro.frozen(rule), gradients, 2), walk(rule, gradients, 2)
    assert same_bits(found.basis[0], moving.basis[0])
    for t in range(1, 6):
        assert same_bits(found.basis[t], found.basis[0])
        assert same_bits(found.turn[t], np.broadcast_to(np.eye(R), (2, R, R)))
    key = found.state.rng_key
    assert key is None or bool(jnp.all(key == key[0]))
    assert not same_bits(moving.basis[-1], moving.basis[0])


class _Counted(NamedTuple):
    asked: Any
    state: Any


def counted(rule: Any) -> Any:
    """`rule`, which counts how often it was asked for a new basis."""

    def init(params: Any) -> Any:
        return _Counted(jnp.zeros([], jnp.int32), rule.init(params))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        updates, new = rule.update(updates, state.state, params, **extra)
        return updates, _Counted(state.asked + extra["clock"].refresh, new)

    return optax.GradientTransformationExtraArgs(init, update)


def chosen(rows: Any) -> Any:
    """(K, ..., M, R) bases of the given coordinates."""
    return np.swapaxes(np.eye(M, dtype=np.float32)[np.asarray(rows)], -1, -2)


STILL, ACROSS = [0, 1, 2], [3, 4, 5]


def test_a_leaf_that_stands_still_is_asked_less_and_less_and_another_is_not() -> None:
    steps, every = 70, 2
    moving = [STILL, ACROSS] * steps
    given_bases = {"a": chosen([STILL]), "b": chosen(moving), "c": chosen([STILL])}
    rule = lro.lazy_refresh(counted(lro.replay(given_bases)), window=2)
    g = {k: normal(steps, M, N) for k in "abc"} | {"v": normal(steps, 5)}
    _, states = updates_of(bracket(rule, refresh_every=every), g)
    lazy = states.inner_state[0]

    def asked(name: str) -> list[int]:
        counts = np.diff(lazy.rule_state[name].asked, prepend=0)
        return np.flatnonzero(counts).tolist()

    # Similarities at the first two refreshes after step 0 fill the window: from the
    # second on, the interval doubles at each.
    still = [every * k for k in (0, 1, 2, 4, 8, 16, 32)]
    assert asked("a") == asked("c") == still
    assert asked("b") == list(range(0, steps, every))
    for name, last in (("a", 32), ("b", 1)):
        interval = np.asarray(lazy.interval[name])
        assert interval[-1] == last
        assert (np.diff(interval) >= 0).all()
        assert interval.min() == 1


def model(
    overlaps: Any, window: int, threshold: float
) -> tuple[list[int], int]:  # Q-GaLore, section 3.2, as lazy_refresh writes it
    """When a leaf is asked, and its last interval."""
    interval, wait, seen, asked, last = 1, 0, [], [], None
    for t in range(len(overlaps)):
        if wait:
            wait -= 1
            continue
        asked.append(t)
        if last is not None:
            seen.append(overlaps[last][t])
            if len(seen) >= window and np.mean(seen[-window:]) >= threshold:
                interval *= 2
        last, wait = t, interval - 1
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
        last = max(k for k in asked if k <= t)
        assert same_bits(bases[t], chosen(rows[last]))


@jax.jit
def _lazily(given_bases: Any, threshold: Any) -> Any:
    rule = lro.lazy_refresh(
        counted(lro.replay({"": given_bases})), threshold=threshold, window=3
    )

    def step(state: Any, t: Any) -> Any:
        clock = Clock(step=t, refresh=t >= 0, cycle=t)
        frame, state = rule.update(
            frame_of(jnp.zeros((M, N)), path=""), state, clock=clock
        )
        return state, (frame.basis, state.rule_state.asked, state.interval)

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
    rule = lro.lazy_refresh(
        counted(lro.replay({"w": chosen(rows)})), window=1, factor=3
    )
    g = {"w": normal(steps, layers, M, N)}
    _, states = updates_of(bracket(rule), g)
    lazy = states.inner_state[0]
    assert lazy.interval["w"].shape == (steps,)
    asked = np.flatnonzero(np.diff(lazy.rule_state["w"].asked, prepend=0)).tolist()
    assert asked == ([0, 1, 4] if grows else list(range(steps)))


@pytest.mark.parametrize(("name", "bad"), [("window", 0), ("factor", 0.5)])
def test_a_window_and_a_factor_are_positive_ints(name: str, bad: Any) -> None:
    arguments: dict[str, Any] = {name: bad}
    with pytest.raises(ValueError, match=f"{name} must be an int of at least 1"):
        lro.lazy_refresh(lro.dominant_svd(), **arguments)
