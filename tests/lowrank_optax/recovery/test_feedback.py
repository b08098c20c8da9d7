"""Error feedback: what a projection loses is added to the next gradient."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lowrank_optax as lro
from tests.helpers.ways_back import (
    GRADIENT,
    M,
    N,
    R,
    run,
)


def fed_back(rule: Any, step: Any, b1: float = 0.0, back: Any = None) -> Any:
    stages = optax.chain(
        lro.error_feedback(optax.chain(rule, lro.project()), b1=b1),
        step,
        back or lro.project_back(),
    )
    return lro.low_rank(stages, rank=R, refresh_every=1)


@settings(derandomize=True, deadline=None, max_examples=20)
@given(
    seed=st.integers(0, 2**31),
    log_sizes=st.lists(st.floats(-3, 3), min_size=6, max_size=6),
)
def test_what_is_lost_is_kept(seed: int, log_sizes: list[float]) -> None:
    """sum of S_t G~_t up to T, and E_T, are the sum of all gradients, at every T."""
    random = np.random.default_rng(seed)
    bases = np.linalg.qr(random.normal(size=(6, M, R)))[0]
    sizes = 10.0 ** np.reshape(log_sizes, (6, 1, 1))
    gradients = sizes * random.normal(size=(6, M, N))
    with jax.enable_x64(True):
        updates, errors = jax.device_get(_conserved(bases, gradients))
    given_in = np.cumsum(gradients, axis=0)
    came_out = np.cumsum(updates, axis=0) + errors
    # Float64 rounding of sums of six times M products of numbers of a few.
    rounding = 1e-12 * sizes.max()
    np.testing.assert_allclose(came_out, given_in, rtol=0, atol=rounding)
    for s, e in zip(bases, errors, strict=True):  # and E has no part in the last basis
        assert np.abs(s.T @ e).max() < rounding


@jax.jit
def _conserved(bases: Any, gradients: Any) -> Any:
    tx = fed_back(lro.bases.replay({"w": bases}), lro.in_subspace(optax.identity()))
    updates, state = run(tx, gradients)
    return updates, optax.tree.get(state, "error")["w"]


def test_a_basis_that_covers_the_error_gives_all_of_it_back() -> None:
    rows = lro.bases.coordinates(order="ascending")
    gradients = np.stack([GRADIENT, 0 * GRADIENT, 0 * GRADIENT, 0 * GRADIENT])
    tx = fed_back(rows, lro.in_subspace(optax.identity()))
    found, state = run(tx, gradients)
    # Blocks of rows 0-2, 3-5, 5-7: gathers and scatters, exact. Row 5 is paid once.
    paid = np.asarray(found)
    np.testing.assert_array_equal(paid[0, :3], GRADIENT[:3])
    np.testing.assert_array_equal(paid[1, 3:6], GRADIENT[3:6])
    np.testing.assert_array_equal(paid[2, 6:], GRADIENT[6:])
    np.testing.assert_array_equal(paid.sum(0), GRADIENT)
    np.testing.assert_array_equal(optax.tree.get(state, "error")["w"][2:], 0)


def test_what_the_moment_loses_by_turning_is_fed_back() -> None:
    """With b1 > 0: the momentum that is still to come counts as given.

    M_t = b1 C M_{t-1} + (1 - b1) S^T (G + E): a gradient pays (1 - b1) now, and b1 /
    (1 - b1) S M is what the moment will still pay, were the basis to stay.
    """
    b1 = 0.75
    random = np.random.default_rng(3)
    bases = np.linalg.qr(random.normal(size=(6, M, R)))[0]
    gradients = random.normal(size=(6, M, N))
    with jax.enable_x64(True):
        step = lro.rotate_moments(optax.ema(b1, debias=False))
        tx = fed_back(lro.bases.replay({"w": bases}), step, b1=b1)
        updates, state = jax.device_get(run(tx, gradients))
    errors = optax.tree.get(state, "error")["w"]
    moments = optax.tree.get(state, "ema")["w"]
    to_come = b1 / (1 - b1) * bases @ moments
    total = np.cumsum(updates, axis=0) + to_come + errors
    # Float64 rounding of sums of six.
    np.testing.assert_allclose(total, np.cumsum(gradients, axis=0), atol=1e-13)


def test_a_skipped_step_keeps_the_error() -> None:
    tx = fed_back(lro.dominant_svd(), lro.in_subspace(optax.identity()))
    bad = GRADIENT.copy()
    bad[0, 0] = np.nan
    _, state = run(tx, np.stack([GRADIENT, bad]))
    errors = optax.tree.get(state, "error")["w"]
    assert np.abs(errors[0]).max() > 0.1
    np.testing.assert_array_equal(errors[1], errors[0])


def test_a_leaf_of_full_rank_has_no_error() -> None:
    tx = fed_back(lro.dominant_svd(), lro.in_subspace(optax.identity()))
    g = {"w": GRADIENT, "b": np.ones(4, np.float32)}
    state = tx.init(g)

    def nothing_is_kept() -> None:
        error = optax.tree.get(state, "error")["b"]
        assert (error.shape, error.dtype, bool(error)) == ((), jnp.bool_, False)

    nothing_is_kept()
    updates, state = tx.update(g, state)
    np.testing.assert_array_equal(updates["b"], 1)
    nothing_is_kept()


FEEDING: dict[str, Any] = {
    "recover_residual": lro.recover_residual,
    "sign_residual": lro.sign_residual,
    "scale_gradient": lro.scale_gradient,
    "scale_gradient/matrix": functools.partial(lro.scale_gradient, per="matrix"),
}


@pytest.mark.parametrize("name", FEEDING)
def test_the_residual_is_given_back_once(name: str) -> None:
    g = {"w": GRADIENT}
    step = lro.in_subspace(optax.scale_by_adam())
    tx = fed_back(lro.dominant_svd(), step, back=FEEDING[name]())
    stage = name.split("/")[0]
    message = rf"w: {stage}\(\) does not work here: error_feedback\(\) adds the resid"
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(tx.update, g, tx.init(g))


def refused(stages: Any, g: Any) -> str:
    chain = optax.chain(
        stages,
        lro.rotate_moments(optax.scale_by_adam(), moments="first"),
        lro.project_back(),
    )
    tx = lro.low_rank(chain, rank=R, refresh_every=1)
    with pytest.raises(ValueError, match=r"^w: ") as caught:
        jax.eval_shape(tx.update, g, tx.init(g))
    return str(caught.value)


@pytest.mark.parametrize(
    "rule",
    [
        lro.bases.gaussian(0),
        lro.bases.gaussian(0, stored=True),
        lro.bases.online_pca(),
        lro.bases.correlation_aware(),
        lro.bases.quantize_basis(lro.dominant_svd()),
    ],
    ids=["gaussian", "stored", "online_pca", "correlation_aware", "4 bits"],
)
def test_a_basis_that_is_not_orthonormal_is_refused(rule: Any) -> None:
    chain = optax.chain(rule, lro.project())
    message = refused(lro.error_feedback(chain), {"w": GRADIENT})
    assert "error_feedback()" in message
    assert "not orthonormal" in message or "rule that keeps its basis" in message


def test_feedback_of_feedback_and_stages_that_are_missing() -> None:
    g = {"w": GRADIENT}
    once = lro.error_feedback(optax.chain(lro.dominant_svd(), lro.project()))
    assert "error_feedback()" in refused(lro.error_feedback(once), g)
    assert "put project() before" in refused(lro.error_feedback(lro.dominant_svd()), g)
    assert "basis" in refused(lro.error_feedback(lro.project()), g)


@pytest.mark.parametrize(
    "rule",
    [
        lro.bases.frozen(lro.dominant_svd()),
        lro.bases.coordinates(0),
        lro.bases.grassmann_track(None),
        lro.grassmann_walk(0),
        lro.bases.power_iterate(),
    ],
    ids=["frozen", "coordinates", "track", "walk", "power_iterate"],
)
def test_rules_it_goes_around(rule: Any) -> None:
    g = {"w": GRADIENT, "b": np.ones(4, np.float32)}
    tx = fed_back(rule, lro.rotate_moments(optax.scale_by_adam()), b1=0.9)
    updates, state = jax.eval_shape(tx.update, g, tx.init(g))
    assert updates["w"].shape == (M, N)
    # A carry of scan: the state keeps its structure, shapes and dtypes.
    before = jax.eval_shape(tx.init, g)
    assert jax.tree.structure(state) == jax.tree.structure(before)
    for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(before), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
