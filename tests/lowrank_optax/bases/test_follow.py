"""Bases: orthonormal for ever, refreshed on time, drawn from the stated laws."""

import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.linalg import subspace_angles
from scipy.stats import chi2

import lowrank_optax as lro
from lowrank_optax.bases.grassmann import geodesic
from lowrank_optax.core.linalg import leading, left_singular, orthonormality_error

M, N, R = 8, 12, 3

RULES = {
    "dominant_svd": lambda: lro.dominant_svd(),
    "dominant_svd gram": lambda: lro.dominant_svd(decomposition="gram"),
    "dominant_svd randomized": lambda: lro.dominant_svd(
        decomposition="randomized", key=1
    ),
    "sara_sample": lambda: lro.sara_sample(key=1),
    "sara_sample gram": lambda: lro.sara_sample(key=1, decomposition="gram"),
    "grassmann_walk": lambda: lro.grassmann_walk(key=1, angle=0.3, walk_rank=None),
    "grassmann_walk of rank one": lambda: lro.grassmann_walk(key=1),
    "grassmann_jump": lambda: lro.grassmann_jump(key=1),
}
each_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


def bracket(rule, *, rank=R, refresh_every=1, dimension_numbers=lro.STACKED):
    """The least chain around a basis rule: its update is S S^T G."""
    stages = optax.chain(
        rule, lro.project(), lro.in_subspace(optax.identity()), lro.project_back()
    )
    return lro.low_rank(
        stages,
        rank=rank,
        refresh_every=refresh_every,
        dimension_numbers=dimension_numbers,
    )


def bases_of(state):
    return optax.tree.get(state, "basis")


def gaussian(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def run(tx, gradients):
    """The bases after each step of a (K, ...) stack of gradients."""

    def step(state, g):
        _, state = tx.update({"w": g}, state)
        return state, bases_of(state)["w"]

    return jax.jit(
        lambda gs: jax.lax.scan(step, tx.init({"w": gs[0]}), gs)[1],
    )(gradients)


# --- orthonormality ---


@each_rule
def test_orthonormal_for_every_gradient(rule):
    tail = gaussian(M, M) * 10.0 ** -jnp.arange(M)  # condition 1e7 and worse
    kinds = [
        gaussian(M, N),
        jnp.zeros((M, N)),
        jnp.ones((M, N)),
        tail @ gaussian(M, N, seed=1),
        jnp.zeros((M, N)).at[2, 3].set(1.0),
        1e-30 * gaussian(M, N),
        1e30 * gaussian(M, N),
    ]
    # Each kind first, and each after the others.
    orders = [kinds[i:] + kinds[:i] for i in range(len(kinds))]
    bases = run(bracket(rule()), jnp.stack([jnp.stack(o) for o in orders], axis=1))
    assert bases.shape == (len(kinds), len(kinds), M, R)
    assert orthonormality_error(bases) < 1e-5


def test_five_thousand_walks_stay_orthonormal():
    def one(s, key):
        s = geodesic(s, jax.random.normal(key, s.shape), 0.3)
        return s, orthonormality_error(s)

    # At 24 of 32 directions the error without a correction is 13 after these steps.
    s = jnp.linalg.qr(gaussian(2, 32, 24))[0]
    keys = jax.random.split(jax.random.key(0), 5000)
    end, errors = jax.jit(lambda: jax.lax.scan(one, s, keys))()
    assert errors.max() < 2e-6  # a few eps: rounding does not add up
    # It has gone somewhere: the start's directions are no longer in the span.
    assert subspace_angles(s[0], end[0]).max() > 1


@pytest.mark.parametrize("walk_rank", [1, None])
def test_a_walk_of_the_stage_stays_orthonormal(walk_rank):
    gradients = jnp.broadcast_to(gaussian(M, N), (500, M, N))
    bases = run(bracket(lro.grassmann_walk(key=0, walk_rank=walk_rank)), gradients)
    assert orthonormality_error(bases) < 1e-5
    assert subspace_angles(bases[0], bases[-1]).max() > 1


# --- the walk ---


@pytest.mark.parametrize("rank", [None, 6, 2, 1])
@pytest.mark.parametrize("angle", [1e-3, 0.3, 1.0, math.pi / 2])
def test_the_walk_turns_by_its_angle(angle, rank):
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        s = jnp.asarray(np.linalg.qr(rng.normal(size=(5, 20, 6)))[0])
        x = jnp.asarray(rng.normal(size=s.shape))
        new = geodesic(s, x, angle, rank)
        assert orthonormality_error(new) < 1e-14
        for a, b, direction in zip(s, new, x, strict=True):
            angles = np.sort(subspace_angles(a, b))
            # Rounding in angles of float64 subspaces; near pi / 2 scipy's are arcsines.
            assert abs(angles[-1] - angle) < 1e-7
            # The others are in the ratio of the tangent's singular values, and those
            # under its `rank` largest stand still.
            tangent = direction - a @ (a.T @ direction)
            sigma = np.linalg.svd(tangent, compute_uv=False)[::-1]
            expected = angle * sigma / sigma[-1]
            expected[: 6 - (rank or 6)] = 0
            np.testing.assert_allclose(angles, expected, atol=1e-7)


@pytest.mark.parametrize("rank", [None, 2, 1])
def test_the_walk_is_equation_4(rank):
    with jax.enable_x64(True):
        rng = np.random.default_rng(1)
        s = np.linalg.qr(rng.normal(size=(20, 6)))[0]
        x = rng.normal(size=s.shape)
        tangent = x - s @ (s.T @ x)
        u, sigma, vt = np.linalg.svd(tangent / np.linalg.norm(tangent, 2), False)
        u, sigma, vt = u[:, :rank], sigma[:rank], vt[:rank]
        eta = 0.3
        expected = (
            s @ vt.T @ np.diag(np.cos(sigma * eta)) @ vt
            + u @ np.diag(np.sin(sigma * eta)) @ vt
            + s @ (np.eye(6) - vt.T @ vt)
        )
        new = geodesic(jnp.asarray(s), jnp.asarray(x), eta, rank)
        np.testing.assert_allclose(new, expected, atol=1e-13)  # float64 rounding


def test_a_walk_of_length_zero_stays():
    s = jnp.linalg.qr(gaussian(M, R))[0]
    walk = jax.jit(geodesic, static_argnames="rank")
    for x, eta in [(gaussian(M, R), 0.0), (jnp.zeros((M, R)), 0.3)]:
        for rank in (None, 1):
            # Rounding of the products alone, a few eps.
            np.testing.assert_allclose(walk(s, x, eta, rank=rank), s, atol=1e-6)


@pytest.mark.parametrize("rank", [None, 1])
@pytest.mark.parametrize("outside", [0.0, 1e-7, 1e-6, 1e-5, 1e-3])
def test_a_walk_along_the_span_itself_is_orthonormal(outside, rank):
    """What is left of such a direction after (I - S S^T) is rounding for a good part,
    which is not tangent, and is then scaled up to unit norm."""
    s = jnp.linalg.qr(gaussian(M, R))[0]
    x = s @ gaussian(R, R, seed=1) + outside * gaussian(M, R, seed=2)
    walk = jax.jit(geodesic, static_argnames="rank")
    assert orthonormality_error(walk(s, x, 0.3, rank=rank)) < 1e-5


@pytest.mark.parametrize("walk_rank", [None, 1, 2])
@pytest.mark.parametrize("angle", [0.0, 0.3])
def test_the_stage_walks_by_its_angle(angle, walk_rank):
    with jax.enable_x64(True):
        gradients = jnp.asarray(np.random.default_rng(0).normal(size=(6, M, N)))
        rule = lro.grassmann_walk(key=3, angle=angle, walk_rank=walk_rank)
        bases = run(bracket(rule), gradients)
    assert bases.dtype == jnp.float64
    for a, b in itertools.pairwise(bases):
        angles = np.sort(subspace_angles(a, b))[::-1]
        assert abs(angles[0] - angle) < 1e-7
        turned = np.count_nonzero(angles > 1e-7)
        assert turned == (0 if angle == 0 else walk_rank or R)


# --- when ---


@each_rule
def test_basis_and_key_change_at_0_t_2t_and_at_no_other_time(rule):
    tx = bracket(rule(), refresh_every=3)
    state, seen = tx.init({"w": jnp.zeros((M, N))}), []
    update = jax.jit(tx.update)
    for g in gaussian(8, M, N):
        before, state = state, update({"w": g}, state)[1]
        (_, old), (_, new) = (
            optax.tree.get_all_with_path(s, "rng_key")[0] for s in (before, state)
        )
        split = old is not None and bool(jnp.any(old != new))
        moved = bool(jnp.any(bases_of(before)["w"] != bases_of(state)["w"]))
        seen.append((moved, split))
    due = [True, False, False, True, False, False, True, False]
    draws = rule not in (RULES["dominant_svd"], RULES["dominant_svd gram"])
    assert seen == [(refresh, refresh and draws) for refresh in due]


@pytest.mark.parametrize(
    "rule",
    [
        lambda d: lro.dominant_svd(decomposition=d),
        lambda d: lro.grassmann_walk(key=0, decomposition=d),
        lambda d: lro.grassmann_jump(key=0, decomposition=d),
    ],
    ids=["dominant_svd", "grassmann_walk", "grassmann_jump"],
)
@pytest.mark.parametrize("decomposition", [None, "svd", "gram"])
def test_the_first_basis_is_the_top_of_the_svd(rule, decomposition):
    gradients = gaussian(1, M, N)
    s = run(bracket(rule(decomposition)), gradients)[0]
    u = np.linalg.svd(np.asarray(gradients[0], np.float64))[0][:, :R]
    # eps over the gap between the third and the fourth singular value (0.1 of the
    # first), with the Gram matrix's and LAPACK's small factors.
    assert subspace_angles(u, np.asarray(s, np.float64)).max() < 1e-5


def test_dominant_svd_follows_the_gradient_of_its_step():
    gradients = gaussian(3, M, N)
    bases = run(bracket(lro.dominant_svd(), refresh_every=2), gradients)
    tops = jax.jit(lambda g: leading(g, R))(gradients)
    for t, source in [(0, 0), (1, 0), (2, 2)]:
        np.testing.assert_array_equal(bases[t], tops[source])


def test_the_update_is_the_gradient_projected_onto_the_basis():
    g = {"w": gaussian(N, M)}
    tx = bracket(lro.dominant_svd())
    updates, state = jax.jit(tx.update)(g, tx.init(g))
    s = bases_of(state)["w"]
    # The tall matrix is turned: S S^T G^T, turned back. Rounding of float32 products.
    np.testing.assert_allclose(updates["w"], g["w"] @ s @ s.T, atol=1e-5)


# --- SARA's law ---


def inclusion(weights, r):
    """P(index in the sample), drawing r without replacement: summed over all orders."""
    p = np.zeros(len(weights))
    sets: dict[tuple[int, ...], float] = {}
    for order in itertools.permutations(range(len(weights)), r):
        left, chance = sum(weights), 1.0
        for i in order:
            chance *= weights[i] / left
            left -= weights[i]
        p[list(order)] += chance
        chosen = tuple(sorted(order))
        sets[chosen] = sets.get(chosen, 0.0) + chance
    return p, sets


@pytest.fixture(scope="module")
def samples():
    """20,000 samples of 3 of 6 singular vectors: layers of one gradient.

    The gradient is diagonal, so that a basis tells its indices exactly.
    """
    values, r, layers = np.array([8.0, 4.0, 3.0, 2.0, 1.0, 0.5]), 3, 20_000
    g = {"w": jnp.broadcast_to(jnp.eye(6, 7) * values[:, None], (layers, 6, 7))}
    basis = draw(bracket(lro.sara_sample(key=0), rank=r), g)["w"][0]
    index = np.asarray(jnp.argmax(jnp.abs(basis), axis=-2))
    np.testing.assert_array_equal(np.abs(basis).max(-2), 1)
    return values, index


# A sound sampler fails one of these two tests with a chance of 1e-4, and for a fixed
# seed never or always.
FAMILY_ERROR = 1e-4


def test_sara_includes_by_singular_value(samples):
    values, index = samples
    p, _ = inclusion(values, index.shape[1])
    assert math.isclose(p.sum(), index.shape[1])
    counts = np.bincount(index.reshape(-1), minlength=len(values))
    z = (counts - len(index) * p) / np.sqrt(len(index) * p * (1 - p))
    # Bonferroni over the six indices, half of the family's error, two sides.
    limit = math.sqrt(chi2.isf(FAMILY_ERROR / 2 / len(values), df=1))
    assert np.abs(z).max() < limit


def test_sara_draws_without_replacement_set_by_set(samples):
    values, index = samples
    _, sets = inclusion(values, index.shape[1])
    chosen, counts = np.unique(index, axis=0, return_counts=True)
    seen = dict(zip(map(tuple, chosen.tolist()), counts.tolist(), strict=True))
    expected = {s: len(index) * p for s, p in sets.items()}
    assert min(expected.values()) > 5  # so that chi-square holds
    assert set(seen) <= set(expected)
    statistic = sum((seen.get(s, 0) - e) ** 2 / e for s, e in expected.items())
    assert statistic < chi2.isf(FAMILY_ERROR / 2, df=len(expected) - 1)


def test_these_tests_would_notice_squared_or_uniform_weights(samples):
    values, index = samples
    frequency = np.bincount(index.reshape(-1), minlength=6) / len(index)
    for wrong in (values**2, np.ones(6)):
        p, _ = inclusion(wrong, 3)
        z = (frequency - p) * np.sqrt(len(index) / (p * (1 - p)))
        assert np.abs(z).max() > 20


def test_sara_sorts(samples):
    _, index = samples
    assert (np.diff(index, axis=1) > 0).all()


@pytest.mark.parametrize("decomposition", [None, "svd", "gram"])
def test_sara_takes_all_the_singular_values_there_are(decomposition):
    # Two of the eight are not zero, at rank 3: 100 layers, each with its own draw.
    u = jnp.linalg.qr(gaussian(M, 2))[0]
    g = {"w": jnp.broadcast_to(u @ gaussian(2, N), (100, M, N))}
    s = draw(bracket(lro.sara_sample(key=2, decomposition=decomposition)), g)["w"][0]
    assert orthonormality_error(s) < 1e-5
    missing = u - s @ (jnp.swapaxes(s, -1, -2) @ u)
    # Values that should be zero are rounding, 1e-7 of the largest ("gram": 1e-4),
    # so that one of them displaces a real one with a chance of 1e-7 (1e-5) a layer.
    assert jnp.abs(missing).max() < 1e-3


def test_sara_of_a_zero_gradient_takes_any_of_them():
    g = {"w": jnp.zeros((100, M, N))}
    s = draw(bracket(lro.sara_sample(key=2)), g)["w"][0]
    assert orthonormality_error(s) < 1e-5
    chosen = np.unique(np.asarray(jnp.argmax(jnp.abs(s), axis=-2)))
    np.testing.assert_array_equal(chosen, np.arange(M))


def test_sara_of_a_wider_gradient_is_a_set_of_singular_vectors():
    g = gaussian(M, N)
    s = run(bracket(lro.sara_sample(key=4)), g[None])[0]
    u, _ = left_singular(g)
    cosines = np.abs(np.asarray(u.T @ s))
    index = cosines.argmax(0)
    assert (np.diff(index) > 0).all()
    np.testing.assert_allclose(s, u[:, index], atol=1e-6)  # float32 rounding


# --- the jump's law ---


def test_jumps_are_uniform():
    """The mean of N projectors is (r / m) I, entry by entry."""
    layers, m, r = 20_000, 6, 2
    g = {"w": jnp.broadcast_to(jnp.eye(m, 7), (layers, m, 7))}
    first_jump = draw(bracket(lro.grassmann_jump(key=0), rank=r), g, steps=2)["w"][1]
    s = np.asarray(first_jump, np.float64)
    projectors = s @ np.swapaxes(s, -1, -2)
    error = projectors.mean(0) - (r / m) * np.eye(m)
    z = error / (projectors.std(0) / math.sqrt(layers))
    # A chance of 1e-4 that one of the 21 different entries is outside, two sides.
    assert np.abs(z).max() < math.sqrt(chi2.isf(1e-4 / 21, df=1))
    # The law of one diagonal entry is Beta(r / 2, (m - r) / 2): check its variance
    # too, whose relative standard error is about 1 / sqrt(layers / 2); 5 of those.
    a, b = r / 2, (m - r) / 2
    variance = a * b / ((a + b) ** 2 * (a + b + 1))
    np.testing.assert_allclose(
        np.diagonal(projectors, axis1=1, axis2=2).var(0), variance, rtol=0.05
    )


# --- replay ---


def test_replay_takes_the_kth_basis_at_the_kth_refresh():
    given = jnp.stack([jnp.eye(M, R), jnp.eye(M, R)[::-1], jnp.eye(M)[:, 2 : 2 + R]])
    bases = run(
        bracket(lro.bases.replay({"w": given}), refresh_every=2), gaussian(9, M, N)
    )
    for t, k in enumerate([0, 0, 1, 1, 2, 2, 2, 2, 2]):
        np.testing.assert_array_equal(bases[t], given[k])


def test_replay_with_bases_that_do_not_fit():
    tree = {"mlp": {"kernel": jnp.ones((M, N))}, "attn": jnp.ones((M, N))}
    good = jnp.ones((2, M, R))
    tx = bracket(lro.bases.replay({"mlp": {"kernel": good}}))
    with pytest.raises(ValueError, match=r"attn: replay\(\) has no bases"):
        tx.init(tree)
    for bad in (good[0], good[:, :, :2], jnp.ones((2, N, R)), good[:0]):
        tx = bracket(lro.bases.replay({"mlp": {"kernel": bad}, "attn": good}))
        message = (
            f"mlp/kernel: replay() was given bases of shape {bad.shape}; "
            f"needed is (K, {M}, {R})"
        )
        with pytest.raises(ValueError, match=re.escape(message)):
            tx.init(tree)


# --- bad input ---


@pytest.mark.parametrize(
    ("rule", "arguments", "message"),
    [
        (lro.dominant_svd, {"decomposition": "lu"}, "'lu': choose \"svd\""),
        (lro.dominant_svd, {"decomposition": "randomized"}, "give a key"),
        (lro.sara_sample, {"decomposition": "randomized"}, "all singular values"),
        (lro.sara_sample, {"decomposition": "lu"}, "decomposition='lu'"),
        (lro.grassmann_walk, {"decomposition": "lu"}, "'lu' gives no full set of"),
        (lro.grassmann_jump, {"decomposition": "randomized"}, "no full set of"),
    ],
)
def test_bad_decompositions(rule, arguments, message):
    key = () if rule is lro.dominant_svd else (0,)
    with pytest.raises(ValueError, match=message):
        rule(*key, **arguments)


@pytest.mark.parametrize(
    "rule",
    [
        lro.sara_sample,
        lro.grassmann_walk,
        lro.grassmann_jump,
        lambda key: lro.dominant_svd(decomposition="randomized", key=key),
    ],
    ids=["sara_sample", "walk", "jump", "randomized"],
)
@pytest.mark.parametrize(
    "key",
    [1.0, True, np.float32(2), jnp.zeros(3, jnp.int32), "raw"],
    ids=["float", "bool", "numpy float", "vector", "raw"],
)
def test_bad_keys(rule, key):
    if isinstance(key, str):
        key = jax.random.PRNGKey(0)
    with pytest.raises(
        ValueError, match=r"an int or a typed key from jax\.random\.key"
    ):
        bracket(rule(key)).init({"w": jnp.ones((M, N))})


@each_rule
def test_a_basis_rule_outside_low_rank(rule):
    tx = rule()
    g = {"w": jnp.ones((M, N))}
    with pytest.raises(ValueError, match=r"inside low_rank\(\)"):
        tx.update(g, tx.init(g))


# --- keys ---


def draw(tx, tree, steps=1):
    """The bases after each of so many steps on one gradient: (steps, ...) leaves."""

    def step(state, _):
        state = tx.update(tree, state)[1]
        return state, bases_of(state)

    return jax.jit(lambda: jax.lax.scan(step, tx.init(tree), length=steps)[1])()


@pytest.mark.parametrize("seed", [0, np.int32(7), jnp.uint32(7)])
def test_a_seed_is_its_typed_key(seed):
    g = {"w": gaussian(2, M, N)}
    by_seed = draw(bracket(lro.sara_sample(seed)), g)
    by_key = draw(bracket(lro.sara_sample(jax.random.key(int(seed)))), g)
    np.testing.assert_array_equal(by_seed["w"], by_key["w"])


@pytest.mark.parametrize(
    "rule",
    [lro.sara_sample, lro.grassmann_walk, lro.grassmann_jump],
    ids=["sara_sample", "walk", "jump"],
)
def test_who_shares_a_draw(rule):
    # Equal gradients everywhere, singular values all likely; 20 of 40 as a sample.
    layers = jnp.broadcast_to(jnp.eye(40, 41), (2, 40, 41))
    tree = {"a": layers, "b": {"c": layers}}
    draws = draw(bracket(rule(5), rank=20), tree, steps=3)
    other_seed = draw(bracket(rule(6), rank=20), {"a": layers}, steps=3)
    # Leaves, layers, seeds and the second and third refresh draw apart.
    apart = [x[1:] for x in (draws["a"], draws["b"]["c"], other_seed["a"])]
    for x, y in itertools.combinations(np.concatenate(apart).reshape(-1, 40, 20), 2):
        assert np.any(x != y)
    # Other leaves of the tree do not matter.
    others = {"A": jnp.ones((30, 30)), "a": layers}
    alone = draw(bracket(rule(5), rank=20), others, steps=3)
    np.testing.assert_array_equal(alone["a"], draws["a"])
