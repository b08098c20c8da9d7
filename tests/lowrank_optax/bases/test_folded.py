"""Blocks of neighboring rows as a basis: products by sums, and nothing stored."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from tests.helpers.rules import bracket, frame_of, normal

STEP = lro.in_subspace(optax.identity())


def test_sums_and_repeated_rows_are_products_with_an_orthonormal_basis() -> None:
    sizes = [(8, 2), (7, 3), (5, 4), (2, 1)]
    gs = {str(size): normal(2, size[0], 9) for size in sizes}
    ys = {str(size): normal(2, size[1], 3) for size in sizes}

    def run(gs: Any, ys: Any) -> Any:
        frames = {str((m, r)): frame_of(gs[str((m, r))], rank=r) for m, r in sizes}
        out, _ = lro.bases.fold().update(frames, optax.EmptyState(), clock=0)
        return {
            k: (f.need("basis"), f.down(f.gradient), f.up(ys[k]))
            for k, f in out.items()
        }

    found = jax.jit(run)(gs, ys)
    for m, r in sizes:
        s, low, up = (np.asarray(x) for x in found[str((m, r))])
        assert s.shape == (2, m, r)
        np.testing.assert_allclose(s.mT @ s, np.tile(np.eye(r), (2, 1, 1)), atol=1e-6)
        rows = (s[0] > 0).sum(axis=0)
        assert rows.max() - rows.min() <= 1
        assert np.array_equal(s[0].argmax(axis=1), np.repeat(np.arange(r), rows))
        np.testing.assert_allclose(low, s.mT @ gs[str((m, r))], atol=1e-6)
        np.testing.assert_allclose(up, s @ ys[str((m, r))], atol=1e-6)


def test_a_small_row_stays_and_one_bad_entry_skips_the_step() -> None:
    tx = bracket(lro.bases.fold(), STEP, rank=2)
    g = np.concatenate([normal(4, 9), np.float32(1e-7) * normal(4, 9, seed=1)])
    state, update = tx.init({"w": g}), jax.jit(tx.update)
    assert np.asarray(update({"w": g}, state)[0]["w"])[4:].all()
    for bad in (np.nan, np.inf):
        g[2, 1] = bad
        updates, after = update({"w": g}, state)
        assert not np.any(updates["w"])
        assert int(after.skipped) == 1


def test_microbatches_hand_on_no_basis_and_measurements_see_it() -> None:
    params = {"w": jnp.asarray(normal(8, 9))}
    tx = lro.galore(1.0, rank=2, basis=lro.bases.fold(), dimension_numbers=None)
    state, how = tx.init(params), {"refresh": True}
    measured = lro.add_stage(tx, lro.measure_subspace())

    @jax.jit
    def steps(params: Any, state: Any) -> Any:
        seen = lro.training.project_gradient(tx, params, state, params, **how)
        assert not seen.bases
        apart = lro.training.update_projected(tx, seen, state, params, **how)[0]
        return apart, *measured.update(params, measured.init(params), params)

    apart, whole, state = steps(params, state)
    np.testing.assert_allclose(apart["w"], whole["w"], atol=1e-6)
    g = np.asarray(params["w"])
    inside = g.reshape(2, 4, 9).sum(axis=1) / 2
    (found,) = lro.measurements(state).values()
    ratio = np.linalg.norm(inside) / np.linalg.norm(g)
    np.testing.assert_allclose(found.energy, ratio, rtol=1e-5)


def test_a_second_basis_rule_is_refused() -> None:
    tx = bracket(optax.chain(lro.bases.fold(), lro.dominant_svd()))
    g = {"w": jax.ShapeDtypeStruct((8, 9), jnp.float32)}
    with pytest.raises(ValueError, match="w: a second basis rule"):
        jax.eval_shape(lambda g: tx.update(g, tx.init(g)), g)
