"""Bases that are replaced once they keep too little of the gradients' path."""

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from lowrank_optax.bases.adaptive import spread_columns
from tests.helpers.rules import bracket, same_bits, updates_of

M, N, R, L, T, STEPS, K = 10, 14, 3, 2, 4, 33, 5


@pytest.fixture
def x64() -> Any:
    with jax.enable_x64(True):
        yield


def gradients(seed: int = 0) -> Any:
    """Directions that hold for 12 steps under noise, then others: (t, L, m, n)."""
    rng = np.random.default_rng(seed)
    kept = rng.normal(size=(4, L, M, 2)) @ rng.normal(size=(4, L, 2, N))
    noise = rng.normal(size=(STEPS, L, M, N))
    size = np.array([0.2, 1.0])[:, None, None]  # the second layer is noisier
    turns = kept[(np.arange(STEPS)[:, None] + [0, 7]) // 12, range(L)]
    return 10.0 ** rng.integers(-3, 3, (STEPS, L, 1, 1)) * (turns + size * noise)


def model(gs: Any, threshold: float, k: int) -> tuple[Any, Any, Any, Any]:
    """Lotus in numpy: bases, when they were chosen, rho after each step, the last D."""
    bases, steps, rhos, paths = [], [], [], []
    for layer in gs.swapaxes(0, 1):
        basis, rho, of_layer = np.eye(M)[:, :R], 1.0, []
        for t, g in enumerate(layer):
            if t == 0 or (t % T == 0 and rho < threshold):
                basis = np.linalg.svd(g)[0][:, :R]
                steps.append((len(bases), t))
            if t % T == 0:
                path = 0
            seen = g[:, spread_columns(N, k)]
            path = path + seen / np.linalg.norm(seen)
            rho = np.linalg.norm(basis.T @ path) / np.linalg.norm(path)
            of_layer.append((basis, rho))
        bases.append([s for s, _ in of_layer])
        rhos.append([rho for _, rho in of_layer])
        paths.append(path)
    return np.array(bases), steps, np.array(rhos), np.array(paths)


@pytest.mark.parametrize("k", [K, N, 99])
@pytest.mark.usefixtures("x64")
def test_it_replaces_the_bases_that_its_model_replaces(k: int) -> None:
    gs = gradients()
    bases, steps, rhos, paths = model(gs, 0.6, min(k, N))
    # Both layers are replaced at some looks and not at others, and no rho is near.
    for layer in range(L):
        assert 1 < sum(i == layer for i, _ in steps) < STEPS // T
    assert abs(rhos - 0.6).min() > 1e-6
    rule = lro.bases.adaptive_refresh(lro.dominant_svd(), threshold=0.6, columns=k)
    tx = bracket(rule, refresh_every=T, rank=R)
    _, states = updates_of(tx, {"w": jnp.asarray(gs)})
    adaptive = states.inner_state[0]
    times = np.diff(adaptive.chosen["w"], axis=0, prepend=0).T
    assert sorted(steps) == [(int(i), int(t)) for i, t in np.argwhere(times)]
    s = np.swapaxes(adaptive.rule_state.basis["w"], 0, 1)
    np.testing.assert_allclose(s @ s.swapaxes(-1, -2), bases @ bases.swapaxes(-1, -2))
    np.testing.assert_allclose(adaptive.path["w"][-1], paths)
    np.testing.assert_array_equal(np.swapaxes(adaptive.stale["w"], 0, 1), rhos < 0.6)


@pytest.mark.parametrize(("n", "k"), [(14, 5), (5461, 32), (2048, 32), (50304, 9999)])
def test_columns_are_spread_and_not_one_of_each_head(n: int, k: int) -> None:
    columns = spread_columns(n, k)
    assert len(set(columns)) == k
    gaps = np.diff(np.concatenate([columns, [columns[0] + n]]))
    assert gaps.max() <= max(3 * n / k, 3)
    assert max(np.bincount(columns % 64)) <= max(3, 2 * k / 64)


def test_all_columns() -> None:
    assert spread_columns(7, 7).tolist() == list(range(7))


@pytest.mark.parametrize(("threshold", "every"), [(1.0, T), (0.0, STEPS)])
def test_a_threshold_of_one_always_replaces_and_one_of_zero_never(
    threshold: float, every: int
) -> None:
    g = {"w": gradients().astype(np.float32)}
    rule = lro.bases.adaptive_refresh(lro.dominant_svd(), threshold=threshold)
    found, _ = updates_of(bracket(rule, refresh_every=T), g)
    plain, _ = updates_of(bracket(lro.dominant_svd(), refresh_every=every), g)
    np.testing.assert_allclose(found["w"], plain["w"], rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("rule", [lro.dominant_svd(), lro.sara_sample(0)])
def test_where_the_host_decides_no_other_step_may_choose(rule: Any) -> None:
    """Nor split the key, which random bases come from."""
    g = {"w": gradients().astype(np.float32)}
    rule = lro.bases.adaptive_refresh(rule, threshold=0.6)
    tx = bracket(rule, refresh_every=T)
    by_device = updates_of(tx, g)[1]
    update = jax.jit(
        lambda g, s, refresh: tx.update(g, s, g, refresh=refresh)[1],
        static_argnames="refresh",
    )
    state = tx.init({"w": g["w"][0]})
    for t in range(STEPS):
        state = update({"w": g["w"][t]}, state, refresh=t % T == 0)
    assert update._cache_size() == 2
    key = by_device.inner_state[0].rule_state.rng_key
    if key is not None:
        assert same_bits(state.inner_state[0].rule_state.rng_key, key[-1])
    for name in ("chosen", "stale", "basis"):
        found = optax.tree.get(state, name)["w"]
        assert same_bits(found, optax.tree.get(by_device, name)["w"][-1])
    ordinary = update.lower({"w": g["w"][0]}, state, refresh=False)
    assert "svd" in update.lower({"w": g["w"][0]}, state, refresh=True).as_text()
    assert "svd" not in ordinary.as_text()


def test_a_scale_of_the_gradient_and_squares_that_underflow_change_nothing() -> None:
    g = gradients().astype(np.float32)
    rule = lro.bases.adaptive_refresh(lro.dominant_svd(), threshold=0.6)
    tx = bracket(rule, refresh_every=T)
    chosen = [
        updates_of(tx, {"w": scale * g})[1].inner_state[0].chosen["w"]
        for scale in (1.0, 2.0**-80, 2.0**50)
    ]
    assert (np.asarray(chosen[0][-1]) > 1).all()
    assert same_bits(chosen[0], chosen[1])
    assert same_bits(chosen[0], chosen[2])


@pytest.mark.parametrize(
    ("rule", "why"),
    [
        (lro.bases.gaussian(0), "stored orthonormal bases"),
        (lro.bases.gaussian(0, stored=True), "stored orthonormal bases"),
        (lro.bases.quantize_basis(lro.dominant_svd()), "stored orthonormal bases"),
        (lro.bases.frozen(lro.dominant_svd()), "stored orthonormal bases"),
        (lro.bases.online_pca(), r"online_pca\(\) is none"),
    ],
)
def test_what_it_cannot_wrap(rule: Any, why: str) -> None:
    with pytest.raises(ValueError, match=rf"adaptive_refresh\(\).*{why}"):
        lro.bases.adaptive_refresh(rule)


def test_bad_numbers() -> None:
    with pytest.raises(ValueError, match="columns must be an int of at least 1"):
        lro.bases.adaptive_refresh(lro.dominant_svd(), columns=0)
    for wrap in (lro.bases.adaptive_refresh, lro.bases.lazy_refresh):
        with pytest.raises(ValueError, match=r"threshold=-0.9: pass a number from 0"):
            wrap(lro.dominant_svd(), threshold=-0.9)


def test_moments_of_a_matrix_that_keeps_its_basis_keep_their_bits() -> None:
    """A product with I = S^T S rounds."""
    g = {"w": gradients().astype(np.float32)}
    rule = lro.bases.adaptive_refresh(lro.dominant_svd(), threshold=0.0)
    adam = lro.rotate_moments(optax.scale_by_adam())
    found, _ = updates_of(bracket(rule, adam, refresh_every=T), g)
    plain, _ = updates_of(bracket(lro.dominant_svd(), adam, refresh_every=STEPS), g)
    assert same_bits(found["w"], plain["w"])


@pytest.mark.parametrize("layers", ["per_layer", "update_layers", "on a mesh"])
def test_layers_of_experts(layers: str) -> None:
    """A kernel with an axis of experts besides that of the layers."""
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    g = np.random.default_rng(0).normal(size=(STEPS, 3, L, M, N)).astype(np.float32)
    g[:, :, 1] += 3 * np.random.default_rng(1).normal(size=(3, M, N))
    rule = lro.bases.adaptive_refresh(lro.sara_sample(0), threshold=0.7)
    tx: Any = bracket(rule, refresh_every=T)
    _, states = updates_of(tx, {"w": g})
    by_layer = lro.training.per_layer(tx)

    def step(g: Any, state: Any, refresh: bool) -> Any:
        if layers == "per_layer":
            return by_layer.update(g, state, g, refresh=refresh)[1]
        return lro.training.update_layers(tx, g, state, g, refresh=refresh)[1]

    step = jax.jit(step, static_argnames="refresh")
    state = by_layer.init({"w": g[0]})
    with jax.set_mesh(mesh) if layers == "on a mesh" else contextlib.nullcontext():
        for t in range(STEPS):
            state = step({"w": g[t]}, state, refresh=t % T == 0)
    for name in ("chosen", "basis"):
        expected = optax.tree.get(states, name)["w"][-1]
        assert same_bits(optax.tree.get(state, name)["w"], expected)
    assert len(set(np.ravel(optax.tree.get(state, "chosen")["w"]))) > 1


def test_sums_in_the_subspace_are_refused() -> None:
    rule = lro.bases.adaptive_refresh(lro.dominant_svd())
    tx, params = bracket(rule, refresh_every=T), {"w": jnp.ones((L, M, N))}

    def step(params: Any) -> Any:
        state = tx.init(params)
        projected = lro.training.project_gradient(tx, params, state, params)
        return lro.training.update_projected(tx, projected, state, params)

    with pytest.raises(ValueError, match=r"w: adaptive_refresh\(\) follows the full"):
        jax.eval_shape(step, params)


@pytest.mark.parametrize("params", [{"b": jnp.ones(3)}, {}])
def test_a_tree_without_matrices_passes(params: Any) -> None:
    """With a key, and a refresh that the device decides."""
    rule = lro.bases.adaptive_refresh(lro.sara_sample(0))
    tx = bracket(rule, refresh_every=T, dimension_numbers=None)
    steps, state = jax.jit(tx.update)(params, tx.init(params), params)
    assert jax.tree.structure(steps) == jax.tree.structure(params)
    assert state.count == 1
