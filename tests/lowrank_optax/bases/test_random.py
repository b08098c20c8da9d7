"""Random bases: Gaussian projections, jumps, and random ones after a step."""

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import settings
from scipy.linalg import subspace_angles
from scipy.stats import chi2

import lowrank_optax as lro
from lowrank_optax.core.linalg import orthonormality_error
from lowrank_optax.core.singular import leading
from lowrank_optax.core.stage import Clock
from tests.helpers.rules import (
    M,
    N,
    R,
    bracket,
    draw,
    frame_of,
    normal,
    same_bits,
    updates_of,
    walk,
)

few = settings(derandomize=True, deadline=None, max_examples=20)


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
        assert key.dtype == jnp.uint32
        assert key.shape == (2,)
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
