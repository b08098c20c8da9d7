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
from lowrank_optax.bases.switching import leading_of_step
from lowrank_optax.core import linalg
from lowrank_optax.core.frame import Frame
from lowrank_optax.core.stage import Clock

M, N, R = 8, 12, 3
few = settings(derandomize=True, deadline=None, max_examples=20)


def normal(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def orthonormal(rows: int = M, columns: int = R, seed: int = 1) -> Any:
    return np.linalg.qr(normal(rows, columns, seed=seed))[0]


def chosen(rule: Any, g: Any, s: Any, rank: int = R, tracked: Any = None) -> Any:
    """What a rule chooses of one gradient after the first step, for many layers."""
    layers = len(s)
    frame = Frame(gradient=jnp.asarray(g), rank=rank, path="w").replace(tracked=tracked)
    state = rule.init(frame)
    now = Clock(step=jnp.int32(5), refresh=True, cycle=jnp.int32(1))
    state = state._replace(basis=jnp.asarray(s), started=jnp.ones(layers, bool))
    return np.asarray(rule.update(frame, state, clock=now)[0].basis)


def leading(g: Any, s: Any) -> Any:
    frame = Frame(gradient=jnp.asarray(g), rank=s.shape[-1], path="w")
    return leading_of_step(frame.replace(basis=jnp.asarray(s)))


# ------------------------------------------------------------------ the switched basis


def test_leading_ones_are_kept_and_the_others_are_drawn_uniformly() -> None:
    layers = 3000
    one, s = normal(M, N), orthonormal()
    many = [np.broadcast_to(x, (layers, *x.shape)) for x in (one, s)]
    bases = chosen(lro.bases.switch_basis(7, keep=1), many[0], many[1])
    power = np.linalg.qr(one @ one.T @ s)[0]
    values, vectors = np.linalg.eigh(power.T @ one @ one.T @ power)
    first = power @ vectors[:, values.argmax()]
    assert (bases[:, :, 0] == bases[0, :, 0]).all()
    np.testing.assert_allclose(abs(bases[0, :, 0] @ first), 1, atol=1e-6)
    # Each of the others is one of the m - r columns that complete the power step's.
    rest = np.asarray(linalg.complement(leading(one, s)))
    overlap = np.abs(rest.T @ bases[:, :, 1:])  # (layers, m - r, r - l)
    index = overlap.argmax(1)
    np.testing.assert_allclose(overlap.max(1), 1, atol=1e-5)
    assert (np.diff(index, axis=1) > 0).all()  # distinct, and sorted
    # Pairs of m - r = 5 are equally likely: 300 of each, and 16.4 is the deviation.
    pairs, counts = np.unique(index, axis=0, return_counts=True)
    assert len(pairs) == 10
    assert np.abs(counts - 300).max() < 5 * 16.4


@few
@given(
    seed=st.integers(0, 2**32 - 1),
    rank=st.integers(1, M - 1),
    keep=st.floats(0.01, 1.0),
    size=st.sampled_from([1e-25, 1.0, 1e15]),
    kind=st.sampled_from(["full", "rank one", "zero", "inside"]),
)
def test_it_is_orthonormal_whatever_the_gradient(
    seed: int, rank: int, keep: float, size: float, kind: str
) -> None:
    g, s = normal(M, N, seed=seed), orthonormal(columns=rank, seed=seed)
    if kind == "rank one":
        g = np.outer(g[:, 0], g[0])
    elif kind == "inside":
        g = s @ (s.T @ g)
    g = np.float32(0 if kind == "zero" else size) * g
    found = chosen(
        lro.bases.switch_basis(seed % 1000, keep=keep), g[None], s[None], rank
    )
    # What `orthonormalize` lets pass is 6e-6.
    assert linalg.orthonormality_error(jnp.asarray(found)) < 1e-5


def test_many_refreshes_stay_orthonormal_and_find_what_lasts() -> None:
    """A strong direction is found by a draw, and kept from then on."""
    rng = np.random.default_rng(0)
    strong = np.linalg.qr(rng.normal(size=(M, 1)))[0]
    g = strong @ rng.normal(size=(1, N)) + 0.05 * rng.normal(size=(400, M, N))
    g[0] -= strong @ (strong.T @ g[0])  # the first basis has not seen it
    tx: Any = lro.low_rank(
        optax.chain(
            lro.bases.switch_basis(3, keep=1),
            lro.project(),
            lro.in_subspace(optax.identity()),
            lro.project_back(),
        ),
        rank=R,
        refresh_every=1,
    )

    def step(state: Any, x: Any) -> Any:
        _, state = tx.update({"w": x}, state)
        return state, optax.tree.get(state, "basis")["w"]

    run = jax.jit(lambda gs: jax.lax.scan(step, tx.init({"w": gs[0]}), gs)[1])
    bases = np.asarray(run(jnp.asarray(g, jnp.float32)))
    assert max(float(linalg.orthonormality_error(jnp.asarray(s))) for s in bases) < 1e-5
    assert (np.abs(strong.T @ bases[10:, :, :1]) > 0.99).all()


def test_how_many_are_kept() -> None:
    g, s = normal(1, M, N), orthonormal(columns=6)[None]

    def kept(keep: Any, rank: int = 6) -> int:
        old = s[..., :rank]
        found = chosen(lro.bases.switch_basis(1, keep=keep), g, old, rank)
        stays = np.isclose(found, leading(g, old), atol=1e-6).all(axis=(0, 1))
        assert (np.diff(stays.astype(int)) <= 0).all()  # the first ones
        return int(stays.sum())

    # Two directions lie outside: no more can be drawn, and four stay at least.
    assert kept(1) == kept(0.3125) == 4
    assert kept(5) == 5
    assert kept(6) == kept(1.0) == 6
    assert kept(0.5, rank=4) == kept(2, rank=4) == 2
    bad: Any
    for bad in (0, -1, 0.0, 1.5, True, "1"):
        with pytest.raises(ValueError, match=r"keep=.*: give how many directions"):
            lro.bases.switch_basis(0, keep=bad)
    with pytest.raises(ValueError, match=r"w: keep=7 directions of a basis of rank 6"):
        kept(7)


# ------------------------------------------------------------------ tracking


def test_a_tracked_direction_is_kept_though_the_gradient_has_left_it() -> None:
    s = orthonormal()
    past = 100 * np.diag([1.0, 9.0, 4.0]).astype(np.float32)
    g = normal(M, N)
    rule = lro.bases.switch_basis(0, keep=1)
    without = chosen(rule, g[None], s[None])[0, :, 0]
    found = chosen(rule, g[None], s[None], tracked=jnp.asarray(past)[None])[0, :, 0]
    q = s @ past @ s.T + g @ g.T
    power = np.linalg.qr(q @ s)[0]
    vectors = np.linalg.eigh(power.T @ q @ power)[1]
    np.testing.assert_allclose(abs(found @ power @ vectors[:, -1]), 1, atol=1e-5)
    assert abs(found @ s[:, 1]) > 0.99 > abs(without @ s[:, 1])


@pytest.mark.parametrize("size", [1e-25, 1.0, 1e15])
@pytest.mark.parametrize("past", [1e-6, 1.0, 1e6])
def test_no_product_of_what_is_tracked_leaves_float32(size: float, past: float) -> None:
    g, s = np.float32(size) * normal(1, M, N), orthonormal()[None]
    t = np.float32(past * min(size, 1e15) ** 2) * np.eye(R, dtype=np.float32)[None]
    found = chosen(lro.bases.switch_basis(0), g, s, tracked=jnp.asarray(t))
    assert linalg.orthonormality_error(jnp.asarray(found)) < 1e-5


def test_what_is_tracked_is_a_running_mean() -> None:
    s = orthonormal()
    tx: Any = lro.low_rank(
        optax.chain(
            lro.bases.track_gram(
                optax.chain(lro.bases.replay({"w": s[None]}), lro.project()), decay=0.75
            ),
            lro.in_subspace(optax.identity()),
            lro.project_back(),
        ),
        rank=R,
        refresh_every=10,
    )
    params = {"w": jnp.zeros((M, N)), "bias": jnp.zeros(3)}
    state, mean = tx.init(params), np.zeros((R, R))
    for seed in range(4):
        g = normal(M, N, seed=seed)
        _, state = tx.update({"w": jnp.asarray(g), "bias": jnp.ones(3)}, state)
        low = s.T @ g
        mean = 0.75 * mean + 0.25 * low @ low.T
    gram = optax.tree.get(state, "gram")
    np.testing.assert_allclose(gram["w"], mean, rtol=1e-5, atol=1e-5)
    assert not gram["bias"]
    assert gram["bias"].dtype == bool


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
    # The number that is kept is the norm of what came out, to float64 rounding.
    np.testing.assert_allclose(lost, norms, rtol=1e-9)
    assert (norms[1:] <= limit * norms[:-1] * (1 + 1e-12)).all()


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
