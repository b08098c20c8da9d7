"""Bases of singular vectors: the leading ones, and SARA's law."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import subspace_angles
from scipy.stats import chi2

import lowrank_optax as lro
from lowrank_optax.core.linalg import orthonormality_error
from lowrank_optax.core.singular import leading, left_singular
from tests.helpers.rules import M, N, R, bracket, draw, gaussian, run


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


def test_iterate_follows_the_gradient_and_starts_from_any():
    rule = lro.dominant_svd(decomposition="iterate", key=0)
    gradients = jnp.broadcast_to(gaussian(1, M, N), (4, M, N))
    # The first rows are zero, where the placeholder of the first basis lies.
    gradients = gradients.at[:, :R].set(0)
    bases = run(bracket(rule, refresh_every=1), gradients)
    u = np.linalg.svd(np.asarray(gradients[0], np.float64))[0][:, :R]
    angles = [subspace_angles(u, np.asarray(s, np.float64)).max() for s in bases]
    # Eight columns beyond the rank: all of so small a matrix is seen.
    assert max(angles) < 1e-3
    assert angles[-1] < 1e-4


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


@pytest.mark.parametrize(
    ("rule", "arguments", "message"),
    [
        (lro.dominant_svd, {"decomposition": "lu"}, "'lu': choose \"svd\""),
        (lro.dominant_svd, {"decomposition": "randomized"}, "pass a key"),
        (lro.sara_sample, {"decomposition": "randomized"}, "all singular values"),
        (lro.sara_sample, {"decomposition": "lu"}, "decomposition='lu'"),
        (lro.grassmann_walk, {"decomposition": "lu"}, "'lu' computes no full set of"),
        (lro.grassmann_jump, {"decomposition": "randomized"}, "no full set of"),
    ],
)
def test_bad_decompositions(rule, arguments, message):
    key = () if rule is lro.dominant_svd else (0,)
    with pytest.raises(ValueError, match=message):
        rule(*key, **arguments)
