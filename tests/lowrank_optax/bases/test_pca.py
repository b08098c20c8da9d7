"""A basis that is learnt by online PCA."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import settings

import lowrank_optax as lro
from lowrank_optax.core.singular import leading
from tests.helpers.rules import M, N, R, Walk, normal, same_bits, scanned, walk

few = settings(derandomize=True, deadline=None, max_examples=20)


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
