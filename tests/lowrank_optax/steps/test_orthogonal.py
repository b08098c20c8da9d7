"""SUMO: the polar factor, and the step that is made of it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lowrank_optax as lro
from lowrank_optax.core import linalg

M, N, R = 8, 12, 3
EPS = float(np.finfo(np.float32).eps)


def normal(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def conditioned(condition: float, r: int, n: int, seed: int) -> Any:
    """A matrix of given singular values, in float64, with its polar factor."""
    rng = np.random.default_rng(seed)
    u = np.linalg.qr(rng.normal(size=(r, r)))[0]
    v = np.linalg.qr(rng.normal(size=(n, r)))[0]
    x = ((u * np.geomspace(1, 1 / condition, r)) @ v.T).astype(np.float32)
    u, _, vt = np.linalg.svd(np.float64(x), full_matrices=False)
    return x, u @ vt


def polar(x: Any, **options: Any) -> Any:
    return np.asarray(
        lro.steps.scale_by_polar_factor(**options).update(jnp.asarray(x), ())[0]
    )


@settings(derandomize=True, deadline=None, max_examples=40)
@given(
    log_condition=st.floats(0, 5),
    seed=st.integers(0, 2**32 - 1),
    size=st.sampled_from([1e-30, 1.0, 1e30]),
    tall=st.booleans(),
)
def test_the_polar_factor_is_orthonormal_and_the_nearest(
    log_condition: float, seed: int, size: float, tall: bool
) -> None:
    condition = 10**log_condition
    x, exact = conditioned(condition, 6, 9, seed)
    if tall:
        x, exact = x.T, exact.T
    found = polar(np.float32(size) * x)
    wide = found.T if tall else found
    # The smallest singular value is the last to come to one; seen is 2e-4 at 1e5.
    np.testing.assert_allclose(wide @ wide.T, np.eye(6), atol=1e-5 + 5e-9 * condition)
    # Seen is up to 38 eps times the condition.
    np.testing.assert_allclose(found, exact, atol=60 * EPS * max(condition, 2))
    by_svd = polar(np.float32(size) * x, method="svd")
    # X is rounded when it is scaled, which turns its factor by eps times the condition.
    np.testing.assert_allclose(by_svd, exact, atol=1e-5 + EPS * condition)


def test_it_turns_with_rows_and_columns() -> None:
    x = normal(4, 7)
    q, p = (np.linalg.qr(normal(n, n, seed=n))[0] for n in (4, 7))
    np.testing.assert_allclose(polar(q @ x @ p), q @ polar(x) @ p, atol=1e-5)
    np.testing.assert_allclose(polar(-x), -polar(x), atol=1e-5)


def test_without_a_direction_there_is_none() -> None:
    x = np.zeros((3, 4, 6), np.float32)
    x[1, 2, 3] = -7
    x[2] = np.outer(normal(4), normal(6, seed=1))
    found = polar(x)
    assert not found[0].any()
    assert found[1, 2, 3] == pytest.approx(-1, abs=1e-6)
    assert np.abs(found[1]).sum() == pytest.approx(1, abs=1e-5)
    values = np.linalg.svd(found[2], compute_uv=False)
    # The others are rounding, of which nothing larger than one is made: to within the
    # root of eps, on which the first pass leaves them.
    assert values.max() == pytest.approx(1, abs=4e-4)
    assert not polar(x, method="svd")[0].any()


def test_an_svd_leaves_directions_of_rounding_out() -> None:
    """They had full length: a step of any direction."""
    x = np.random.default_rng(0).normal(size=(6, 2)) @ np.random.default_rng(1).normal(
        size=(2, 9)
    )
    tx = lro.steps.scale_by_polar_factor("svd")
    found, _ = tx.update(jnp.asarray(x, jnp.float32), optax.EmptyState())
    u, _, vt = np.linalg.svd(x, full_matrices=False)
    np.testing.assert_allclose(found, u[:, :2] @ vt[:2], atol=1e-5)


def test_matrices_of_a_batch_do_not_see_each_other() -> None:
    x = np.stack([normal(4, 6, seed=i) for i in range(3)])
    x[1] = np.nan
    found = polar(x)
    for i in (0, 2):
        np.testing.assert_allclose(found[i], polar(x[i]), atol=1e-6)


def test_what_is_no_matrix_stays() -> None:
    tree = {"scalar": jnp.ones([]), "vector": jnp.arange(3.0), "none": jnp.ones((0, 3))}
    updates, _ = lro.steps.scale_by_polar_factor().update(tree, optax.EmptyState())
    jax.tree.map(np.testing.assert_array_equal, updates, tree)


@pytest.mark.parametrize("tall", [False, True])
def test_newton_schulz_comes_near(tall: bool) -> None:
    x, exact = conditioned(30.0, 6, 9, 0)
    x, exact = (x.T, exact.T) if tall else (x, exact)
    found = polar(x, method="newton_schulz")
    values = np.linalg.svd(found, compute_uv=False)
    # As Muon says of its five steps, for singular values not too small.
    assert 0.6 < values.min() <= values.max() < 1.3
    left, _, right = np.linalg.svd(x, full_matrices=False)
    off = left.T @ found @ right.T
    np.testing.assert_allclose(off - np.diag(np.diag(off)), 0, atol=1e-4)
    assert not polar(0 * x, method="newton_schulz").any()
    assert not np.allclose(found, polar(x, method="newton_schulz", iterations=2))


def test_bad_arguments() -> None:
    method: Any = "qr"
    with pytest.raises(ValueError, match="method='qr': choose one of eigh, svd, new"):
        lro.steps.scale_by_polar_factor(method)
    with pytest.raises(ValueError, match="iterations must be an int of at least 1"):
        lro.steps.scale_by_polar_factor("newton_schulz", iterations=0)


# ------------------------------------------------------------------ the step


def steps(basis: Any, gradients: Any, **options: Any) -> Any:
    rule = lro.bases.replay({"w": np.asarray(basis)[None]})
    tx: Any = lro.recipes.sumo(
        1.0, rank=R, refresh_every=99, basis=rule, dimension_numbers=None, **options
    )
    params = {"w": jnp.zeros((M, N))}

    def step(state: Any, g: Any) -> Any:
        updates, state = tx.update({"w": g}, state, params)
        return state, -updates["w"]

    return np.asarray(
        jax.jit(lambda gs: jax.lax.scan(step, tx.init(params), gs)[1])(gradients)
    )


def test_it_does_not_depend_on_the_coordinates_of_the_subspace() -> None:
    """Neither on signs of singular vectors nor on any other choice of a basis."""
    g, s = jnp.asarray(normal(4, M, N)), np.linalg.qr(normal(M, R, seed=1))[0]
    turn = np.linalg.qr(normal(R, R, seed=2))[0]
    plain = steps(s, g)
    for other in (s * [1, -1, -1], s[:, ::-1], s @ turn):
        np.testing.assert_allclose(steps(other, g), plain, atol=1e-4)


def test_the_part_inside_has_one_size_and_the_rest_is_the_gradients() -> None:
    g, s = jnp.asarray(normal(4, M, N)), np.linalg.qr(normal(M, R, seed=1))[0]
    found = steps(s, g) / np.sqrt(N)
    inside = s @ (s.T @ found)
    np.testing.assert_allclose(found - inside, g - s @ (s.T @ g), atol=1e-5)
    values = np.linalg.svd(inside, compute_uv=False)
    np.testing.assert_allclose(values[:, :R], 1, atol=1e-5)
    # A larger gradient makes the step outside larger alone.
    larger = steps(s, 100 * g) / np.sqrt(N)
    np.testing.assert_allclose(s.T @ larger, s.T @ found, atol=1e-3)
    none = steps(s, g, residual_scale=0.0, scale=2.0) / np.sqrt(N)
    np.testing.assert_allclose(none, 2 * inside, atol=1e-5)


def test_the_limit_is_on_the_growth_of_the_rank() -> None:
    s = np.eye(M, R, dtype=np.float32)
    g = np.zeros((4, M, N), np.float32)
    g[0, 0, 0] = 1  # rank one, then all of the subspace
    g[1:] = normal(M, N)
    norms = np.linalg.norm(s.T @ steps(s, g) / np.sqrt(N), axis=(1, 2))
    np.testing.assert_allclose(norms, 1.1 ** np.arange(4), rtol=1e-5)
    free = np.linalg.norm(s.T @ steps(s, g, limit=9.0) / np.sqrt(N), axis=(1, 2))
    np.testing.assert_allclose(free, [1, *[np.sqrt(R)] * 3], rtol=1e-5)


def test_zero_gradients_and_layers_apart() -> None:
    tx: Any = lro.recipes.sumo(
        1.0, rank=R, refresh_every=2, dimension_numbers=lro.STACKED
    )
    params = {"w": jnp.zeros((2, M, N))}
    state, update, moved = tx.init(params), jax.jit(tx.update), []
    for t in range(4):
        g = normal(2, M, N, seed=t) * np.reshape(
            np.array([t > 1, 1], np.float32), (2, 1, 1)
        )
        updates, state = update({"w": jnp.asarray(g)}, state, params)
        assert jnp.isfinite(updates["w"]).all()
        moved.append([bool(x.any()) for x in np.asarray(updates["w"])])
    assert moved == [[False, True], [False, True], [True, True], [True, True]]


def test_a_limited_step_needs_a_step() -> None:
    tx: Any = lro.low_rank(
        optax.chain(lro.dominant_svd(), lro.recovery.clip_step_growth()),
        rank=R,
        refresh_every=1,
    )
    g = {"w": jnp.ones((M, N))}
    with pytest.raises(ValueError, match=r"w: .*put in_subspace\(\) or rotate_moments"):
        tx.update(g, tx.init(g))
    tx = lro.low_rank(
        optax.chain(lro.dominant_svd(), lro.recovery.scale_by_shape()),
        rank=R,
        refresh_every=1,
    )
    with pytest.raises(ValueError, match=r"w: .*put project_back\(\) or another way"):
        tx.update(g, tx.init(g))


def test_linalg_takes_a_batch() -> None:
    x = jnp.asarray(normal(2, 3, 4, 6))
    each = jnp.stack([jnp.stack([linalg.polar(y) for y in row]) for row in x])
    np.testing.assert_allclose(linalg.polar(x), each, atol=1e-6)
