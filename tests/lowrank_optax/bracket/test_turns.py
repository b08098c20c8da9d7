"""Staggered refreshes: which matrix when, from which gradient, and what stays."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro

L, T = 3, 4
SHAPES = {"kernel": (L, 2, 8, 12), "up": (L, 16, 6), "norm": (L, 5)}
RULES = ((r"^(kernel|up)$", lro.STACKED), (r"^norm$", None))
K = 3 * L
OTHER: Any = {"dimension_numbers": RULES}
PARAMS = {name: np.ones(shape, np.float32) for name, shape in SHAPES.items()}


@functools.cache
def gradient(t: int, bad: bool = False) -> Any:
    rng = np.random.default_rng(t)
    g = {k: rng.standard_normal(shape, np.float32) for k, shape in SHAPES.items()}
    if bad:
        g["norm"][0, 0] = np.nan
    return g


def galore(**options: Any) -> Any:
    options = {"refresh_every": T, "stagger": True, **options}
    return lro.galore(0.01, rank=2, dimension_numbers=RULES, **options)


def walk(tx: Any, grads: list[Any], by_host: bool = True) -> list[Any]:
    """The state before the first step, and after each."""
    update = jax.jit(
        lambda g, s, refresh: tx.update(g, s, PARAMS, refresh=refresh)[1],
        static_argnames="refresh",
    )
    states = [tx.init(PARAMS)]
    for t, g in enumerate(grads):
        states.append(update(g, states[-1], (t == 0) if by_host else None))
    return states


def bases(state: Any, name: str) -> Any:
    """(matrices, m, r)."""
    s = np.asarray(optax.tree.get(state, "basis")[name])
    return s.reshape(-1, *s.shape[-2:])


def changed(before: Any, after: Any) -> dict[str, list[int]]:
    """Finds the matrices of each leaf whose basis changed."""
    return {
        name: [
            i
            for i, (x, y) in enumerate(
                zip(bases(before, name), bases(after, name), strict=True)
            )
            if (x != y).any()
        ]
        for name in ("kernel", "up")
    }


def left_vectors(g: Any, name: str) -> Any:
    """U[:, :2] of each matrix, m <= n."""
    g = g[name].reshape(-1, *g[name].shape[-2:])
    g = g if g.shape[1] <= g.shape[2] else g.swapaxes(1, 2)
    return np.linalg.svd(g.astype(np.float64))[0][:, :, :2]


@pytest.fixture(scope="module")
def states() -> list[Any]:
    return walk(galore(), [gradient(t) for t in range(3 * T)])


def test_each_matrix_once_in_an_interval_and_few_at_a_step(states):
    steps = [changed(a, b) for a, b in itertools.pairwise(states)]
    assert steps[0] == {"kernel": [*range(2 * L)], "up": [*range(L)]}
    for first in (T, 2 * T):
        interval = steps[first : first + T]
        for name, count in (("kernel", 2 * L), ("up", L)):
            assert sorted(i for s in interval for i in s[name]) == [*range(count)]
    for step in steps[1:]:
        assert len(step["kernel"]) + len(step["up"]) in (K // T, -(-K // T))
    # Layer after layer: nothing of the last one before all of the first.
    assert steps[T] == {"kernel": [0, 1], "up": [0]}
    assert optax.tree.get(states[-1], "refreshes") == 3


def test_a_basis_is_of_the_gradient_of_its_step(states):
    for t in (1, T, 2 * T + 3):
        for name, which in changed(states[t], states[t + 1]).items():
            new = bases(states[t + 1], name)
            u = left_vectors(gradient(t), name)
            for i in which:
                np.testing.assert_allclose(new[i] @ new[i].T, u[i] @ u[i].T, atol=2e-5)


def test_the_device_decides_alike(states):
    tx = galore()
    update = jax.jit(lambda g, s: tx.update(g, s, PARAMS)[1])
    state = tx.init(PARAMS)
    for t in range(3 * T):
        state = update(gradient(t), state)
    assert update._cache_size() == 1
    jax.tree.map(np.testing.assert_array_equal, state, states[-1])


def test_more_steps_than_matrices():
    seen = walk(galore(refresh_every=3 * K), [gradient(t) for t in range(3 * K)])
    pairs = itertools.pairwise(seen[1:])
    counts = [sum(map(len, changed(a, b).values())) for a, b in pairs]
    assert set(counts) == {0, 1}
    assert sum(counts) == K - 1  # the first came with all


def test_a_skipped_step_repeats_its_turn():
    grads = [gradient(t) for t in range(T + 2)]
    again = [*grads[:2], gradient(9, bad=True), *grads[2:]]
    plain, skipped = walk(galore(), grads), walk(galore(), again)
    assert optax.tree.get(skipped[-1], "skipped") == 1
    for name in ("basis", "mu", "nu"):
        a, b = (optax.tree.get(s[-1], name) for s in (plain, skipped))
        jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_first_step_that_is_skipped():
    """With refresh=False nothing happens until all bases were chosen."""
    tx = galore()
    step = jax.jit(lambda g, s: tx.update(g, s, PARAMS, refresh=False))
    updates, state = step(gradient(0), tx.init(PARAMS))
    assert optax.tree.get(state, "skipped") == 1
    assert not any(np.any(u) for u in jax.tree.leaves(updates))


def in_rows(tree: Any, name: str) -> Any:
    """(matrices, m, n) in float64, m <= n."""
    x = np.asarray(tree[name], np.float64)
    x = x.reshape(-1, *x.shape[-2:])
    return x if x.shape[1] <= x.shape[2] else x.swapaxes(1, 2)


def test_moments_rotate_where_a_basis_is_new_alone():
    tx = galore(
        basis=lro.grassmann_jump(key=0), step=lro.rotate_moments(optax.scale_by_adam())
    )
    _, before, after = walk(tx, [gradient(0), gradient(1)])
    due = changed(before, after)
    assert due == {"kernel": [2, 3], "up": []}
    for name, which in due.items():
        (m0, m1), (v0, v1) = (
            [in_rows(optax.tree.get(s, field), name) for s in (before, after)]
            for field in ("mu", "nu")
        )
        s0, s1 = (bases(s, name).astype(np.float64) for s in (before, after))
        for i, g in enumerate(in_rows(gradient(1), name)):
            m, v, low = m0[i], v0[i], s1[i].T @ g
            if i in which:  # eqs. 7 and 8, after one step
                c, m_hat, v_hat = s1[i].T @ s0[i], m / 0.1, v / 0.001
                v = 0.001 * np.abs(c**2 @ (v_hat - m_hat**2) + (c @ m_hat) ** 2)
                m = c @ m
            np.testing.assert_allclose(m1[i], 0.9 * m + 0.1 * low, atol=1e-5)
            wanted = 0.999 * v + 0.001 * low**2
            np.testing.assert_allclose(v1[i], wanted, rtol=1e-4, atol=1e-7)


def test_packed_bases_that_are_not_due_keep_their_bits():
    rule = lro.bases.quantize_basis(lro.dominant_svd())
    seen = walk(galore(basis=rule), [gradient(t) for t in range(T)])
    for a, b in itertools.pairwise(seen[1:]):
        a, b = (optax.tree.get(s, "basis").codes for s in (a, b))
        moved = sum(
            int(np.any(x != y, axis=-1).sum())
            for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
            if x.ndim > 1
        )
        assert 0 < moved <= -(-K // T)


def test_recorded_bases_come_in_each_matrix_s_turn():
    rng = np.random.default_rng(0)
    orders = {
        name: np.linalg.qr(rng.standard_normal((3, *shape[:-2], min(shape[-2:]), 2)))[0]
        for name, shape in SHAPES.items()
        if name != "norm"
    }
    tx = galore(basis=lro.bases.replay(orders | {"norm": np.zeros(())}))
    seen = walk(tx, [gradient(t) for t in range(T + 1)])
    for name, recorded in orders.items():
        flat = recorded.reshape(3, -1, *recorded.shape[-2:]).astype(np.float32)
        now = bases(seen[-1], name)
        # All at step 0; then the first turn at step T, others before it.
        np.testing.assert_array_equal(now, flat[1])


@pytest.mark.parametrize(
    ("tx", "why"),
    [
        (
            lambda: galore(basis=lro.bases.lazy_refresh(lro.dominant_svd())),
            "lazy_refresh.. does not work with stagger=True",
        ),
        (
            lambda: galore(basis=lro.bases.adaptive_refresh(lro.dominant_svd())),
            "adaptive_refresh.. does not work with stagger=True",
        ),
        (
            lambda: lro.apollo(0.01, rank=2, key=0, stagger=True, **OTHER),
            "use gaussian.key, stored=True",
        ),
        (
            lambda: galore(
                basis=optax.chain(lro.dominant_svd(), lro.measure_subspace())
            ),
            "measure_subspace.. does not work with stagger=True",
        ),
        (lambda: galore(stagger=1), "stagger must be True or False, not 1"),
    ],
    ids=["lazy_refresh", "adaptive_refresh", "gaussian", "measure_subspace", "no bool"],
)
def test_what_takes_no_turns_says_so(tx, why):
    with pytest.raises(ValueError, match=why):
        tx().init(PARAMS)


def test_sums_in_the_subspace_are_refused():
    tx = lro.galore(0.01, rank=2, refresh_every=T, stagger=True, dimension_numbers=None)
    params = {"w": jnp.ones((4, 8))}

    def step(params: Any) -> Any:
        state = tx.init(params)
        projected = lro.training.project_gradient(tx, params, state, params)
        return lro.training.update_projected(tx, projected, state, params)

    with pytest.raises(ValueError, match="leave it out where gradients are summed"):
        jax.eval_shape(step, params)


def test_a_basis_for_good_and_one_at_every_step_take_no_turns():
    frozen = galore(basis=lro.bases.frozen(lro.dominant_svd()))
    _, *seen = walk(frozen, [gradient(t) for t in range(T + 1)])
    assert all(changed(seen[0], s) == {"kernel": [], "up": []} for s in seen)
    every = galore(refresh_every=1)
    seen = walk(every, [gradient(t) for t in range(3)], by_host=False)
    all_of_them = {"kernel": [*range(2 * L)], "up": [*range(L)]}
    assert changed(seen[-2], seen[-1]) == all_of_them
