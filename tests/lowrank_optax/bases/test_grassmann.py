"""Steps along geodesics: walks, and tracking."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import subspace_angles

import lowrank_optax as lro
from lowrank_optax.bases.grassmann import geodesic
from lowrank_optax.core.linalg import orthonormality_error
from tests.helpers import stages
from tests.helpers.rules import (
    M,
    N,
    R,
    bracket,
    gaussian,
    normal,
    run,
    scanned,
    updates_of,
    walk,
)

few = settings(derandomize=True, deadline=None, max_examples=20)


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


@pytest.mark.slow
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


one_walk = jax.jit(geodesic, static_argnames="rank")


@pytest.mark.parametrize("rank", [None, 6, 2, 1])
@pytest.mark.parametrize("angle", [1e-3, 0.3, 1.0, math.pi / 2])
def test_the_walk_turns_by_its_angle(angle, rank):
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        s = jnp.asarray(np.linalg.qr(rng.normal(size=(5, 20, 6)))[0])
        x = jnp.asarray(rng.normal(size=s.shape))
        new = one_walk(s, x, angle, rank=rank)
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


def test_a_walk_of_length_zero_stays():
    s = jnp.linalg.qr(gaussian(M, R))[0]
    for x, eta in [(gaussian(M, R), 0.0), (jnp.zeros((M, R)), 0.3)]:
        for rank in (None, 1):
            # Rounding of the products alone, a few eps.
            np.testing.assert_allclose(one_walk(s, x, eta, rank=rank), s, atol=1e-6)


@pytest.mark.parametrize("rank", [None, 1])
@pytest.mark.parametrize("outside", [0.0, 1e-7, 1e-6, 1e-5, 1e-3])
def test_a_walk_along_the_span_itself_is_orthonormal(outside, rank):
    """What is left of such a direction after (I - S S^T) is rounding for a good part,
    which is not tangent, and is then scaled up to unit norm."""
    s = jnp.linalg.qr(gaussian(M, R))[0]
    x = s @ gaussian(R, R, seed=1) + outside * gaussian(M, R, seed=2)
    assert orthonormality_error(one_walk(s, x, 0.3, rank=rank)) < 1e-5


def test_a_walk_of_rank_one_stays_near_its_start() -> None:
    """A hundred refreshes of 0.3 rad: all directions forget S_0, one does not."""
    m, r = 128, 32
    grads = [{"w": stages.normal(m, 2 * m)}] * 101
    overlap = {}
    for k in (None, 1):
        rule = lro.grassmann_walk(0, 0.3, walk_rank=k)
        step = lro.in_subspace(optax.identity())
        tx = lro.low_rank(
            stages.chain_of(basis=rule, step=step), rank=r, refresh_every=1
        )
        _, states = stages.run(tx, grads)
        first, last = (optax.tree.get(states[i], "basis")["w"] for i in (0, -1))
        overlap[k] = stages.length(first.T @ last) ** 2 / r
    assert overlap[None] < 1.3 * r / m  # as far as a random subspace
    assert overlap[1] > 2.5 * r / m


def test_a_walk_of_no_rank_is_refused() -> None:
    with pytest.raises(
        ValueError, match="walk_rank must be an int of at least 1, not 0"
    ):
        lro.grassmann_walk(0, walk_rank=0)
    g = {"w": stages.normal(stages.M, stages.N)}
    tx = lro.low_rank(
        stages.chain_of(basis=lro.grassmann_walk(0, walk_rank=5)),
        rank=4,
        refresh_every=1,
    )
    with pytest.raises(
        ValueError, match="w: walk_rank=5 is above the rank 4; lower it"
    ):
        tx.update(g, tx.init(g))


def test_a_walk_goes_on_from_the_first_gradient() -> None:
    zero, g = (
        {"w": jnp.zeros((stages.M, stages.N))},
        {"w": stages.normal(stages.M, stages.N)},
    )
    tx = lro.low_rank(
        stages.chain_of(basis=lro.grassmann_walk(0, 0.1)), rank=3, refresh_every=3
    )
    _, states = stages.run(tx, [zero] * 4 + [g] * 4)
    bases = [np.asarray(optax.tree.get(s, "basis")["w"]) for s in states]
    u = np.linalg.svd(np.asarray(g["w"]))[0][:, :3]
    assert subspace_angles(bases[4], u).max() < 1e-3
    assert abs(subspace_angles(bases[6], u).max() - 0.1) < 1e-3  # and then it walks
