"""Spectra of what a run changed."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.run.spectra import effective_rank, singular_values, spectra

few = settings(derandomize=True, deadline=None, max_examples=30)


def test_singular_values_and_ranks_against_numpy():
    rng = np.random.default_rng(0)
    for shape in ((6, 9), (9, 6), (5, 5)):
        d = rng.normal(size=shape).astype(np.float32)
        expected = np.linalg.svd(d.astype(np.float64), compute_uv=False)
        # Roots of eigenvalues, which are of float64's size beside the largest.
        np.testing.assert_allclose(singular_values(d), expected, rtol=1e-12)
        p = expected / expected.sum()
        entropy = sum(-x * np.log(x) for x in p)
        assert effective_rank(expected) == pytest.approx(np.exp(entropy), rel=1e-12)


@few
@given(st.integers(1, 8), st.floats(1e-30, 1e30))
def test_equal_singular_values_are_as_many_as_they_are(count, size):
    values = np.array([size] * count + [0.0] * 3)
    assert effective_rank(values) == pytest.approx(count, rel=1e-12)


@few
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=8))
def test_an_effective_rank_lies_between_one_and_all(values):
    there = sum(x > 0 for x in values)
    assert min(there, 1) - 1e-9 <= effective_rank(np.array(values)) <= there + 1e-9


def model(seed, shape=(3, 6, 8)):
    rng = np.random.default_rng(seed)
    layers = {
        "attention": {"q": {"kernel": rng.normal(size=(3, 6, 6))}},
        "mlp": {"up": {"kernel": rng.normal(size=shape)}},
        "mlp_norm": {"scale": rng.normal(size=(3, 6))},
    }
    return {"layers": layers, "head": {"kernel": rng.normal(size=(6, 20))}}


def test_spectra_of_a_change_of_known_rank():
    before, after = model(0), model(0)
    u, v = np.linalg.qr(np.random.default_rng(1).normal(size=(8, 8)))[0][:2]
    after["layers"]["mlp"]["up"]["kernel"][0] += np.outer(u[:6], v)
    found = spectra(before, after)
    assert [*found] == ["q", "up"]
    assert found["up"].shape == (6, 8)
    # One direction in float32, in the first of three layers, and nothing else.
    np.testing.assert_allclose(found["up"].ranks, [1, 0, 0], atol=1e-5)
    np.testing.assert_allclose(found["up"].values[0], [1, 0, 0, 0, 0, 0], atol=1e-6)
    assert not np.any(found["q"].values)
    with pytest.raises(ValueError, match="models of different shapes"):
        spectra(before, model(0, (3, 8, 6)))
