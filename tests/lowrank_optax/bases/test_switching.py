"""Alice's switched basis, and what it tracks."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from lowrank_optax.bases.switching import leading_of_step
from lowrank_optax.core import linalg
from lowrank_optax.core.frame import Frame
from lowrank_optax.core.stage import Clock

M, N, R = 8, 12, 3


def normal(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def orthonormal(rows: int = M, columns: int = R, seed: int = 1) -> Any:
    return np.linalg.qr(normal(rows, columns, seed=seed))[0]


def chosen(rule: Any, g: Any, s: Any, rank: int = R, tracked: Any = None) -> Any:
    """What a rule chooses of one gradient after the first step, for many layers."""

    @jax.jit
    def basis(g: Any, s: Any, tracked: Any) -> Any:
        frame = Frame(gradient=g, rank=rank, path="w").replace(tracked=tracked)
        now = Clock(step=jnp.int32(5), refresh=True, cycle=jnp.int32(1))
        started = jnp.ones(len(s), bool)
        state = rule.init(frame)._replace(basis=s, started=started)
        return rule.update(frame, state, clock=now)[0].basis

    return np.asarray(basis(g, s, tracked))


@jax.jit
def leading(g: Any, s: Any) -> Any:
    frame = Frame(gradient=g, rank=s.shape[-1], path="w")
    return leading_of_step(frame.replace(basis=s))


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


@pytest.mark.parametrize(("rank", "keep"), [(1, 0.5), (3, 0.01), (5, 0.7), (7, 1.0)])
def test_it_is_orthonormal_whatever_the_gradient(rank: int, keep: float) -> None:
    """Gradients of full rank, of rank one, inside the old span, and zero."""
    gradients, bases = [], []
    for seed in range(20):
        g, s = normal(M, N, seed=seed), orthonormal(columns=rank, seed=seed)
        kinds = (g, np.outer(g[:, 0], g[0]), s @ (s.T @ g), np.zeros_like(g))
        sizes = np.float32([1e-25, 1.0, 1e15])
        gradients += [size * kind for kind in kinds for size in sizes]
        bases += [s] * 12
    rule = lro.bases.switch_basis(0, keep=keep)
    found = chosen(rule, np.stack(gradients), np.stack(bases), rank)
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
    bases = run(jnp.asarray(g, jnp.float32))
    assert linalg.orthonormality_error(bases) < 1e-5
    bases = np.asarray(bases)
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
        with pytest.raises(ValueError, match=r"keep=.*: pass how many directions"):
            lro.bases.switch_basis(0, keep=bad)
    with pytest.raises(ValueError, match=r"w: keep=7 is above the rank 6; pass keep"):
        kept(7)


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


@pytest.mark.parametrize("size", [1e-25, 1e15])
@pytest.mark.parametrize("past", [1e-6, 1e6])
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
    state, update, mean = tx.init(params), jax.jit(tx.update), np.zeros((R, R))
    for seed in range(4):
        g = normal(M, N, seed=seed)
        _, state = update({"w": jnp.asarray(g), "bias": jnp.ones(3)}, state)
        low = s.T @ g
        mean = 0.75 * mean + 0.25 * low @ low.T
    gram = optax.tree.get(state, "gram")
    np.testing.assert_allclose(gram["w"], mean, rtol=1e-5, atol=1e-5)
    assert not gram["bias"]
    assert gram["bias"].dtype == bool
