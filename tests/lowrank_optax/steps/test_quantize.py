"""Moments in 8-bit blocks, by the equations and in other transformations."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from lowrank_optax.core.moments import first_moments
from lowrank_optax.steps.quantize import (
    QuantizedArray,
    QuantizedState,
    quantize_moments,
)
from tests.helpers import numpy_reference as reference
from tests.helpers.marks import NIGHTLY
from tests.helpers.numpy_quantize import rounded

M, N, R = 8, 37, 3  # 37: blocks of 19 and 18 at block size 32
B1, B2, EPS = 0.9, 0.99, 1e-8


# --- quantize_moments ---


def test_rare_tokens_beside_frequent_ones_take_steps_of_adams_size():
    """An output head: second moments of one block eight decades apart.

    With a V that rounds to zero the largest step is 100 times Adam's and more.
    """
    rng = np.random.default_rng(0)
    size = np.float32(10.0) ** rng.uniform(-5, 0, size=256)
    grads = jnp.asarray(rng.normal(size=(40, 4, 256)) * size, jnp.float32)

    def largest(tx):
        def body(state, g):
            updates, state = tx.update(g, state)
            return state, jnp.max(jnp.abs(updates))

        return float(jax.lax.scan(body, tx.init(grads[0]), grads)[1].max())

    adam = optax.scale_by_adam()
    assert largest(quantize_moments(adam, min_size=1)) < 2 * largest(adam)


def bases(seed, count=2):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(count, M, R)))[0]


def float32_bases(seed):
    return bases(seed, 3).astype(np.float32)


def gradients(count, seed=0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(count, M, N)) * np.geomspace(0.1, 10, N) + 0.3
    return [
        {"w": w[t].astype(dtype), "b": rng.normal(size=5).astype(dtype)}
        for t in range(count)
    ]


def bracket(inner, given_bases, *, refresh_every=2, wrap=lro.in_subspace):
    rule = lro.bases.replay({"w": given_bases})
    stages = optax.chain(rule, lro.project(), wrap(inner), lro.project_back())
    return lro.low_rank(stages, rank=R, refresh_every=refresh_every)


def run(tx, grads):
    """All updates, and the last state."""
    state, updates = jax.jit(tx.init)(grads[0]), []
    update = jax.jit(tx.update)
    for g in grads:
        u, state = update(g, state, g)
        updates.append(u["w"])
    return np.stack(updates), state


def eight_bit(inner=None, *, block_size=32, min_size=20):
    """Of gradients(): the (3, 37) moments are quantised, the vector's are not."""
    inner = inner or optax.scale_by_adam(B1, B2, EPS)
    return quantize_moments(inner, block_size=block_size, min_size=min_size)


def quantized_state(state):
    """The one QuantizedState there is."""
    leaves = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, QuantizedState))
    (found,) = [x for x in leaves if isinstance(x, QuantizedState)]
    return found


def quantized_arrays(state):
    """By its path in the inner state, each array that is quantised."""
    found = quantized_state(state)
    codes = jax.tree_util.tree_leaves_with_path(found.inner_state)
    scales = jax.tree.leaves(found.scales)
    return {
        jax.tree_util.keystr(k, simple=True, separator="/"): QuantizedArray(c, s)
        for (k, c), s in zip(codes, scales, strict=True)
        if s.dtype != jnp.bool_
    }


@pytest.mark.parametrize("rotate", [False, True])
def test_adam_in_8_bits_by_the_equations(rotate):
    s, grads = bases(0, 3), gradients(6)
    wrap = lro.rotate_moments if rotate else lro.in_subspace
    with jax.enable_x64(True):
        updates, state = run(bracket(eight_bit(), s, wrap=wrap), grads)
    m, v = np.zeros((2, R, N))
    rules = reference.Rules(lambda _: 1.0, 2, b1=B1, b2=B2)
    expected = []
    for t, g in enumerate(grads):
        if rotate and t and t % 2 == 0:
            c = s[t // 2].T @ s[t // 2 - 1]
            m, v = reference.turned_moments(m, v, c, t, rules)
            m, v = rounded(m, 32), rounded(v, 32)
        low = s[t // 2].T @ g["w"]
        m, v = B1 * m + (1 - B1) * low, B2 * v + (1 - B2) * low**2
        m_hat, v_hat = m / (1 - B1 ** (t + 1)), v / (1 - B2 ** (t + 1))
        expected.append(s[t // 2] @ (m_hat / (np.sqrt(v_hat) + EPS)))
        m, v = rounded(m, 32), rounded(v, 32)
    # Float64 on both sides, except for eq. 8's weight from float64 decay rates.
    close: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-12}
    np.testing.assert_allclose(updates, expected, **close)
    for name, moment in (("mu", m), ("nu", v)):
        with jax.enable_x64(True):
            got = quantized_arrays(state)[f"{name}/w"].dequantize()
        assert got.dtype == np.float64
        np.testing.assert_allclose(got, moment, **close)


def test_rotation_in_8_bits_follows_the_one_in_full_precision():
    s, grads = bases(1, 5), gradients(10)
    adam = optax.scale_by_adam(B1, B2, EPS)

    def updates(inner, wrap):
        return run(bracket(inner, s, wrap=wrap), grads)[0][-2:]

    with jax.enable_x64(True):
        exact = updates(adam, lro.rotate_moments)
        turned = updates(eight_bit(min_size=1), lro.rotate_moments)
        kept = updates(eight_bit(min_size=1), lro.in_subspace)
    size = np.linalg.norm(exact)
    # Each moment is rounded 14 times, by half a gap: under 0.7% of a block's larger
    # numbers and a few per cent of its smaller ones, of either sign.
    assert np.linalg.norm(turned - exact) < 0.05 * size
    assert np.linalg.norm(kept - exact) > 0.3 * size


def test_full_precision_where_min_size_is_out_of_reach():
    s, grads = float32_bases(2), gradients(6, dtype=np.float32)
    adam = optax.scale_by_adam()
    for wrap in (lro.in_subspace, lro.rotate_moments):
        a, _ = run(bracket(quantize_moments(adam), s, wrap=wrap), grads)
        b, _ = run(bracket(adam, s, wrap=wrap), grads)
        np.testing.assert_array_equal(a, b)


def test_the_momentum_is_found_dequantised():
    seen = []

    def look(frames, _):
        seen.append(lro.stages.map_frames(lambda f: f.momentum, frames)["w"])
        return frames

    s, grads = float32_bases(3), gradients(2, dtype=np.float32)
    stages = optax.chain(
        lro.bases.replay({"w": s}), lro.project(), optax.stateless(look)
    )
    stages = optax.chain(stages, lro.in_subspace(eight_bit()), lro.project_back())
    tx = lro.low_rank(stages, rank=R, refresh_every=1)
    state = tx.init(grads[0])
    for g in grads:
        _, state = tx.update(g, state)
    before, after = seen
    low = s[0].T @ grads[0]["w"]
    assert not before.any()
    # Float32 against float64: where a number lies within an ulp of the middle of two
    # values the nearest could differ.
    np.testing.assert_allclose(after, rounded(0.1 * low, 32), rtol=1e-5)


class OddState(NamedTuple):
    thing: Any


def odd():
    return optax.GradientTransformation(
        lambda p: OddState(optax.tree.zeros_like(p)), lambda u, s, p=None: (u, s)
    )


def test_a_state_without_a_rotation():
    s, grads = float32_bases(4), gradients(3, dtype=np.float32)
    updates, state = run(bracket(eight_bit(odd()), s), grads)
    assert np.isfinite(updates).all()
    assert optax.tree.get(state, "thing")["w"].dtype == jnp.uint8
    assert list(quantized_arrays(state)) == ["thing/w"]
    with pytest.raises(ValueError, match="cannot rotate OddState, which has"):
        bracket(eight_bit(odd()), s, wrap=lro.rotate_moments).init(grads[0])
    assert list(first_moments(eight_bit(odd()).init(grads[0]))) == []


def test_bytes():
    params = {"w": jnp.ones((64, 1024)), "layers": jnp.ones((4, 64, 1024))}

    def state_bytes(inner):
        stages = optax.chain(lro.dominant_svd(), lro.project(), lro.in_subspace(inner))
        tx = lro.low_rank(
            optax.chain(stages, lro.project_back()),
            rank=16,
            refresh_every=1,
            dimension_numbers=lro.STACKED,
        )
        state = jax.eval_shape(tx.init, params)
        scales = [x for _, x in optax.tree.get_all_with_path(state, "scales")]
        step = [optax.tree.get(state, "mu"), optax.tree.get(state, "nu"), scales]
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(step))

    full, small = (
        state_bytes(f(optax.scale_by_adam())) for f in (lambda x: x, quantize_moments)
    )
    assert full == 4 * 2 * 5 * 16 * 1024
    count = 1  # byte, of a scale that says that Adam's count is stored as it is
    assert small == (1 + 4 / 128) * 2 * 5 * 16 * 1024 + count <= 0.27 * full


def test_what_is_quantised():
    params = {
        "large": jnp.ones((3, 40)),
        "small": jnp.ones(19),
        "narrow": jnp.ones((40, 1)),  # a scale for each number would need more
        "scalar": jnp.ones(()),
        "half": jnp.ones((5, 40), jnp.bfloat16),
        "empty": jnp.ones((4, 0)),
    }
    inner = optax.chain(optax.trace(0.9), optax.add_noise(0.1, 0.5, jax.random.key(0)))
    state = jax.jit(eight_bit(inner).init)(params)
    quantised = {f"0/trace/{k}" for k in ("large", "half")}
    assert set(quantized_arrays(state)) == quantised
    assert quantized_arrays(state)["0/trace/half"].dequantize().dtype == jnp.bfloat16
    plain = inner.init(params)
    for k, x in state.inner_state[0].trace.items():
        assert x.shape == params[k].shape
        kept = plain[0].trace[k].dtype
        assert x.dtype == (jnp.uint8 if f"0/trace/{k}" in quantised else kept)
    # One tree like the parameters for the trace, leaf for leaf.
    (scales,) = [x for x in state.scales if isinstance(x, dict)]
    assert jax.tree.structure(scales) == jax.tree.structure(params)
    _, after = jax.jit(eight_bit(inner).update)(params, state)
    assert quantized_arrays(after)["0/trace/half"].dequantize().dtype == jnp.bfloat16
    assert jax.tree.structure(after) == jax.tree.structure(state)


def test_the_inner_transformation_sees_its_own_dtypes():
    """Or a branch that hands the state on has other types than one that steps."""
    adam = optax.scale_by_adam(mu_dtype=jnp.bfloat16)
    tx = eight_bit(optax.apply_if_finite(adam, 3), min_size=1)
    g = {"w": jnp.ones((4, 64))}
    state = tx.init(g)
    form = jax.tree.map(lambda x: (x.shape, x.dtype), state)
    for _ in range(2):
        updates, state = jax.jit(tx.update)(g, state)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == form
    assert np.isfinite(updates["w"]).all()


def test_what_belongs_to_no_parameter_is_not_quantised():
    table = jnp.linspace(0, 1, 4096).reshape(64, 64)

    def init(params):
        return {"table": table, "trace": optax.tree.zeros_like(params)}

    inner = optax.GradientTransformation(init, lambda u, s, p=None: (u, s))
    state = eight_bit(inner, min_size=1).init({"w": jnp.ones((4, 64))})
    assert list(quantized_arrays(state)) == ["trace/w"]
    np.testing.assert_array_equal(state.inner_state["table"], table)


def test_one_compilation_and_a_state_that_keeps_its_form():
    tx = bracket(eight_bit(), float32_bases(5), wrap=lro.rotate_moments)
    grads = gradients(5, dtype=np.float32)
    traces = []

    @jax.jit
    def update(g, state):
        traces.append(None)
        return tx.update(g, state)

    state = jax.jit(tx.init)(grads[0])
    form = jax.tree.map(lambda x: (x.shape, x.dtype), state)
    abstract = jax.eval_shape(tx.init, grads[0])
    assert jax.tree.map(lambda x: (x.shape, x.dtype), abstract) == form
    for g in grads:
        _, state = update(g, state)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == form
    assert len(traces) == 1


def test_scan_gives_what_a_loop_gives():
    tx = bracket(eight_bit(), float32_bases(6), wrap=lro.rotate_moments)
    grads = gradients(6, dtype=np.float32)

    def step(state, g):
        updates, state = tx.update(g, state)
        return state, updates["w"]

    stacked = jax.tree.map(lambda *x: jnp.stack(x), *grads)
    state, updates = jax.lax.scan(step, jax.jit(tx.init)(grads[0]), stacked)
    expected, last = run(tx, grads)
    # Two programs of the same float32 arithmetic; updates are about one.
    np.testing.assert_allclose(updates, expected, rtol=1e-4, atol=1e-5)
    assert jax.tree.structure(state) == jax.tree.structure(last)


def test_vmap_gives_what_single_runs_give():
    tx = eight_bit(min_size=1)
    g = np.random.default_rng(0).normal(size=(4, R, N)).astype(np.float32)

    def two_steps(g):
        return tx.update(2 * g, tx.update(g, tx.init(g))[1])

    many, state = jax.jit(jax.vmap(two_steps))(g)
    single = jax.jit(two_steps)
    for i in range(4):
        one, _ = single(g[i])
        np.testing.assert_allclose(many[i], one, rtol=1e-5)  # as above
    # A state made for the stack can be stepped one matrix at a time.
    _, mapped = jax.jit(jax.vmap(tx.update))(g, state)
    assert mapped.inner_state.mu.shape == (4, R, N)
    assert mapped.inner_state.mu.dtype == jnp.uint8
    assert quantized_arrays(mapped)["mu"].scales.shape == (4, R, 2)


def test_a_step_that_is_not_finite_is_skipped():
    tx = bracket(eight_bit(), float32_bases(7), wrap=lro.rotate_moments)
    grads = gradients(4, dtype=np.float32)
    bad = jax.tree.map(np.copy, grads[1])
    bad["w"][2, 3] = np.nan
    update = jax.jit(tx.update)
    _, state = update(grads[0], jax.jit(tx.init)(grads[0]))
    updates, after = update(bad, state)
    assert not np.asarray(updates["w"]).any()
    inner, inner_after = state.inner_state, after.inner_state
    jax.tree.map(np.testing.assert_array_equal, inner, inner_after)
    assert np.isfinite(update(grads[2], after)[0]["w"]).all()


def test_map_params_reaches_codes_and_whole_arrays_and_scales():
    tx = eight_bit()
    params = gradients(1, dtype=np.float32)[0]
    state = tx.init(params)
    assert state.inner_state.mu["w"].dtype == jnp.uint8
    assert state.inner_state.mu["b"].dtype == jnp.float32
    names = optax.tree.map_params(tx, lambda _: "param", state)
    each = {"w": "param", "b": "param"}
    assert names.inner_state.mu == names.inner_state.nu == each
    assert names.inner_state.count.shape == ()
    assert [x for x in names.scales if isinstance(x, dict)] == [each, each]
    # With further trees too, leaf for leaf.
    shapes = optax.tree.map_params(tx, lambda q, p: p.shape, state, params)
    assert shapes.inner_state.nu == {"w": (M, N), "b": (5,)}
    assert shapes.scales[-1] == {"w": (M, N), "b": (5,)}


@pytest.mark.parametrize(
    "wrap",
    [
        lro.rotate_moments,
        lambda inner: lro.in_subspace(lro.steps.per_matrix(inner)),
        lambda inner: lro.rotate_moments(lro.steps.per_matrix(inner)),
    ],
    ids=["rotate_moments", "per_matrix", "both"],
)
@pytest.mark.parametrize(
    "inner",
    [pytest.param(optax.trace(0.9), marks=NIGHTLY), optax.scale_by_adam()],
    ids=["trace", "adam"],
)
def test_a_stacked_kernel_in_a_nest(wrap, inner):
    grads = [
        {"w": np.stack([a["w"], 2 * b["w"]]), "b": a["b"]}
        for a, b in zip(
            gradients(4, dtype=np.float32),
            gradients(4, seed=1, dtype=np.float32),
            strict=True,
        )
    ]

    def states(inner):
        stages = optax.chain(lro.dominant_svd(), lro.project(), wrap(inner))
        tx = lro.low_rank(
            optax.chain(stages, lro.project_back()),
            rank=R,
            refresh_every=2,
            dimension_numbers=lro.STACKED,
        )
        return run(tx, grads)

    updates, state = states(optax.chain(optax.identity(), eight_bit(inner, min_size=1)))
    name = "trace" if isinstance(inner.init(0.0), optax.TraceState) else "mu"
    found = quantized_arrays(state)
    assert (found[f"{name}/w"].codes.shape, found[f"{name}/b"].codes.shape) == (
        (2, R, N),
        (5,),
    )
    assert found[f"{name}/w"].scales.shape == (2, R, 2)
    # And does what the inner one does, to some roundings in 8 bits.
    expected, exact = states(inner)
    assert np.linalg.norm(updates - expected) < 0.05 * np.linalg.norm(expected)
    for k in ("w", "b"):
        m = np.asarray(optax.tree.get(exact, name)[k])
        error = np.asarray(found[f"{name}/{k}"].dequantize()) - m
        assert np.linalg.norm(error) < 0.05 * np.linalg.norm(m)


@pytest.mark.parametrize("name", ["block_size", "min_size"])
@pytest.mark.parametrize("value", [0, 1.5])
def test_sizes_are_whole_numbers(name, value):
    with pytest.raises(ValueError, match=f"{name} must be an int of at least 1"):
        quantize_moments(optax.identity(), **{name: value})


def test_the_state_is_quantised_state():
    assert isinstance(eight_bit().init(jnp.ones((4, 40))), QuantizedState)
