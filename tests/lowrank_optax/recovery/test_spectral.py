"""The residual's polar factor: Newton-Schulz, `spectral_residual`, `spectral_adam`."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lowrank_optax as lro
from lowrank_optax.core.frame import eye_basis
from lowrank_optax.core.newton_schulz import (
    FITTED,
    MUON,
    Quintic,
    newton_schulz,
    polar_of_spectrum,
)

A, B, C = 3.4445, -4.7750, 2.0315


def odd_quintic(s: np.ndarray, iterations: int) -> np.ndarray:
    """What five times do to singular values: the scalar map, iterated."""
    for _ in range(iterations):
        s = A * s + B * s**3 + C * s**5
    return s


def by_svd(x: np.ndarray, iterations: int) -> np.ndarray:
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    return (u * odd_quintic(s / np.linalg.norm(x), iterations)) @ vt


def by_fit(x: np.ndarray, coefficients: Sequence[Quintic] = FITTED) -> np.ndarray:
    """U p(s) V^T, with the singular values over their Schatten-8 norm."""
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    s = s / np.sum(s**8) ** 0.125
    for a, b, c in coefficients:
        s = a * s + b * s**3 + c * s**5
    return (u * s) @ vt


def matrix(seed: int, m: int, n: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(m, n))


def stages(scale: float = 1.0, **options: object) -> optax.GradientTransformation:
    return optax.chain(
        lro.dominant_svd(),
        lro.project(),
        lro.in_subspace(optax.identity()),
        lro.spectral_residual(scale=scale, dtype=None, **options),
    )


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 99), st.integers(1, 8), st.integers(1, 6))
def test_newton_schulz_is_a_polynomial_of_singular_values(
    seed: int, m: int, iterations: int
) -> None:
    with jax.enable_x64(True):
        x = matrix(seed, m, 8)
        found = newton_schulz(jnp.asarray(x), iterations)
        # Rounding, grown by the map's slope at zero, 3.4 a time.
        np.testing.assert_allclose(found, by_svd(x, iterations), atol=1e-11)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 99), st.integers(1, 8), st.floats(1e-6, 1e6))
def test_the_polar_factor_is_a_polynomial_of_singular_values(
    seed: int, m: int, size: float
) -> None:
    with jax.enable_x64(True):
        x = size * matrix(seed, m, 8)
        found, squared = polar_of_spectrum(jnp.asarray(x), FITTED)
        np.testing.assert_allclose(found, by_fit(x), atol=1e-12)
        np.testing.assert_allclose(squared, np.sum(x**2), rtol=1e-12)


def test_the_fitted_steps_whiten_a_spectrum_like_those_of_residuals() -> None:
    # Singular values of the residuals of LLaMA-60M lie in 0.02 to 1 times the norm.
    # The largest few, above 0.75, may end lower.
    whole = np.geomspace(1e-3, 1, 4000)
    s = whole
    for a, b, c in FITTED:
        s = a * s + b * s**3 + c * s**5
    assert s.min() > 0
    assert s.max() < 1.25
    assert s[(whole > 0.02) & (whole < 0.75)].min() > 0.88


def test_sizes_that_are_padded_give_the_same() -> None:
    x = matrix(0, 515, 701).astype(np.float32)
    found, _ = polar_of_spectrum(jnp.asarray(x), FITTED)
    assert found.shape == x.shape
    # Float32 rounding, 6e-8, of sums over 701 terms and through two steps.
    np.testing.assert_allclose(found, by_fit(np.float64(x)), atol=3e-6)


def test_five_times_bring_singular_values_near_one() -> None:
    s = odd_quintic(np.geomspace(3e-3, 1, 1000), 5)
    assert s.min() > 0.67
    assert s.max() < 1.21


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (2, 6, 10)])
def test_the_step_is_the_papers_on_both_sides(shape: tuple[int, ...]) -> None:
    with jax.enable_x64(True):
        g = np.random.default_rng(0).normal(size=shape)
        spec = lro.STACKED if len(shape) == 3 else "matrix"
        tx = lro.low_rank(
            stages(0.25, residual_scale=0.5),
            rank=2,
            refresh_every=1,
            dimension_numbers=[("", spec)],
        )
        found, _ = tx.update({"w": jnp.asarray(g)}, tx.init({"w": jnp.asarray(g)}))

        def expected(g: np.ndarray) -> np.ndarray:
            if g.shape[0] > g.shape[1]:
                return expected(g.T).T
            u, s, vt = np.linalg.svd(g, full_matrices=False)
            kept = (u[:, :2] * s[:2]) @ vt[:2]
            rest = by_fit(g - kept)
            return 0.25 * kept + 0.5 * np.sqrt(g.shape[1]) * rest

        wanted = np.stack([expected(x) for x in g.reshape(-1, *g.shape[-2:])])
        np.testing.assert_allclose(found["w"], wanted.reshape(shape), atol=1e-10)


@pytest.mark.parametrize("shape", [(6, 10), (10, 6)])
def test_neurons_are_normalized_by_a_mean_of_their_squares(
    shape: tuple[int, int],
) -> None:
    """Flax's kernels are (inputs, outputs): the outputs are columns here."""
    tx = lro.low_rank(stages(0.0, neuron_decay=0.6), rank=2, refresh_every=1)
    grads = [matrix(seed, *shape) * np.geomspace(1, 9, shape[1]) for seed in range(3)]
    grads.insert(1, np.zeros(shape))  # leaves v as it was
    v, expected, found = np.zeros(shape[1]), [], []
    with jax.enable_x64(True):
        state, update = tx.init({"w": jnp.zeros(shape)}), jax.jit(tx.update)
        for g in grads:
            step, state = update({"w": jnp.asarray(g)}, state)
            found.append(np.asarray(step["w"]))
            if not g.any():
                expected.append(g)
                continue
            low = g if shape[0] < shape[1] else g.T
            u, s, vt = np.linalg.svd(low, full_matrices=False)
            rest = by_fit(low - (u[:, :2] * s[:2]) @ vt[:2])
            o = rest if shape[0] < shape[1] else rest.T
            v = 0.6 * v + 0.4 * np.mean(o**2, axis=0)
            x = o / np.sqrt(v)
            x = x * np.linalg.norm(o) / np.linalg.norm(x)
            if shape[0] < shape[1]:
                x = x - u[:, :2] @ (u[:, :2].T @ x)
            else:
                x = x - x @ u[:, :2] @ u[:, :2].T
            expected.append(0.5 * np.sqrt(10) * x)
    np.testing.assert_allclose(found, expected, atol=1e-9)
    assert optax.tree.get(state, "neurons")["w"].shape == (shape[1],)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 99), st.floats(1e-6, 1e6))
def test_the_rest_does_not_depend_on_the_gradients_size(seed: int, by: float) -> None:
    with jax.enable_x64(True):
        g = {"w": jnp.asarray(matrix(seed, 5, 9))}
        tx = lro.low_rank(stages(0.0), rank=2, refresh_every=1)
        one, _ = tx.update(g, tx.init(g))
        other, _ = tx.update(jax.tree.map(lambda x: by * x, g), tx.init(g))
        # The basis is another SVD's, and S G~ of a size that cancels in G - S G~.
        np.testing.assert_allclose(one["w"], other["w"], atol=1e-9)


def test_a_residual_that_is_rounding_gives_nothing() -> None:
    g = {"w": jnp.asarray(matrix(0, 8, 2) @ matrix(1, 2, 16), jnp.float32)}
    tx = lro.low_rank(stages(0.0), rank=2, refresh_every=1)
    np.testing.assert_array_equal(tx.update(g, tx.init(g))[0]["w"], 0)
    tx = lro.low_rank(stages(0.0), rank=1, refresh_every=1)
    assert jnp.linalg.norm(tx.update(g, tx.init(g))[0]["w"]) > 1


@pytest.mark.parametrize(("m", "n", "r"), [(6, 11, 3), (128, 344, 32), (512, 640, 128)])
def test_the_step_outside_is_outside(m: int, n: int, r: int) -> None:
    """Rounding to bfloat16 in the subspace grew to a third of the step."""
    tx = lro.low_rank(
        optax.chain(
            lro.grassmann_jump(key=0),
            lro.project(),
            lro.in_subspace(optax.identity()),
            lro.spectral_residual(scale=0.0),
        ),
        rank=r,
        refresh_every=1,
    )
    g = {"w": jnp.asarray(matrix(0, m, n), jnp.float32)}
    updates, state = jax.jit(tx.update)(g, tx.init(g))
    basis = optax.tree.get_all_with_path(state, "basis")[0][1]["w"]
    s, step = np.float64(basis), np.float64(updates["w"])
    assert np.linalg.norm(s.T @ step) < 1e-5 * np.linalg.norm(step)
    assert np.linalg.norm(step) > 0.3 * np.sqrt(n * (m - r))


def test_a_zero_gradient_moves_nothing() -> None:
    g = {"w": jnp.zeros((4, 6))}
    tx = lro.spectral_adam(0.1, rank=2, dimension_numbers=None)
    np.testing.assert_array_equal(tx.update(g, tx.init(g), g)[0]["w"], 0)


def test_a_basis_that_is_not_orthonormal_is_refused() -> None:
    chain = optax.chain(
        lro.bases.gaussian(0),
        lro.project(),
        lro.in_subspace(optax.identity()),
        lro.spectral_residual(),
    )
    g = {"w": jnp.ones((4, 6))}
    tx = lro.low_rank(chain, rank=2, refresh_every=1)
    with pytest.raises(ValueError, match=r"w: spectral_residual.*not orthonormal"):
        tx.update(g, tx.init(g))
    for bad in ((), (3.4, -4.7, 2.0), ((1.0, 2.0),), 5):
        with pytest.raises(ValueError, match=r"give a sequence of triples \(a, b, c\)"):
            lro.spectral_residual(coefficients=bad)
    with pytest.raises(ValueError, match="dtype=float16"):
        lro.spectral_residual(dtype=jnp.float16)


def test_a_residual_whose_squares_overflow_gets_no_step() -> None:
    """The polar factor would be NaN, and S^T G, which decides on a step, is finite."""
    tx = lro.low_rank(
        optax.chain(
            lro.basis_rule(lambda frame, *_: eye_basis(frame), from_gradient=False),
            lro.project(),
            lro.in_subspace(optax.identity()),
            lro.spectral_residual(),
        ),
        rank=2,
        refresh_every=1,
        dimension_numbers=None,
    )
    g = {"w": jnp.full((6, 9), 1e25).at[:2].set(0)}
    assert not tx.update(g, tx.init(g))[0]["w"].any()


def test_spectral_adam_is_its_chain() -> None:
    g = {"mlp": {"kernel": jnp.asarray(matrix(0, 6, 10), jnp.float32)}}
    chain = optax.chain(
        lro.bases.power_iterate(b1=0.8),
        lro.project(),
        lro.rotate_moments(optax.scale_by_adam(0.8, 0.9, 1e-8)),
        lro.spectral_residual(0.3, scale=0.5, coefficients=[MUON]),
    )
    options = {"rank": 2, "refresh_every": 2, "weight_decay": 0.1}
    by_hand = lro.low_rank_optimizer(chain, 0.1, **options)
    named = lro.spectral_adam(
        0.1,
        b1=0.8,
        b2=0.9,
        scale=0.5,
        residual_scale=0.3,
        coefficients=[MUON],
        **options,
    )
    states = [tx.init(g) for tx in (by_hand, named)]
    for seed in range(4):
        grad = {"mlp": {"kernel": jnp.asarray(matrix(seed, 6, 10), jnp.float32)}}
        for i, tx in enumerate((by_hand, named)):
            updates, states[i] = tx.update(grad, states[i], g)
            if i == 0:
                wanted = updates
        np.testing.assert_array_equal(wanted["mlp"]["kernel"], updates["mlp"]["kernel"])
