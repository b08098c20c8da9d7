"""Rows for a basis: drawn, in turn, and sampled by their norms."""

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
from lowrank_optax.core.stage import Clock
from tests.helpers.numpy_reference import sample_probabilities
from tests.helpers.rules import (
    M,
    N,
    R,
    bracket,
    frame_of,
    normal,
    same_bits,
    updates_of,
    walk,
)

few = settings(derandomize=True, deadline=None, max_examples=20)


def test_random_rows_are_uniform_without_replacement() -> None:
    layers, m, r = 4000, 6, 2
    rows = walk(lro.bases.coordinates(0), np.zeros((1, layers, m, 7)), rank=r).basis[0]
    assert rows.shape == (layers, r)
    assert rows.dtype == jnp.int32
    assert (np.diff(rows) > 0).all()
    pairs, counts = np.unique(rows, axis=0, return_counts=True)
    assert len(pairs) == math.comb(m, r)
    # Four and a half standard deviations of a frequency, on a fixed seed.
    p = 1 / math.comb(m, r)
    assert np.abs(counts / layers - p).max() < 4.5 * math.sqrt(p * (1 - p) / layers)


@pytest.mark.parametrize("order", ["ascending", "descending"])
def test_rows_in_turn_are_all_covered_and_then_begin_again(order: Any) -> None:
    sizes = [(m, r) for m in range(2, 10) for r in range(1, m)]
    frames = {str(x): frame_of(np.zeros((x[0], 10)), rank=x[1]) for x in sizes}
    rule = lro.bases.coordinates(order=order)

    def step(state: Any, now: Any) -> Any:
        clock = Clock(step=now, refresh=now >= 0, cycle=now)
        out, state = rule.update(frames, state, clock=clock)
        return state, {name: frame.basis for name, frame in out.items()}

    run = jax.jit(lambda: jax.lax.scan(step, rule.init(frames), jnp.arange(18))[1])
    found = run()
    for m, r in sizes:
        seen, blocks = np.asarray(found[str((m, r))]), -(-m // r)
        assert same_bits(seen, seen[:, :1] + np.arange(r))  # r neighbours
        assert seen.min() >= 0
        assert seen.max() < m
        assert set(seen[:blocks].reshape(-1)) == set(range(m))
        assert same_bits(seen[:blocks], seen[blocks : 2 * blocks])
        assert seen[0, 0] == (0 if order == "ascending" else m - r)


@few
@given(seed=st.integers(0, 2**31))
def test_gather_and_scatter_are_products_with_unit_columns(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = np.stack([np.sort(rng.choice(M, R, replace=False)) for _ in range(4)])
    rows = rows.reshape(2, 2, R)
    dense = np.swapaxes(np.eye(M, dtype=np.float32)[rows], -1, -2)
    x, y = normal(2, 2, M, 5, seed=seed), normal(2, 2, R, 5, seed=seed)
    # Sums with all terms but one zero are exact: bit for bit.
    jax.tree.map(
        np.testing.assert_array_equal, _both_ways(rows, x, y), _both_ways(dense, x, y)
    )


@jax.jit
def _both_ways(basis: Any, x: Any, y: Any) -> Any:
    frame = frame_of(jnp.zeros((2, 2, M, N))).replace(basis=basis)
    return frame.down(x), frame.up(y)


@pytest.mark.parametrize(
    "rule", [lro.bases.coordinates(order="ascending"), lro.bases.sample_rows(0)]
)
def test_a_nan_in_a_row_that_is_not_taken_skips_the_step(rule: Any) -> None:
    tx = bracket(rule, lro.in_subspace(optax.scale_by_adam()), refresh_every=9)
    update = jax.jit(tx.update)
    g = normal(M, N)
    g[M - 1] *= 1e-6  # no row that sample_rows would take
    _, state = update({"w": g}, tx.init({"w": g}))
    assert M - 1 not in optax.tree.get(state, "basis")["w"]
    for bad in (np.nan, np.inf):
        g[M - 1, 2] = bad
        updates, after = update({"w": g}, state)
        assert same_bits(updates["w"], np.zeros((M, N)))
        assert (after.count, after.skipped) == (1, 1)
        same = jax.tree.map(lambda x, y: jnp.all(x == y), state[2], after[2])
        assert all(jax.tree.leaves(same))


def test_layers_take_turns() -> None:
    """FRUGAL's block-wise mode: Adam on one layer of four, signs on the others."""
    layers, steps, every = 4, 12, 3
    g = {"mlp": {"kernel": normal(steps, layers, M, N)}}
    tx = lro.frugal(
        -1.0,
        rank=0.25,
        refresh_every=every,
        basis=lro.bases.coordinates(order="descending"),
        dimension_numbers=lro.LAYERS,
    )
    found, states = updates_of(tx, g)
    assert optax.tree.get(states, "basis")["mlp"]["kernel"].shape == (steps, 1)
    adam, update = optax.scale_by_adam(), found["mlp"]["kernel"]
    for start in range(0, steps, every):
        active = layers - 1 - start // every
        state = adam.init(g["mlp"]["kernel"][0, active])
        for t in range(start, start + every):
            now = g["mlp"]["kernel"][t]
            expected, state = adam.update(now[active], state)
            # The same few float32 operations, in another program.
            np.testing.assert_allclose(update[t, active], expected, rtol=1e-5)
            for layer in set(range(layers)) - {active}:
                assert same_bits(update[t, layer], np.sign(now[layer]))


def test_rows_are_sampled_by_norm_without_replacement() -> None:
    norms, count = [4.0, 2.0, 1.0, 0.5], 4000
    # Rows of equal norm but other direction and sign would be drawn alike.
    unit = normal(4, 5)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    g = np.tile(unit * np.array(norms, np.float32)[:, None], (1, count, 1, 1))
    rows = walk(lro.bases.sample_rows(0), g, rank=2).basis[0]
    pairs = [tuple(x) for x in np.asarray(rows).tolist()]
    for pair, p in sample_probabilities(norms).items():
        # Four and a half standard deviations of a frequency, on fixed seeds.
        bound = 4.5 * math.sqrt(p * (1 - p) / count)
        assert abs(pairs.count(pair) / count - p) < bound, (pair, p)


def test_zero_rows_come_last_and_the_first_of_them_fill_up() -> None:
    g = np.zeros((1, 200, M, N), np.float32)
    g[..., [3, 6], :] = normal(2, N)
    g[..., 6, :] *= 1e-6
    rows = walk(lro.bases.sample_rows(0), g).basis[0]
    assert same_bits(rows, np.tile([0, 3, 6], (200, 1)))
    none = walk(lro.bases.sample_rows(0), np.zeros((1, 200, M, N))).basis[0]
    assert same_bits(np.unique(none), np.arange(M))  # all zero: any of them
