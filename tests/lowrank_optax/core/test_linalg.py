"""Orthonormal bases and left singular factors, on easy and on bad matrices."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import subspace_angles

from lowrank_optax.core import linalg, singular

M, R, N = 40, 12, 64
# What the bases promise in float32 (eps 1.2e-7); in float64 rounding is 5e8 times
# smaller, and a few eps * sqrt(M) is what is left.
ORTHONORMAL = {jnp.float32: 1e-5, jnp.float64: 1e-13}

orthonormalize = jax.jit(linalg.orthonormalize)
orthonormality_error = jax.jit(linalg.orthonormality_error)


@pytest.fixture(params=[jnp.float32, jnp.float64], ids=["f32", "f64"])
def dtype(request):
    with jax.enable_x64(request.param is jnp.float64):
        yield request.param


def rotation(rng, n, columns=None):
    return np.linalg.qr(rng.normal(size=(n, columns or n)))[0]


def with_spectrum(values, rows=M, columns=N, seed=0):
    """A (rows, columns) float64 matrix with these singular values."""
    rng = np.random.default_rng(seed)
    r = len(values)
    return rotation(rng, rows, r) * np.asarray(values) @ rotation(rng, columns, r).T


def conditioned(condition, seed=0):
    return with_spectrum(np.geomspace(1, 1 / condition, R), columns=R, seed=seed)


def bad_inputs():
    yield "gaussian", np.random.default_rng(0).normal(size=(M, R))
    for power in (3, 4, 5, 7, 9, 12):
        yield f"condition 1e{power}", conditioned(10.0**power)
    yield "rank 3", with_spectrum([1, 1, 1], columns=R)
    yield "rank 1, equal columns", np.ones((M, R))
    yield "zero", np.zeros((M, R))
    yield "zero column", conditioned(2) * (np.arange(R) > 0)
    yield "1e-30", 1e-30 * conditioned(10)
    yield "1e30", 1e30 * conditioned(10)
    yield "columns from 1e-30 to 1e30", conditioned(2) * np.geomspace(1e-30, 1e30, R)


@pytest.mark.parametrize(("x"), [pytest.param(x, id=name) for name, x in bad_inputs()])
def test_orthonormalize_is_orthonormal(x, dtype):
    q = orthonormalize(jnp.asarray(x, dtype))
    assert q.dtype == dtype
    assert q.shape == x.shape
    assert orthonormality_error(q) < ORTHONORMAL[dtype]


@pytest.mark.parametrize("rank", [0, 1, 50, 199])
def test_orthonormalize_completes_a_square_matrix(rank, dtype):
    """The hardest case: of square Gaussian noise the condition number is large."""
    x = np.random.default_rng(rank).normal(size=(2, 200, rank))
    x = x @ np.random.default_rng(7).normal(size=(rank, 200))
    q = orthonormalize(jnp.asarray(x, dtype))
    assert orthonormality_error(q) < ORTHONORMAL[dtype]


def test_long_columns_of_rank_one_are_completed(dtype):
    """Rounding of a sum of 4,096 squares is above eps, which few columns show."""
    rng = np.random.default_rng(4)
    for r in (2, 3, 4):
        x = np.abs(rng.normal(size=(6, 4096, 1)) @ rng.normal(size=(6, 1, r)))
        q = orthonormalize(jnp.asarray(x, dtype))
        # sqrt(m) eps is what such a sum rounds by.
        assert orthonormality_error(q) < 64 * jnp.finfo(dtype).eps
    # Here a shift of eps alone leaves a NaN.
    long = np.repeat(np.abs(np.random.default_rng(1).normal(size=(2**18, 1))), 2, 1)
    q = orthonormalize(jnp.asarray(long, dtype))
    assert orthonormality_error(q) < 2 * 2**9 * jnp.finfo(dtype).eps
    few = rng.normal(size=(3072, 64)) * (np.arange(64) < 3)
    assert orthonormality_error(orthonormalize(jnp.asarray(few, dtype))) < 6e-6


@pytest.mark.parametrize("by", [1e-12, 1e-22, 1e-26, 1e-34])
def test_a_column_far_below_the_others_keeps_its_direction(by, dtype):
    x = np.random.default_rng(0).normal(size=(64, 8))
    scaled = jnp.asarray(x * np.where(np.arange(8) == 3, by, 1), dtype)
    q = np.asarray(orthonormalize(scaled), np.float64)
    column = x[:, 3] / np.linalg.norm(x[:, 3])
    assert np.linalg.norm(column - q @ (q.T @ column)) < 20 * jnp.finfo(dtype).eps


@pytest.mark.parametrize("rank", [1, 7, 12])
def test_orthonormalize_keeps_the_span_without_full_rank(rank, dtype):
    x = with_spectrum(np.ones(rank), columns=R)
    q = np.asarray(orthonormalize(jnp.asarray(x, dtype)), np.float64)
    outside = x - q @ (q.T @ x)
    # The noise has columns of length eps sqrt(M), and X of length one.
    assert np.linalg.norm(outside, axis=0).max() < 8 * jnp.finfo(dtype).eps


@pytest.mark.parametrize("condition", [1, 10, 1e2, 1e3, 1e4])
def test_orthonormalize_keeps_the_span(condition, dtype):
    x = conditioned(condition)
    q = np.asarray(orthonormalize(jnp.asarray(x, dtype)), np.float64)
    # Rounding of relative size eps turns a column space by eps * condition;
    # the factor is for M = 40 rows and two passes.
    bound = 100 * jnp.finfo(dtype).eps * condition
    assert subspace_angles(x, q).max() < bound


@pytest.mark.parametrize("bad", ["zero", "rank 3", "condition 1e12"])
def test_one_bad_matrix_does_not_spoil_its_batch(bad):
    good = conditioned(3)
    batch = np.stack([good, dict(bad_inputs())[bad], 1e-20 * good]).reshape(3, 1, M, R)
    q = orthonormalize(jnp.asarray(batch, jnp.float32))
    assert q.shape == batch.shape
    assert orthonormality_error(q) < ORTHONORMAL[jnp.float32]
    for i in (0, 2):
        # 100 eps, as above for condition 3.
        assert subspace_angles(good, np.asarray(q[i, 0], np.float64)).max() < 4e-5


# --- what a TPU takes in place of a triangular solve and a QR ---


@pytest.mark.parametrize("r", [3, 4, 5, 13, 16])
def test_the_inverse_of_a_cholesky_factor(r, dtype, monkeypatch):
    monkeypatch.setattr(linalg, "PANEL", 4)
    a = np.cov(np.random.default_rng(r).normal(size=(r, 3 * r)))
    batch = np.stack([a, 4 * a])
    inverse = linalg.inverse_cholesky(jnp.asarray(batch, dtype))
    assert (inverse.shape, inverse.dtype) == ((2, r, r), dtype)
    assert not np.triu(inverse, 1).any()
    # The residual of an inverse is eps times the condition number, at most 30 here.
    eps = float(jnp.finfo(dtype).eps)
    lower = np.linalg.cholesky(batch)
    np.testing.assert_allclose(inverse @ lower, [np.eye(r)] * 2, atol=100 * eps)


@pytest.mark.parametrize("condition", [1, 1e2, 1e4, 1e12])
def test_orthonormalize_as_a_tpu_does_it(condition, dtype, monkeypatch):
    monkeypatch.setattr(linalg, "PANEL", 5)
    monkeypatch.setattr(
        jax.lax, "platform_dependent", lambda *args, tpu, **_: tpu(*args)
    )
    x = conditioned(condition)
    q = jax.jit(lambda x: linalg.orthonormalize(x))(jnp.asarray(x, dtype))
    assert orthonormality_error(q) < ORTHONORMAL[dtype]
    # Of the leading third: 100 eps times the condition number among these.
    seen = np.linalg.svd(x)[0][:, : R // 3]
    bound = 100 * float(jnp.finfo(dtype).eps) * condition ** (1 / 3)
    assert subspace_angles(seen, np.asarray(q, np.float64)).max() < bound


@pytest.mark.parametrize(("x"), [pytest.param(x, id=name) for name, x in bad_inputs()])
def test_orthonormalize_as_a_gpu_does_it(x, dtype, monkeypatch):
    expected = orthonormalize(jnp.asarray(x, dtype))
    monkeypatch.setattr(
        jax.lax, "platform_dependent", lambda *args, default, **_: default(*args)
    )
    q = jax.jit(lambda x: linalg.orthonormalize(x))(jnp.asarray(x, dtype))
    # Another order of sums, of what is orthonormal to a few eps.
    assert orthonormality_error(q) < ORTHONORMAL[dtype]
    if np.linalg.cond(x) < 1e3:
        np.testing.assert_allclose(q, expected, atol=1e3 * jnp.finfo(dtype).eps)


@pytest.mark.parametrize(("x"), [pytest.param(x, id=name) for name, x in bad_inputs()])
def test_a_qr_by_panels_is_orthonormal_and_keeps_the_span(x, dtype, monkeypatch):
    monkeypatch.setattr(linalg, "PANEL", 5)
    x = jnp.asarray(x, dtype)
    x = x / linalg.largest(x)  # as `orthonormalize` hands it over
    q = jax.jit(linalg.qr_by_panels)(x)
    assert (q.shape, q.dtype) == (x.shape, dtype)
    assert orthonormality_error(q) < ORTHONORMAL[dtype]
    # What of x is not in the span of q is rounding, of the longest column's size.
    lost = x - linalg.matmul(q, linalg.matmul(linalg.transpose(q), x))
    assert jnp.abs(lost).max() < 100 * jnp.finfo(dtype).eps


@pytest.mark.parametrize("r", [5, 37, M])
def test_a_qr_by_panels_completes_a_basis(r, monkeypatch):
    """Of ones, which have rank 1: up to as many columns as there are rows."""
    monkeypatch.setattr(linalg, "PANEL", 5)
    q = jax.jit(linalg.qr_by_panels)(jnp.ones((M, r)))
    assert orthonormality_error(q) < ORTHONORMAL[jnp.float32]


@pytest.mark.parametrize("panels", [False, True])
def test_a_complement_completes_a_basis(dtype, panels, monkeypatch):
    """By a QR, and as a TPU does it."""
    x = np.random.default_rng(0).normal(size=(3, M, R))
    u = linalg.orthonormalize(jnp.asarray(x, dtype))
    if panels:
        monkeypatch.setattr(linalg, "PANEL", 5)
        monkeypatch.setattr(
            jax.lax, "platform_dependent", lambda *args, tpu, **_: tpu(*args)
        )
    whole = jnp.concatenate([u, linalg.complement(u)], axis=-1)
    assert whole.shape == (3, M, M)
    assert orthonormality_error(whole) < ORTHONORMAL[dtype]


def test_polish_squares_the_error(dtype):
    rng = np.random.default_rng(1)
    s = rotation(rng, M, R)
    with_error = s @ (np.eye(R) + 1e-3 * rng.normal(size=(R, R)))
    before = np.abs(with_error.T @ with_error - np.eye(R)).max()
    q = linalg.polish(jnp.asarray(with_error, dtype))
    # S = U (1 + e) V^T becomes 1 - 1.5 e^2 - ...: the error is 3/4 of the square of
    # the old one in the spectral norm, at most R times that of the largest entry.
    eps = float(jnp.finfo(dtype).eps)
    assert orthonormality_error(q) < 0.75 * R**2 * before**2 + 10 * eps
    # Towards the nearest orthonormal matrix, the polar factor: same column space.
    assert subspace_angles(s, np.asarray(q, np.float64)).max() < 100 * eps


def test_eigh(dtype):
    a = np.random.default_rng(2).normal(size=(2, 3, 9, 9))
    a = jnp.asarray(a + np.swapaxes(a, -1, -2), dtype)
    values, vectors = jax.jit(linalg.eigh)(a)
    assert values.shape == (2, 3, 9)
    assert jnp.all(jnp.diff(values) >= 0)
    # Backward stable: a few eps times the norm (about 8).
    tolerance = 100 * float(jnp.finfo(dtype).eps)
    product = jnp.matmul(
        vectors * values[..., None, :], linalg.transpose(vectors), precision="highest"
    )
    np.testing.assert_allclose(product, a, atol=tolerance)
    assert orthonormality_error(vectors) < tolerance


def test_fix_signs():
    u = rotation(np.random.default_rng(3), M, R).astype(np.float32)
    flips = np.where(np.arange(R) % 2, -1, 1).astype(np.float32)
    fixed = np.asarray(singular.fix_signs(jnp.asarray(u)))
    np.testing.assert_array_equal(np.abs(fixed), np.abs(u))
    assert (np.take_along_axis(fixed, abs(fixed).argmax(0)[None], 0) > 0).all()
    np.testing.assert_array_equal(singular.fix_signs(jnp.asarray(u * flips)), fixed)
    np.testing.assert_array_equal(singular.fix_signs(jnp.zeros((4, 2))), 0)


SPECTRUM = np.linspace(2, 1, M) ** 2  # relative gaps of 1/20 and more


@pytest.mark.parametrize("decomposition", ["svd", "gram", None])
def test_left_singular_recovers_the_factors(decomposition, dtype):
    g = np.stack([with_spectrum(SPECTRUM, seed=s) for s in range(2)])
    u, s = singular.left_singular(jnp.asarray(g, dtype), decomposition)
    assert (u.shape, s.shape, u.dtype, s.dtype) == ((2, M, M), (2, M), dtype, dtype)
    eps = float(jnp.finfo(dtype).eps)
    # Values: eps times the largest (4) with a factor for 40 x 64 entries; the Gram
    # matrix squares the condition number, 4, which costs that factor again.
    np.testing.assert_allclose(s, np.broadcast_to(SPECTRUM, (2, M)), atol=100 * eps)
    assert orthonormality_error(u) < ORTHONORMAL[dtype]
    exact = np.linalg.svd(g)[0]
    cosines = np.abs(np.einsum("lij,lij->lj", exact, np.asarray(u, np.float64)))
    # The angle of a vector is the error over the gap (0.05): 100 eps * 4 / 0.05,
    # and one minus its cosine half the square of that plus rounding.
    assert 1 - cosines.min() < (8000 * eps) ** 2 + 100 * eps


@pytest.mark.parametrize("decomposition", ["svd", "gram"])
@pytest.mark.parametrize(
    ("name", "g"),
    [
        ("zero", np.zeros((M, N))),
        ("rank 1", np.outer(np.arange(M), np.ones(N))),
        ("rank 3", with_spectrum([1, 1, 1])),
        ("one entry", np.eye(M, N) * (np.arange(N) == 7)),
        ("condition 1e12", with_spectrum(np.geomspace(1, 1e-12, M))),
        ("1e-30", 1e-30 * with_spectrum(SPECTRUM)),
        ("1e30", 1e30 * with_spectrum(SPECTRUM)),
        ("square identity", np.eye(M)),
    ],
)
def test_left_singular_of_bad_gradients(name, g, decomposition, dtype):
    u, s = singular.left_singular(jnp.asarray(g, dtype), decomposition)
    assert orthonormality_error(u) < ORTHONORMAL[dtype]
    exact = np.linalg.svd(g, compute_uv=False)
    assert (np.asarray(s) >= 0).all()
    assert (np.diff(s) <= 0).all()
    eps = float(jnp.finfo(dtype).eps)
    # Documented: the Gram matrix loses what lies under sqrt(eps) of the largest.
    relative = 2 * np.sqrt(eps) if decomposition == "gram" else 100 * eps
    np.testing.assert_allclose(s, exact, rtol=0, atol=relative * exact[0])
    rank = int((exact > eps**0.25 * exact[0]).sum())
    if 0 < rank < M:
        top = np.linalg.svd(g)[0][:, :rank]
        # The large values' space: eps over the gap to the rest in the Gram matrix.
        gap = (exact[rank - 1] ** 2 - exact[rank] ** 2) / exact[0] ** 2
        found = np.asarray(u[:, :rank], np.float64)
        assert subspace_angles(top, found).max() < 100 * eps / gap


def test_svd_and_gram_agree_on_the_leading_projector(dtype):
    g = jnp.asarray(with_spectrum(SPECTRUM), dtype)
    p, q = (singular.leading(g, R, d) for d in ("svd", "gram"))
    # Error over gap, as above: 100 eps * 4 / 0.05.
    tolerance = 8000 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(p @ p.T, q @ q.T, atol=tolerance)
    # And with the signs fixed, vector by vector.
    np.testing.assert_allclose(p, q, atol=tolerance)


def test_randomized_captures_a_decaying_spectrum(dtype):
    decay = 0.5 ** np.arange(M)
    g = np.stack([with_spectrum(decay, seed=s) for s in range(3)])
    keys = jax.random.split(jax.random.key(0), 3)
    s = jax.jit(lambda g: singular.leading(g, 6, "randomized", keys))(
        jnp.asarray(g, dtype)
    )
    assert s.shape == (3, M, 6)
    assert orthonormality_error(s) < ORTHONORMAL[dtype]
    for one, found in zip(g, np.asarray(s, np.float64), strict=True):
        top = np.linalg.svd(one)[0][:, :6]
        # Two power steps and 8 spare columns: the part of the tail that leaks in is
        # (sigma_15 / sigma_6)^5 = 2^-45; float32 adds eps over the gap of 2^-7 and
        # the square root of it from the small Gram problem.
        bound = 1e-11 if dtype == jnp.float64 else 2e-3
        assert subspace_angles(top, found).max() < bound


def test_randomized_without_decay_is_orthonormal_and_seeded():
    leading = jax.jit(lambda g, seed: singular.leading(g, R, "randomized", seed))
    key, other = jax.random.split(jax.random.key(1))
    for g in (jnp.zeros((M, N)), jnp.ones((M, N)), jnp.eye(M, N)):
        s = leading(g, key)
        assert orthonormality_error(s) < ORTHONORMAL[jnp.float32]
        np.testing.assert_array_equal(s, leading(g, key))
    assert jnp.any(s != leading(g, other))


def test_iterate_comes_nearer_from_the_old_basis(dtype):
    # Slow decay: two steps leave an angle from a random start, but not from a near one.
    slow = 0.9 ** np.arange(M)
    g = jnp.asarray(with_spectrum(slow), dtype)
    top = np.linalg.svd(np.asarray(g, np.float64))[0][:, :R]
    rng = np.random.default_rng(0)
    near = np.linalg.qr(top + 1e-3 * rng.normal(size=top.shape))[0]
    far = np.linalg.qr(rng.normal(size=top.shape))[0]

    def angle(old):
        keys, old = jax.random.split(jax.random.key(0), 1)[0], jnp.asarray(old, dtype)
        s = jax.jit(lambda old: singular.leading(g, R, "iterate", keys, old))(old)
        assert orthonormality_error(s) < ORTHONORMAL[dtype]
        return subspace_angles(top, np.asarray(s, np.float64)).max()

    assert angle(near) < 1e-3 < angle(far)


def tf32(x):
    """float32 with TF32's ten bits after the binary point, as its products read it."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    bits = (bits + 0x1000) & jnp.uint32(0xFFFFE000)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


@pytest.mark.parametrize("decomposition", ["randomized", "iterate"])
def test_coarse_products_do_not_leave_the_columns_of_a_gradient(
    decomposition, monkeypatch
):
    """A rank below r: what lies outside of the basis is float32's rounding."""
    exact = linalg.product

    def rounded(a, b, precision=linalg.EXACT):
        if precision == linalg.COARSE:
            a, b = tf32(a), tf32(b)
        return exact(a, b)

    monkeypatch.setattr(linalg, "product", rounded)
    g = jnp.asarray(with_spectrum([4.0, 3, 0.5]), jnp.float32)
    keys = jax.random.split(jax.random.key(0), 1)[0]
    old = jnp.eye(M, 8) if decomposition == "iterate" else None
    s = singular.leading(g, 8, decomposition, keys, old)
    u = np.linalg.svd(np.asarray(g, np.float64))[0][:, :3]
    # 16 eps of float32. With all products coarse the angles are 1e-4.
    assert subspace_angles(u, np.asarray(s, np.float64)).max() < 2e-6


@pytest.mark.parametrize("condition", [1e3, 1e5, 1e6])
def test_orthonormalize_takes_large_condition_numbers(condition):
    """CholeskyQR2 breaks down at 4e3 in float32; the span has to stay."""
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.normal(size=(n, 12)))[0] for n in (60, 12))
    x = jnp.asarray((u * np.geomspace(1, 1 / condition, 12)) @ v.T, jnp.float32)
    q = np.asarray(jax.jit(linalg.orthonormalize)(x), np.float64)
    np.testing.assert_allclose(q.T @ q, np.eye(12), atol=6e-6)
    # Of the directions that float32 still sees well: eps times the condition.
    assert subspace_angles(u[:, :6], q).max() < 3e-7 * condition


def test_a_basis_does_not_depend_on_what_shares_its_call():
    rng = np.random.default_rng(0)
    good = jnp.asarray(rng.normal(size=(16, 4)), jnp.float32)
    steep = jnp.asarray(rng.normal(size=(16, 4)) * 10.0 ** -np.arange(0, 8, 2), "f4")
    flat = jnp.zeros((16, 4)).at[0].set(1)
    run = jax.jit(linalg.orthonormalize)
    together = run(jnp.stack([good, steep, flat]))
    for x, q in zip((good, steep, flat), together, strict=True):
        # On a CPU each matrix has its own call: the same bits.
        np.testing.assert_array_equal(q, run(x[None])[0])
        np.testing.assert_allclose(q.T @ q, np.eye(4), atol=6e-6)


def test_leading_is_the_head_of_left_singular():
    g = jnp.asarray(with_spectrum(SPECTRUM), jnp.float32)
    u, _ = singular.left_singular(g, "svd")
    np.testing.assert_array_equal(singular.leading(g, 5, "svd"), u[:, :5])


def test_bad_decompositions_say_what_to_do():
    g = jnp.ones((4, 6))
    with pytest.raises(ValueError, match="draws a sketch: pass a key"):
        singular.leading(g, 2, "randomized")
    with pytest.raises(ValueError, match="'iterate' draws a sketch: pass a key"):
        singular.leading(g, 2, "iterate")
    with pytest.raises(ValueError, match="'randomized' computes no full set"):
        singular.left_singular(g, "randomized")


def test_a_batch_is_the_loop_over_its_matrices():
    g = jnp.asarray(np.random.default_rng(4).normal(size=(2, 3, 8, 12)), jnp.float32)
    u, s = jax.jit(singular.left_singular)(g)
    assert (u.shape, s.shape) == ((2, 3, 8, 8), (2, 3, 8))
    one = jax.jit(singular.left_singular)
    for i, j in np.ndindex(2, 3):
        # The same LAPACK call on the same numbers: the same bits.
        np.testing.assert_array_equal(u[i, j], one(g[i, j])[0])
        np.testing.assert_array_equal(s[i, j], one(g[i, j])[1])


@pytest.mark.parametrize("shape", [(4, 6), (3, 4, 6)])
def test_per_matrix_under_vmap_takes_functions_that_close_over_arrays(shape):
    x = np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float32)

    def scaled(by, shared, x):
        return linalg.per_matrix(lambda x: by * x + shared, x)

    run = jax.jit(jax.vmap(jax.jit(scaled), in_axes=(0, None, 0)))
    found = run(jnp.array([2.0, 3.0]), jnp.float32(1), x)
    np.testing.assert_allclose(found[0], 2 * x[0] + 1, rtol=1e-6)
    np.testing.assert_allclose(found[1], 3 * x[1] + 1, rtol=1e-6)
    twice = jax.jit(jax.vmap(jax.vmap(scaled, (0, None, 0)), (0, 0, 0)))
    by, more = jnp.array([[2.0, 3.0], [4.0, 5.0]]), jnp.array([1.0, 2.0])
    found = twice(by, more, np.stack([x, -x]))
    np.testing.assert_allclose(found[1, 1], -5 * x[1] + 2, rtol=1e-6)


def test_a_cond_under_vmap_may_orthonormalize():
    x = np.random.default_rng(0).standard_normal((3, 16, 4), np.float32)

    def one(which, x):
        return jax.lax.cond(which, linalg.orthonormalize, lambda x: x, x)

    found = jax.jit(jax.vmap(one))(jnp.array([True, False, True]), x)
    np.testing.assert_array_equal(found[1], x[1])
    for i in (0, 2):
        np.testing.assert_allclose(found[i].T @ found[i], np.eye(4), atol=1e-5)


@pytest.mark.slow
def test_a_batch_without_full_rank_as_xla_compiles_it_outside_of_tests() -> None:
    """XLA's maximum of NaNs was -inf there, and NaNs passed for orthonormal."""
    code = """
import jax, jax.numpy as jnp
from lowrank_optax.core import linalg
w = jax.random.normal(jax.random.key(0), (4, 64, 16))
q = jax.jit(linalg.orthonormalize)(jnp.concatenate([w, w], axis=-1))
assert jnp.abs(linalg.minus_identity(linalg.gram(q))).sum() < 1e-2
"""
    plain = {"XLA_FLAGS": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | plain)
