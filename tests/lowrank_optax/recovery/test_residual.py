"""The residual and its limiter: two products for three, growth bounded, no NaN."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lowrank_optax as lro

M, N, R, LIMIT = 8, 12, 3, 1.01


def orthonormal(seed, *batch):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(*batch, M, R)))[0]


def bracket(basis, inner=None, *, limit=LIMIT, scale=1.0, variant: Any = "paper"):
    """A fixed basis, `inner` in it, and the residual back."""
    stages = optax.chain(
        lro.bases.replay({"w": basis[None]}),
        lro.project(),
        lro.in_subspace(inner or optax.scale_by_adam()),
        lro.recover_residual(limit, scale=scale, variant=variant),
    )
    return lro.low_rank(
        stages, rank=R, refresh_every=1000, dimension_numbers=lro.STACKED
    )


def norm_of(state):
    return optax.tree.get(state, "norm")["w"]


def run(tx, gradients):
    """Updates and stored norms of a (K, ...) stack of gradients."""

    def step(state, g):
        updates, state = tx.update({"w": g}, state)
        return state, (updates["w"], norm_of(state))

    return jax.jit(lambda gs: jax.lax.scan(step, tx.init({"w": gs[0]}), gs)[1])(
        gradients
    )


def three_products(basis, gradients, inner_steps, limit, scale, variant):
    """Lambda_t and the step by eqs. 9 to 11 with the residual written out (NumPy)."""
    published = variant == "published"
    eps, inside = (1e-8, scale) if published else (0.0, 1.0)
    last, steps, lambdas = None, [], []
    for g, o in zip(gradients, inner_steps, strict=True):
        low = basis.T @ g
        below = np.linalg.norm(low, axis=0) + eps
        above = np.linalg.norm(o, axis=0)
        phi = np.divide(above, below, out=np.zeros(N), where=below > 0)
        residual = (g - inside * basis @ low) * phi
        size = np.linalg.norm(residual)
        if last is not None and size > limit * (last + eps):
            residual *= limit * (last + eps) / size
            size = limit * (last + eps)
        if published or size > 0:
            last = size
        steps.append(scale * basis @ o + residual)
        lambdas.append(residual)
    return np.stack(steps), np.stack(lambdas)


def growing(count, seed=0):
    """Gradients with columns of very different size that grow, shrink and vanish."""
    rng = np.random.default_rng(seed)
    g = rng.normal(size=(count, M, N)) * np.geomspace(1e-3, 1e3, N)
    g[:, :, 5] = 0  # a column that is always zero
    return g * rng.uniform(0.1, 3, size=(count, 1, 1))


@pytest.mark.parametrize("variant", ["paper", "published"])
@pytest.mark.parametrize("scale", [1.0, 0.25, 0.0])
def test_two_products_are_three(scale, variant):
    g, basis = growing(12), orthonormal(1)
    with jax.enable_x64(True):
        tx = bracket(basis, scale=scale, variant=variant)
        found, norms = run(tx, jnp.asarray(g))
        assert found.dtype == jnp.float64
        low = jnp.asarray(basis.T @ g)
        adam = optax.scale_by_adam()
        inner_steps = jax.lax.scan(
            lambda s, x: (adam.update(x, s)[1], adam.update(x, s)[0]),
            adam.init(low[0]),
            low,
        )[1]
    steps, lambdas = three_products(
        basis, g, np.asarray(inner_steps), LIMIT, scale, variant
    )
    for mine, true in zip(np.asarray(found), steps, strict=True):
        # Float64 rounding, relative to the whole step.
        assert np.abs(mine - true).max() < 1e-12 * np.abs(true).max()
    # sqrt(|G|^2 - |G~|^2): a difference of numbers of like size.
    np.testing.assert_allclose(norms, np.linalg.norm(lambdas, axis=(1, 2)), rtol=1e-12)
    assert (np.diff(norms) < 0).any()
    np.testing.assert_allclose(norms[1:] / norms[:-1], LIMIT, rtol=0.99)


def test_in_float32_it_is_the_same_to_rounding():
    g, basis = growing(12).astype(np.float32), orthonormal(1).astype(np.float32)
    found, _ = run(bracket(basis, optax.identity()), jnp.asarray(g))
    low = np.float64(basis).T @ g
    steps, _ = three_products(np.float64(basis), g, low, LIMIT, 1.0, "paper")
    for mine, true in zip(np.asarray(found), steps, strict=True):
        # 1e-5: a hundred float32 roundings, relative to the whole step.
        assert np.abs(mine - true).max() < 1e-5 * np.abs(true).max()


def test_with_the_identity_as_optimizer_the_gradient_comes_back():
    """phi = 1 and no limit: S G~ + (I - S S^T) G = G."""
    g = jnp.asarray(growing(1), jnp.float32)
    found, _ = run(bracket(orthonormal(2), optax.identity()), g)
    # A column's rounding is relative to that column: 20 float32 eps of it.
    size = np.linalg.norm(g[0], axis=0)
    assert (np.abs(found[0] - g[0]).max(0) <= 2.5e-6 * size).all()


# --- the limiter ---


ZERO = 0.0


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    sizes=st.lists(
        st.one_of(st.just(ZERO), st.floats(1e-6, 1e6)), min_size=12, max_size=12
    ),
    limit=st.sampled_from([1.0, 1.01, 2.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_residual_never_grows_faster_than_its_limit(sizes, limit, seed):
    rng = np.random.default_rng(seed)
    g = rng.normal(size=(12, M, N)) * np.reshape(sizes, (12, 1, 1))
    s = orthonormal(3)
    # In float64, for the part outside is read off the whole update.
    with jax.enable_x64(True):
        updates, norms = jax.device_get(_limited(s, g, limit))
    assert np.isfinite(updates).all()
    outside = np.linalg.norm(updates - s @ (s.T @ updates), axis=(1, 2))
    whole = np.linalg.norm(updates, axis=(1, 2))
    last = None
    for size, lost, stored, total in zip(sizes, outside, norms, whole, strict=True):
        if size == 0:
            assert lost == 0
            assert stored == (-1 if last is None else last)
            continue
        if last is not None:
            assert stored <= limit * last * (1 + 1e-12)  # float64 rounding
        # The number kept is the norm of what came out, to float64 rounding.
        assert math.isclose(lost, stored, rel_tol=1e-9, abs_tol=1e-13 * total)
        last = stored


@jax.jit
def _limited(basis, g, limit):
    return run(bracket(basis, optax.identity(), limit=limit), g)


def test_the_first_step_has_no_limit_and_the_next_ones_have():
    g = np.random.default_rng(0).normal(size=(M, N)).astype(np.float32)
    sizes = np.asarray([1, 100, 100, 1, 100], np.float32)[:, None, None]
    basis = orthonormal(4).astype(np.float32)
    _, norms = run(bracket(basis, optax.identity()), sizes * g)
    free = np.linalg.norm(g - basis @ (basis.T @ g))
    expected = free * np.array([1, LIMIT, LIMIT**2, 1, LIMIT])
    np.testing.assert_allclose(norms, expected, rtol=1e-5)  # float32 rounding


def test_after_a_zero_gradient_the_residual_is_back():
    g = np.random.default_rng(0).normal(size=(M, N)).astype(np.float32)
    basis = orthonormal(5).astype(np.float32)
    free = np.linalg.norm(g - basis @ (basis.T @ g))
    sizes = np.asarray([0, 0, 1, 0, 0, 1, 5], np.float32)[:, None, None]
    updates, norms = run(bracket(basis, optax.identity()), sizes * g)
    np.testing.assert_array_equal(updates[:2], 0)
    np.testing.assert_array_equal(norms[:2], -1)  # still no step to be limited by
    # The paper's residual is whole again, and still limited afterwards.
    expected = free * np.array([1, 1, 1, 1, LIMIT])
    np.testing.assert_allclose(norms[2:], expected, rtol=1e-5)
    np.testing.assert_allclose(updates[5], g, rtol=1e-4, atol=1e-5)


def test_the_published_limiter_starts_again_from_1e_8():
    g = np.random.default_rng(0).normal(size=(M, N)).astype(np.float32)
    sizes = np.asarray([1, 0, 1, 1], np.float32)[:, None, None]
    tx = bracket(orthonormal(6), optax.identity(), variant="published")
    _, norms = run(tx, sizes * g)
    assert norms[0] > 1
    assert norms[1] == 0
    # limit * (0 + 1e-8), then limit * (that + 1e-8): float32 rounding.
    bound = LIMIT * 1e-8
    expected = [bound, LIMIT * (bound + 1e-8)]
    np.testing.assert_allclose(norms[2:], expected, rtol=1e-5)


def test_layers_are_limited_one_by_one():
    rng = np.random.default_rng(0)
    basis = orthonormal(7, 3).astype(np.float32)
    g = rng.normal(size=(6, 3, M, N)).astype(np.float32)
    g *= np.asarray([1, 30, 30, 1, 1, 9], np.float32)[:, None, None, None] ** np.arange(
        3
    ).reshape(3, 1, 1)  # the first layer does not grow, the others do
    g[2, 1] = 0
    updates, norms = run(bracket(basis), jnp.asarray(g))
    assert norms.shape == (6, 3)
    for i in range(3):
        one, alone = run(bracket(basis[i]), jnp.asarray(g[:, i]))
        # Sums of batched products may be in another order: float32 rounding.
        np.testing.assert_allclose(norms[:, i], alone, rtol=1e-4)
        np.testing.assert_allclose(updates[:, i], one, rtol=1e-3, atol=1e-4)


# --- zeros ---


@pytest.mark.parametrize("variant", ["paper", "published"])
@pytest.mark.parametrize(
    "spoil",
    [
        lambda g, s: 0 * g,
        lambda g, s: g.at[:, :, ::2].set(0.0),
        lambda g, s: g - s @ (s.T @ g),  # nothing inside the subspace but rounding
        lambda g, s: s @ (s.T @ g),  # nothing outside
        lambda g, s: g.at[1].set(0.0),
        lambda g, s: 1e-30 * g,
    ],
    ids=["zero", "zero columns", "outside", "inside", "then zero", "tiny"],
)
def test_no_nan(spoil, variant):
    s = jnp.asarray(orthonormal(8), jnp.float32)
    g = jax.random.normal(jax.random.key(0), (4, M, N))
    for inner in (optax.scale_by_adam(), optax.trace(0.9), optax.identity()):
        updates, norms = run(bracket(s, inner, variant=variant), spoil(g, s))
        assert jnp.all(jnp.isfinite(updates))
        assert jnp.all(jnp.isfinite(norms))


@pytest.mark.parametrize("variant", ["paper", "published"])
@pytest.mark.parametrize(
    "inner", [optax.scale_by_adam(), optax.trace(0.9)], ids=["adam", "trace"]
)
def test_a_finite_gradient_with_squares_beyond_float32_is_skipped(inner, variant):
    """First, and between others, which step as if it had not been."""
    g = jax.random.normal(jax.random.key(0), (3, M, N))
    tx = bracket(orthonormal(8), inner, variant=variant)
    huge, one_huge = 1e30 * g[0], g[1].at[M - 1, 2].set(-1e30)
    updates, norms = run(tx, jnp.stack([huge, g[0], one_huge, huge, g[1], g[2]]))
    usual, usual_norms = run(tx, g)
    np.testing.assert_array_equal(updates[np.array([0, 2, 3])], 0)
    np.testing.assert_array_equal(updates[np.array([1, 4, 5])], usual)
    first, second, third = np.asarray(usual_norms)
    np.testing.assert_array_equal(norms, [-1, *[first] * 3, second, third])


@pytest.mark.parametrize("variant", ["paper", "published"])
def test_a_residual_whose_norm_overflows_is_left_out_of_its_step(variant):
    """The gradient's squares are finite, and those of the step are not."""
    sizes = jnp.array([1e15, 1, 1e15, 1]).reshape(4, 1, 1)
    g = sizes * jax.random.normal(jax.random.key(0), (4, M, N))
    s = jnp.asarray(orthonormal(8), jnp.float32)

    def signed_square(x):
        return x * jnp.abs(x)

    inner = optax.stateless(lambda us, _: jax.tree.map(signed_square, us))
    updates, norms = run(bracket(s, inner, variant=variant), g)
    inside = s @ signed_square(s.T @ g)
    at = np.array([0, 2])
    size = jnp.abs(inside[at]).max()
    # Float32 sums of up to M products.
    np.testing.assert_allclose(updates[at] / size, inside[at] / size, atol=1e-6)
    assert jnp.abs(updates[1] - inside[1]).max() > 0.1  # a residual
    assert norms[0] == -1
    assert norms[1] > 0
    assert norms[2] == norms[1]
    # The next one is limited against it.
    np.testing.assert_allclose(norms[3], LIMIT * norms[2], rtol=1e-5)


def test_a_column_without_a_projection_gets_no_residual():
    s = jnp.eye(M, R)
    g = jnp.ones((M, N)).at[:R, 3].set(0.0)  # column 3 is outside the subspace
    updates, _ = run(bracket(s, optax.trace(0.9)), jnp.stack([g, g]))
    np.testing.assert_array_equal(updates[:, R:, 3], 0)
    assert (updates[0, R:, 2] == 1).all()


def test_unknown_variant():
    unknown: Any = "torch"
    with pytest.raises(ValueError, match="variant='torch': choose \"paper\" or"):
        lro.recover_residual(1.01, variant=unknown)


def test_it_needs_its_stages():
    s = orthonormal(9)[None]
    replay, back = lro.bases.replay({"w": s}), lro.recover_residual()
    g = {"w": jnp.ones((M, N))}

    def update(*stages):
        tx = lro.low_rank(optax.chain(*stages), rank=R, refresh_every=1)
        tx.update(g, tx.init(g))

    with pytest.raises(ValueError, match=r"w: .*put project\(\) before"):
        update(replay, back)
    with pytest.raises(ValueError, match=r"w: .*put in_subspace\(\) or rotate_moments"):
        update(replay, lro.project(), back)


def test_after_a_thousand_zero_gradients_a_step_grows_as_adams_does() -> None:
    """V has decayed, and its bias correction is over; the residual adds nothing."""
    rng = np.random.default_rng(0)
    drift = rng.normal(size=(M, N))
    after = [0.5 * drift + rng.normal(size=(M, N)) for _ in range(40)]
    grads = np.concatenate([np.stack(after[:20]), np.zeros((1000, M, N)), after])

    def growth(tx: Any) -> float:
        def step(state: Any, g: Any) -> Any:
            updates, state = tx.update({"w": g}, state, {"w": g})
            return state, jnp.linalg.norm(updates["w"])

        def largest(grads: Any) -> Any:
            return jnp.max(jax.lax.scan(step, tx.init({"w": grads[0]}), grads)[1][-40:])

        late, fresh = map(jax.jit(largest), (grads, np.stack(after)))
        return float(late / fresh)

    of_adam = growth(optax.adamw(1.0))
    assert 1.5 < of_adam < 10
    for make in (lro.grass_jump, lro.grass_walk):
        assert growth(make(1.0, key=0, rank=3, dimension_numbers=None)) < of_adam
