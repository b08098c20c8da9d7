"""Alice: the switched basis, what it tracks, and the compensation of what is lost."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lowrank_optax as lro

M, N, R = 8, 12, 3
few = settings(derandomize=True, deadline=None, max_examples=20)


def normal(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def orthonormal(rows: int = M, columns: int = R, seed: int = 1) -> Any:
    return np.linalg.qr(normal(rows, columns, seed=seed))[0]


# ------------------------------------------------------------------ compensation


def bracket(basis: Any, inner: Any = None, **options: Any) -> Any:
    stages = optax.chain(
        lro.bases.replay({"w": np.asarray(basis)[None]}),
        lro.project(),
        lro.in_subspace(inner or optax.identity()),
        lro.compensate_columns(**options),
    )
    return lro.low_rank(
        stages, rank=R, refresh_every=1000, dimension_numbers=lro.STACKED
    )


def run(tx: Any, gradients: Any) -> Any:
    """Updates, p and norms of a (K, ...) stack of gradients."""

    def step(state: Any, g: Any) -> Any:
        updates, state = tx.update({"w": g}, state)
        read = (optax.tree.get(state, name)["w"] for name in ("lost", "norm"))
        return state, (updates["w"], *read)

    first = {"w": jnp.asarray(gradients[0])}
    return jax.jit(lambda gs: jax.lax.scan(step, tx.init(first), gs)[1])(
        jnp.asarray(gradients)
    )


def inside(s: Any, x: Any) -> Any:
    return s @ (s.T @ x)


@few
@given(
    sizes=st.lists(st.floats(1e-3, 1e3), min_size=8, max_size=8),
    limit=st.sampled_from([1.0, 1.01, 2.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_lost_part_never_grows_faster_than_its_limit(
    sizes: list[float], limit: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    g = rng.normal(size=(8, M, N)) * np.reshape(sizes, (8, 1, 1))
    s = np.float64(orthonormal())
    s = np.linalg.qr(s)[0]
    with jax.enable_x64(True):
        updates, _, norms = map(np.asarray, run(bracket(s, limit=limit), g))
    lost = np.linalg.norm(updates - inside(s, updates), axis=(1, 2))
    # The number that is kept is the norm of what came out, to float64 rounding, or the
    # one before where this is less than a fifth of it.
    kept = lost.copy()
    for t in range(1, len(kept)):
        assert lost[t] <= limit * kept[t - 1] * (1 + 1e-9)
        if lost[t] < 0.2 * kept[t - 1]:
            kept[t] = kept[t - 1]
    np.testing.assert_allclose(kept, norms, rtol=1e-9)


@pytest.mark.parametrize("factor", [-1.0, 1e-6, 1e6])
def test_it_does_not_depend_on_the_gradients_size_and_turns_with_its_sign(
    factor: float,
) -> None:
    g, s = normal(6, M, N), orthonormal()
    adam = optax.scale_by_adam(eps=1e-30)
    plain, _, _ = run(bracket(s, adam, residual_scale=0.4), g)
    scaled, _, _ = run(bracket(s, adam, residual_scale=0.4), np.float32(factor) * g)
    np.testing.assert_allclose(np.sign(factor) * scaled, plain, atol=1e-4)


def test_it_does_not_depend_on_the_coordinates_of_the_subspace() -> None:
    g, s = normal(6, M, N), orthonormal()
    turned = s @ np.linalg.qr(normal(R, R, seed=9))[0]
    (a, *_), (b, *_) = (run(bracket(x, residual_scale=0.4), g) for x in (s, turned))
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_columns_come_back_at_one_size() -> None:
    """Whatever their own: sqrt(m - r) over the root of the mean of their squares."""
    g = np.repeat(normal(1, M, N), 60, axis=0) * np.geomspace(1e-3, 1e3, N)
    s = orthonormal()
    updates, _, _ = run(bracket(s, limit=10.0), g.astype(np.float32))
    lost = np.asarray(updates[-1]) - inside(s, np.asarray(updates[-1]))
    # p has come to within 0.9^60 = 2e-3 of the squares.
    np.testing.assert_allclose(np.linalg.norm(lost, axis=0), np.sqrt(M - R), rtol=3e-3)


def test_rounding_is_not_made_as_large_as_a_step() -> None:
    """A gradient inside of the subspace has lost nothing, but for its rounding."""
    s = orthonormal()
    g = np.stack([inside(s, normal(M, N, seed=t)) for t in range(4)])
    updates, lost, norms = run(bracket(s), g.astype(np.float32))
    np.testing.assert_allclose(updates, g, atol=1e-5)
    assert not lost.any()
    assert (norms == -1).all()  # and the first that loses something is free


@pytest.mark.parametrize(
    "spoil",
    [
        lambda g, s: 0 * g,
        lambda g, s: g.at[:, :, ::2].set(0.0),
        lambda g, s: g - s @ (s.T @ g),
        lambda g, s: g.at[1].set(0.0),
        lambda g, s: 1e-30 * g,
        lambda g, s: 1e15 * g,
    ],
    ids=["zero", "zero columns", "outside", "then zero", "tiny", "large"],
)
def test_no_nan(spoil: Any) -> None:
    s = jnp.asarray(orthonormal())
    g = spoil(jnp.asarray(normal(4, M, N)), s)
    for inner in (optax.scale_by_adam(), optax.identity()):
        for found in run(bracket(s, inner), g):
            assert jnp.isfinite(found).all()


def test_a_zero_gradient_moves_nothing_and_binds_nothing() -> None:
    g = normal(3, M, N)
    s = orthonormal()
    with_zero = np.stack([g[0], 0 * g[0], g[1]])
    updates, _, norms = run(bracket(s), with_zero)
    assert not np.asarray(updates[1]).any()
    assert norms[1] == norms[0]
    assert norms[2] > 0


@pytest.mark.parametrize("size", [1e-6, 1e-2, 0.1])
@pytest.mark.parametrize("make", [lro.recipes.alice, lro.recipes.racs])
def test_one_small_gradient_keeps_no_later_step_short(make: Any, size: float) -> None:
    """Each step grew by 1 % from it: the next 925 were short."""
    options: dict[str, Any] = {"dimension_numbers": None}
    if make is lro.recipes.alice:
        options |= {"key": 0, "rank": R, "residual_scale": 10.0}
    tx: Any = make(1.0, **options)
    g = normal(12, M, N)

    def steps(g: Any) -> np.ndarray:
        def step(state: Any, g: Any) -> Any:
            updates, state = tx.update({"w": g}, state, {"w": g})
            return state, jnp.linalg.norm(updates["w"])

        run = jax.jit(lambda g: jax.lax.scan(step, tx.init({"w": g[0]}), g)[1])
        return np.asarray(run(jnp.asarray(g)))

    small = g.copy()
    small[6] *= size
    after = steps(small)[7:] / steps(g)[7:]
    assert after.min() > 0.8
    assert after.max() < 1.25


def test_layers_are_compensated_one_by_one() -> None:
    g = normal(5, 3, M, N) * np.reshape(np.array([1, 30, 0], np.float32), (3, 1, 1))
    s = np.stack([orthonormal(seed=i) for i in range(3)])
    together = run(bracket(s), g)
    for i in range(3):
        for found, alone in zip(together, run(bracket(s[i]), g[:, i]), strict=True):
            np.testing.assert_allclose(found[:, i], alone, rtol=1e-4, atol=1e-4)


def test_at_full_rank_nothing_is_lost() -> None:
    g = normal(M, N)
    tx: Any = lro.recipes.alice(
        1.0, rank=M, refresh_every=2, key=0, dimension_numbers=None
    )
    with pytest.warns(UserWarning, match="0 of 1 matrices"):
        state = tx.init({"w": jnp.asarray(g)})
    updates, _ = tx.update({"w": jnp.asarray(g)}, state, {"w": jnp.asarray(g)})
    # Adam's first step without bias correction, 0.1 g / sqrt(0.1 g^2).
    np.testing.assert_allclose(
        updates["w"], -0.3 * np.sqrt(0.1) * np.sign(g), rtol=1e-5
    )


def test_it_needs_its_stages() -> None:
    s, g = orthonormal()[None], {"w": jnp.ones((M, N))}
    replay, back = lro.bases.replay({"w": s}), lro.compensate_columns()

    def update(*stages: Any) -> None:
        tx: Any = lro.low_rank(optax.chain(*stages), rank=R, refresh_every=1)
        tx.update(g, tx.init(g))

    with pytest.raises(ValueError, match=r"w: .*put project\(\) before"):
        update(replay, back)
    with pytest.raises(ValueError, match=r"w: .*put in_subspace\(\) or rotate_moments"):
        update(replay, lro.project(), back)
