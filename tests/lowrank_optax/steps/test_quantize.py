"""State in few bits: what comes back, what stays the same, and what it costs."""

import functools
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lowrank_optax as lro
from lowrank_optax.core.moments import first_moments
from lowrank_optax.steps.quantize import (
    QuantizedArray,
    QuantizedState,
    quantize_array,
    quantize_moments,
)
from tests.helpers import numpy_reference as reference

M, N, R = 8, 37, 3  # 37: blocks of 19 and 18 at block size 32
B1, B2, EPS = 0.9, 0.99, 1e-8
LIMIT: Any = functools.partial(settings, derandomize=True, deadline=None)


# --- the definition, once more, in numpy ---


def value_map(signed):
    """Dynamic quantisation: 0, 1, and the middles of ever finer parts of a decade."""
    middles = []
    for k in range(7):
        parts = 2 ** ((6 if signed else 7) - k)
        edges = np.linspace(0.1, 1, parts + 1) / 10**k
        middles += [(a + b) / 2 for a, b in itertools.pairwise(edges)]
    values = [0, 1, *middles]
    if signed:
        values += [-1, *(-x for x in middles if x != max(middles))]
    # The library's values are float32.
    return np.sort(np.asarray(values, np.float32).astype(np.float64))


MAPS = {signed: value_map(signed) for signed in (False, True)}


def block_count(n, block_size):
    return math.ceil(n / block_size)


def block_length(n, block_size):
    """Of equally long blocks, as few as hold at most `block_size` numbers each."""
    return math.ceil(n / block_count(n, block_size))


def rounded(x, block_size):
    """D(Q(x)) of (..., n), number by number."""
    out, size = np.zeros(x.shape), block_length(x.shape[-1], block_size)
    for index in np.ndindex(x.shape[:-1]):
        for start in range(0, x.shape[-1], size):
            part = (*index, slice(start, start + size))
            a = np.abs(x[part]).max()
            if a:
                u = (x[part] / a)[:, None]
                values = MAPS[True][np.abs(u - MAPS[True]).argmin(1)]
                if (values >= 0).all():
                    values = MAPS[False][np.abs(u - MAPS[False]).argmin(1)]
                    positive = (u[:, 0] > 0) & (values == 0)
                    values = np.where(positive, MAPS[False][1], values)
                out[part] = a * values
    return out


def half_gap(u, signed):
    """How far u in [-1, 1] can be from the next value, from the definition.

    Half a part of its decade; under all decades, all of u, for 0 is a value, or in the
    unsigned map, where nothing positive becomes 0, the whole way to the first value.
    The lowest part's middle has become -1: half of one part and a half.
    """
    k = np.floor(-np.log10(np.maximum(np.abs(u), 1e-30)) + 1e-9)
    part = 0.9 / 10**k / 2.0 ** ((6 if signed else 7) - k)
    below = np.abs(u) if signed else np.where(u > 0, MAPS[False][1] - u, 0)
    bound = np.where(k > 6, below, part / 2)
    return np.where(u < -1 + 1.5 * part, 0.75 * part, bound) if signed else bound


def blocks_of(x, block_size):
    size = block_length(x.shape[-1], block_size)
    return [x[..., i : i + size] for i in range(0, x.shape[-1], size)]


@st.composite
def arrays(draw, dtype: Any = np.float32):
    """Numbers over eight decades, some zero; blocks of either sign, or of one."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape, size = draw(
        st.sampled_from([((1,), 7), ((5,), 256), ((2, 33), 32), ((3, 2, 70), 7)])
    )
    x = rng.normal(size=shape) * 10 ** rng.uniform(-8, 0, size=shape)
    x[rng.uniform(size=shape) < 0.1] = 0
    sign = draw(st.sampled_from(["either", "positive", "negative", "barely"]))
    if sign != "either":
        x = -np.abs(x) if sign == "negative" else np.abs(x)
    if sign == "barely":  # negative numbers that round to zero
        x.flat[0] = -1e-9 * np.abs(x).max()
    x = x * 10.0 ** draw(st.integers(-20, 20))
    return x.astype(dtype), size


@functools.partial(jax.jit, static_argnums=1)
def quantize(x, block_size):
    return quantize_array(x, block_count(x.shape[-1], block_size))


dequantize = jax.jit(QuantizedArray.dequantize)


# --- 8-bit blocks ---


def test_the_maps_have_256_values_with_zero_and_one():
    for signed, values in MAPS.items():
        assert len(values) == len(set(values)) == 256
        assert {0.0, 1.0} <= set(values)
        assert values[0] == -signed


@LIMIT(max_examples=200)
@given(arrays())
def test_no_number_is_further_off_than_half_a_gap(case):
    x, size = case
    back = dequantize(quantize(x, size))
    assert back.dtype == x.dtype
    for a, b in zip(
        blocks_of(np.asarray(x, np.float64), size),
        blocks_of(np.asarray(back, np.float64), size),
        strict=True,
    ):
        largest = np.abs(a).max(-1, keepdims=True)
        u = a / np.where(largest > 0, largest, 1)
        # Signed if a number is nearer to the first value under zero than to zero.
        signed = (u <= -0.55e-6 / 2).any(-1, keepdims=True)
        bound = np.where(signed, half_gap(u, True), half_gap(u, False))
        # A negative number in an unsigned block goes to zero, as in the signed map.
        bound = np.where(u < 0, half_gap(u, True), bound)
        # The division and the product round in float32, an ulp each.
        slack = 4 * np.finfo(np.float32).eps * np.maximum(np.abs(a), np.abs(b))
        assert (np.abs(a - b) <= bound * largest + slack).all()


@LIMIT(max_examples=100)
@given(arrays())
def test_zero_and_the_largest_are_exact(case):
    x, size = case
    back = dequantize(quantize(x, size))
    assert (np.asarray(back)[np.asarray(x) == 0] == 0).all()
    for a, b in zip(blocks_of(x, size), blocks_of(back, size), strict=True):
        at = np.argmax(np.abs(a), -1, keepdims=True)
        taken = [np.take_along_axis(np.asarray(y), at, -1) for y in (a, b)]
        np.testing.assert_array_equal(*taken)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float64])
def test_to_quantise_twice_is_to_quantise_once(dtype):
    @LIMIT(max_examples=100)
    @given(arrays(dtype))
    def check(case):
        x, size = case
        once = quantize(x, size)
        twice = quantize(dequantize(once), size)
        np.testing.assert_array_equal(once.codes, twice.codes)
        np.testing.assert_array_equal(once.scales, twice.scales)

    with jax.enable_x64(dtype == jnp.float64):
        check()


@pytest.mark.parametrize(
    ("n", "block_size", "lengths"),
    [
        (37, 32, [19, 18]),
        (70, 7, [7] * 10),
        (10, 3, [3, 3, 3, 1]),
        (5, 256, [5]),
        (513, 256, [171] * 3),
    ],
)
def test_blocks_are_equally_long(n, block_size, lengths):
    x = jnp.arange(1.0, n + 1)  # a block's last is its largest
    q = quantize(x, block_size)
    np.testing.assert_array_equal(q.scales, np.cumsum(lengths))
    assert q.codes.shape == (n,)


def test_the_whole_range_is_used_where_no_number_is_negative():
    x = jnp.linspace(0, 1, 256)
    worst = [
        float(jnp.abs(quantize_array(y, 1).dequantize() - y).max()) for y in (x, -x)
    ]
    # The top decade's parts: 0.9 / 128 wide, or 0.9 / 64 and near -1 1.5 times that.
    assert worst[0] <= 0.9 / 256 + 1e-6
    assert 0.9 / 128 - 1e-3 < worst[1] <= 0.75 * 0.9 / 64 + 1e-6


def test_each_block_has_a_map_and_a_scale_of_its_own():
    x = jnp.array([4.0, 1.0, -8.0, 1.0, 0.0, 0.0, -2.0])
    q = quantize_array(x, 4)
    assert q.codes.dtype == jnp.uint8
    assert q.codes.shape == x.shape
    np.testing.assert_array_equal(q.scales, [4, -8, 0, -2])  # signed: negative
    assert not np.signbit(np.asarray(q.dequantize())[4:6]).any()


def test_what_is_not_finite_is_not_hidden():
    x = jnp.array([1.0, jnp.nan, 3.0, 1.0, jnp.inf, 0.0, -jnp.inf, -1.0, 0.0, 2.0])
    back = np.asarray(quantize_array(x, 4).dequantize())
    assert not np.isfinite(back[:9]).any()
    assert back[9] == 2


def test_the_smallest_numbers():
    tiny = np.float32(np.finfo(np.float32).tiny)
    x = np.array([tiny / 4, -tiny / 8, 0, tiny / 4])
    # Subnormal: XLA may take them for zero, and divides by them either way.
    back = np.asarray(quantize_array(jnp.asarray(x), 2).dequantize())
    assert (np.abs(back) <= tiny / 4).all()
    with jax.enable_x64(True):  # the scales of float64 are float64
        y = jnp.array([1e-200, -3e-201])
        np.testing.assert_allclose(quantize_array(y, 1).dequantize(), y, rtol=0.05)


def test_nothing_positive_becomes_zero():
    x = jnp.asarray([1.0, 1e-6, 1e-9, 1e-30, 0.0])
    back = np.asarray(quantize_array(x, 1).dequantize())
    np.testing.assert_allclose(back[2:], [MAPS[False][1]] * 2 + [0.0], rtol=1e-6)


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
    with pytest.raises(ValueError, match="does not know how OddState turns"):
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
    assert jnp.issubdtype(after.inner_state[1].rng_key.dtype, jax.dtypes.prng_key)


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
    "inner", [optax.trace(0.9), optax.scale_by_adam()], ids=["trace", "adam"]
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
