"""Weights in few bits: every stored number a neighbour, every update in the mean."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from scipy.stats import binom

from lowrank_optax.weights import (
    QuantizedWeights,
    add_updates,
    dense,
    quantize,
    round_stochastically,
    store,
)

LIMIT: Any = functools.partial(settings, derandomize=True, deadline=None)
DTYPES = [jnp.bfloat16, jnp.float16]
dtypes = pytest.mark.parametrize("dtype", DTYPES)
rounded = jax.jit(round_stochastically, static_argnums=2)
quantize = jax.jit(quantize, static_argnums=2)
apply = jax.jit(add_updates)
dequantize = jax.jit(QuantizedWeights.dequantize)


def keys(seed, count):
    return jax.random.split(jax.random.key(seed), count)


def same_bits(a, b):
    """Of two trees, the dtypes too."""
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes())


def agrees(count, n, p):
    """Whether a count of n draws of probability p is one; a true one fails 1e-9."""
    low, high = binom.interval(1 - 1e-9, n, p)
    return low <= count <= high


def neighbours(x, dtype):
    """The largest number of the dtype that is <= x, and the next one, in float64."""
    with np.errstate(over="ignore"):
        near = np.asarray(x, np.float32).astype(dtype)
        below = np.nextafter(near, np.asarray(-np.inf, dtype))
        low = np.where(near.astype(np.float64) <= x, near, below).astype(dtype)
        high = np.nextafter(low, np.asarray(np.inf, dtype))
    return low.astype(np.float64), high.astype(np.float64)


# --- round_stochastically ---


@dtypes
@pytest.mark.parametrize(
    "x",
    [
        *(1 + 2**-11, 1.0078, -3.1415927, 65000.1, -1.9999),
        *(3.1e-5, -2.2e-7, 1e-8),  # subnormal in float16, the last under its smallest
    ],
)
def test_the_mean_is_x(x, dtype):
    n = 20_000
    y = rounded(jax.random.key(0), jnp.full(n, x), dtype)
    x = np.float64(np.float32(x))
    low, high = neighbours(x, dtype)
    upper = np.sum(np.asarray(y, np.float64) == high)
    assert agrees(upper, n, (x - low) / (high - low))


def test_the_mean_of_subnormal_numbers():
    """As integers, since XLA's arithmetic may take them for zero."""
    x = np.full(20_000, 0x00034000, np.uint32).view(np.float32)  # a quarter past 3
    y = rounded(jax.random.key(0), jnp.asarray(x), jnp.bfloat16)
    bits = np.asarray(y).view(np.uint16)
    assert set(bits.tolist()) == {3, 4}
    assert agrees(np.sum(bits == 4), x.size, 0.25)


@dtypes
def test_only_neighbours(dtype):
    largest = float(ml_dtypes.finfo(dtype).max)

    @LIMIT(max_examples=200)
    @given(st.lists(st.floats(width=32), min_size=8, max_size=8), st.integers(0, 99))
    def check(xs, seed):
        x = np.asarray(xs, np.float32)
        y = np.asarray(rounded(seed, jnp.asarray(x), dtype), np.float64)
        np.testing.assert_array_equal(np.isnan(y), np.isnan(x))
        np.testing.assert_array_equal(np.isinf(y), np.isinf(x))
        x, y = (a[np.isfinite(x)].astype(np.float64) for a in (x, y))
        low, high = (np.clip(a, -largest, largest) for a in neighbours(x, dtype))
        assert ((y == low) | (y == high)).all()
        np.testing.assert_array_equal(y[x == low], low[x == low])

    check()


@dtypes
def test_every_number_of_the_dtype_stays(dtype):
    every = np.arange(2**16, dtype=np.uint16).view(dtype)
    x = every.astype(np.float32)
    nan = np.isnan(x)
    for seed in range(4):
        y = np.asarray(rounded(jax.random.key(seed), jnp.asarray(x), dtype))
        assert np.isnan(y[nan].astype(np.float32)).all()
        same_bits(y[~nan], every[~nan])


@dtypes
def test_what_is_finite_stays_finite(dtype):
    largest = np.float32(ml_dtypes.finfo(dtype).max)
    beyond = np.float32(largest * (1 + 2.0**-10)) if dtype == jnp.bfloat16 else 1e9
    x = jnp.tile(jnp.asarray([beyond, -beyond, jnp.inf, -jnp.inf]), 1000)
    y = rounded(jax.random.key(1), x, dtype)
    same_bits(y, np.tile(np.array([largest, -largest, np.inf, -np.inf], dtype), 1000))


def test_a_nan_whose_upper_half_is_infs():
    x = np.array([0x7F800001, 0xFF800001, 0x7FFFFFFF], np.uint32).view(np.float32)
    for seed in range(20):
        assert np.isnan(rounded(seed, jnp.asarray(x), jnp.bfloat16)).all()


def test_other_dtypes_are_refused():
    for dtype in (jnp.float32, jnp.int8, jnp.float8_e4m3fn):
        with pytest.raises(ValueError, match="choose bfloat16 or float16"):
            round_stochastically(0, jnp.ones(2), dtype)
    with pytest.raises(ValueError, match="key must be an int or a typed key"):
        round_stochastically(jnp.zeros(2, jnp.uint32), jnp.ones(2), jnp.bfloat16)


# --- quantize ---


@st.composite
def arrays(draw):
    """Over decades and signs; some blocks' largest beside 127 times a power of two."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape, size = draw(st.sampled_from([((1,), 7), ((300,), 256), ((3, 2, 33), 7)]))
    x = rng.normal(size=shape) * 10 ** rng.uniform(-3, 0, size=shape)
    x[rng.uniform(size=shape) < 0.1] = 0
    if draw(st.booleans()):
        edge = 127 * 2.0 ** rng.integers(-4, 4) * (1 + rng.integers(-3, 4) * 2.0**-23)
        x[..., 0] = edge * rng.choice([-1, 1])
    return jnp.asarray(x * 10.0 ** draw(st.integers(-35, 30)), jnp.float32), size


def in_blocks(x, q):
    """x of (..., n) block by block, and each block's scale, in float64."""
    x, size = np.asarray(x, np.float64), math.ceil(q.shape[-1] / q.scales.shape[-1])
    for i in range(q.scales.shape[-1]):
        scale = np.asarray(q.scales[..., i : i + 1], np.float64)
        yield x[..., i * size : (i + 1) * size], scale


@LIMIT(max_examples=100)
@given(arrays(), st.booleans())
def test_no_number_is_further_off_than_its_neighbours(case, stochastic):
    x, size = case
    q = quantize(x, jax.random.key(0) if stochastic else None, size)
    assert (q.codes.dtype, q.scales.dtype) == (jnp.int8, jnp.float32)
    assert q.codes.shape == q.shape == x.shape
    assert q.scales.shape == (*x.shape[:-1], math.ceil(x.shape[-1] / size))
    back = np.asarray(dequantize(q))
    np.testing.assert_array_equal(back[np.asarray(x) == 0], 0)
    for (a, scale), (b, _) in zip(in_blocks(x, q), in_blocks(back, q), strict=True):
        largest = np.abs(a).max(-1, keepdims=True)
        # A scale is within one bit, half a bit to nearest, of the largest / 127.
        normal = largest > 127 * 2.0**-100
        bit = 2.0 ** (np.floor(np.log2(np.where(normal, largest / 127, 1))) - 16)
        off = np.abs(scale - largest / 127) / bit * np.where(normal, 1, 0)
        assert (off <= (1 if stochastic else 0.5) * (1 + 1e-6)).all()
        # The largest is clipped by as much, and the division rounds.
        bound = scale * ((1 if stochastic else 0.5) + 127 * 2.0**-16)
        assert (np.abs(a - b) <= bound).all()
        at_most = np.abs(b).max(-1, keepdims=True)
        np.testing.assert_array_equal((at_most == 127 * scale) | ~normal, True)


@LIMIT(max_examples=100)
@given(arrays(), st.integers(0, 2**31), st.booleans())
def test_a_zero_update_changes_no_bit(case, seed, stochastic):
    """Eleven times, with other keys: nothing that is not updated drifts."""
    x, size = case
    q = quantize(x, jax.random.key(seed) if stochastic else None, size)
    zero, last = jnp.zeros(x.shape), q
    for key in keys(seed, 10):
        last = apply(last, zero, key)
    same_bits(last, q)
    same_bits(quantize(dequantize(q), None, size), q)


@dtypes
def test_a_zero_update_changes_no_bit_of_a_float(dtype):
    w = jax.random.normal(jax.random.key(0), (50, 100)).astype(dtype)
    same_bits(apply(w, jnp.zeros(w.shape), 3), w)


def test_each_number_has_its_mean_and_the_largest_too():
    n = 20_000
    x = np.random.default_rng(0).normal(size=(2, 22)).astype(np.float32)
    draw = jax.jit(jax.vmap(lambda key: quantize(jnp.asarray(x), key, 11)))
    q = draw(keys(1, n))
    back = np.asarray(dequantize(q), np.float64)
    parts, scales = back.reshape(n, 2, 2, 11), np.asarray(q.scales, np.float64)
    largest = np.abs(x).reshape(2, 2, 11).max(-1)
    # Every scale is one of two, the bit below and above the largest / 127.
    bit = 2.0 ** (np.floor(np.log2(largest / 127)) - 16)
    low = np.floor(largest / 127 / bit) * bit
    assert ((scales == low) | (scales == low + bit)).all()
    p = (largest / 127 - low) / bit
    for i in np.ndindex(2, 2):
        assert agrees(np.sum(scales[:, *i] > low[i]), n, p[i])
    # A number is a fair draw given the scale: of variance scale^2 / 4 at most.
    error = (parts.mean(0) - x.reshape(2, 2, 11)) / (low + bit)[..., None]
    assert np.abs(error).max() < 6 * 0.5 / np.sqrt(n)
    # And where x / scale is far from a whole number and a half, with its variance.
    f = np.abs(x.reshape(2, 2, 11)) / low[..., None] % 1
    sure = (f > 0.02) & (f < 0.98)
    spread = parts.std(0) / low[..., None]
    np.testing.assert_allclose(spread[sure], np.sqrt(f * (1 - f))[sure], atol=0.02)


@pytest.mark.parametrize(
    ("n", "block_size", "lengths"),
    [
        (70, 7, [7] * 10),
        (10, 3, [2] * 5),
        (11, 3, [3, 3, 3, 2]),
        (5, 256, [5]),
        (513, 256, [171] * 3),
        (1376, 256, [172] * 8),  # not 6 of 230: eight devices share these out
    ],
)
def test_blocks_are_equally_long(n, block_size, lengths):
    q = quantize(jnp.arange(1.0, n + 1), None, block_size)
    ends = np.cumsum(lengths)  # a block's last is its largest
    np.testing.assert_array_equal(np.asarray(q.codes)[ends - 1], 127)
    np.testing.assert_allclose(q.scales, ends / 127, rtol=2.0**-17)


def test_the_layers_are_independent():
    x = jax.random.normal(jax.random.key(0), (3, 2, 70))
    stacked = quantize(x, block_size=32)
    per_layer = jax.vmap(functools.partial(quantize, block_size=32))
    same_bits(jax.jit(per_layer)(x), stacked)
    same_bits(jax.jit(jax.vmap(per_layer))(x), stacked)
    same_bits(jax.vmap(dequantize)(stacked), dequantize(stacked))


def test_what_is_not_finite_is_not_hidden():
    for key in (None, 0):
        x = [1, jnp.nan, 3, jnp.inf, 0, 1, -jnp.inf, 1, 0, 4, 2]  # blocks of 3 and 2
        x = jnp.array(x, jnp.float32)
        back = np.asarray(dequantize(quantize(x, key, 3)))
        assert np.isnan(back[:9]).all()
        assert back[9] == pytest.approx(4, rel=2**-16)


def test_zeros_and_the_smallest_blocks():
    x = jnp.array([0.0, 0.0, 1e-35, -1e-38, 1e-29, 2e-30])
    back = dequantize(quantize(x, 0, 2))
    np.testing.assert_allclose(back, x, atol=2.0**-100)
    same_bits(dequantize(quantize(jnp.zeros(6), 0, 2)), jnp.zeros(6))


def test_refusals():
    for x in (jnp.ones(()), jnp.ones((2, 0)), jnp.ones(3, int), jnp.ones(3, complex)):
        with pytest.raises(ValueError, match=r"cannot store \w+ of shape"):
            quantize(x)
    with pytest.raises(ValueError, match="block_size must be an int of at least 1"):
        quantize(jnp.ones(3), block_size=0)


# --- add_updates ---


def after(steps, params, updates, update=add_updates):
    """The weights after `steps` times the same update."""

    def body(params, key):
        return update(params, updates, key), None

    return jax.jit(lambda p: jax.lax.scan(body, p, keys(0, steps))[0])(params)


@pytest.mark.parametrize(("dtype", "bits"), [(jnp.bfloat16, 7), (jnp.float16, 10)])
def test_updates_below_half_a_bit_move_the_mean(dtype, bits):
    """64 updates, each a sixteenth of a bit: 4 bits, which plain rounding loses."""
    n, steps, p = 4096, 64, 1 / 16
    w, u = jnp.ones(n, dtype), jnp.full(n, 2.0**-bits * p)
    plain = after(steps, w, u, lambda w, u, key: optax.apply_updates(w, u))
    same_bits(plain, w)
    moved = (np.asarray(after(steps, w, u), np.float64) - 1) * 2**bits
    # Each step moves a weight by one bit or not, and moves it with probability p.
    assert agrees(moved.sum(), n * steps, p)
    assert len(np.unique(moved)) > 5
    np.testing.assert_allclose(moved.mean(), steps * p, rtol=0.02)


def test_updates_below_half_a_code_move_the_mean():
    """The same in int8, where a block's largest keeps its scale."""
    n, steps, p = 4080, 64, 1 / 16
    x = np.zeros((16, 255), np.float32)  # one block a row
    x[:, 7] = -127 * 0.25
    u = np.full(x.shape, 0.25 * p, np.float32)
    u[:, 7] = 0
    w = quantize(jnp.asarray(x))
    nearest = after(steps, w, u, lambda w, u, _: quantize(w.dequantize() + u))
    same_bits(nearest, w)
    new = after(steps, w, u)
    same_bits(new.scales, w.scales)
    moved = np.delete(np.asarray(new.codes, np.int64), 7, axis=1)
    assert agrees(moved.sum(), (n - 16) * steps, p)
    assert (np.asarray(new.codes)[:, 7] == -127).all()


def test_the_largest_of_a_block_moves_too():
    """By a thousandth of a code a step, where the code is 127 at every scale."""
    steps, scale = 100, 0.25
    x = np.zeros((1000, 8), np.float32)
    x[:, 0] = 127 * scale
    u = np.zeros_like(x)
    u[:, 0] = scale / 1000
    new = after(steps, quantize(jnp.asarray(x)), u)
    moved = np.asarray(new.dequantize(), np.float64)[:, 0] - x[:, 0]
    # A scale's bit is 2^-16 of it here; the variance is a quarter bit^2 a step at most.
    bound = 6 * 127 * scale * 2.0**-16 / 2 * np.sqrt(steps / len(x))
    assert bound < 0.03 * scale
    assert abs(moved.mean() - steps * scale / 1000) < bound


def test_other_weights_are_added_to_as_by_optax():
    params = {
        "a": jnp.arange(6.0).reshape(2, 3),
        "n": {"count": jnp.arange(3), "none": None},
        "frozen": jnp.ones(4),
    }
    updates = {
        "a": jnp.full((2, 3), 1e-3, jnp.bfloat16),
        "n": {"count": jnp.full(3, 1.5), "none": None},
        "frozen": jnp.full(4, 0.5),
    }
    same_bits(add_updates(params, updates), optax.apply_updates(params, updates))
    kept = add_updates(params, {**updates, "frozen": None})
    same_bits(kept["frozen"], params["frozen"])
    with jax.enable_x64(True):
        w, u = jnp.array([1.0]), jnp.array([1e-12])
        assert w.dtype == jnp.float64
        same_bits(add_updates(w, u), np.array([1 + 1e-12]))
        # The sum is in the wider of the update's dtype and float32.
        small = add_updates(jnp.ones(9, jnp.bfloat16), jnp.full(9, 2.0**-7), 0)
        same_bits(small, jnp.full(9, 1 + 2**-7, jnp.bfloat16))


@functools.cache
def few_bits():
    """Weights of every kind, and updates."""
    a, b, c = jax.random.normal(jax.random.key(0), (3, 16, 512))
    params = {
        "half": {"w": a.astype(jnp.bfloat16)},
        "int8": quantize(b.reshape(8, 2, 512), None, 64),
        "full": c,
    }
    return params, jax.tree.map(lambda w: 1e-3 * jnp.cos(40 * w), dense(params))


def test_a_leafs_bits_do_not_depend_on_the_other_leaves():
    params, updates = few_bits()
    whole = apply(params, updates, 5)
    half, rest = params["half"], {k: params[k] for k in params if k != "half"}
    alone = apply({"half": half}, {"half": updates["half"]}, 5)
    same_bits({**apply(rest, {k: updates[k] for k in rest}, 5), **alone}, whole)
    # But on its path, and on the key.
    w, u = half["w"], updates["half"]["w"]
    others = [apply({"x": w}, {"x": u}, 5)["x"]]
    others += [apply({"half": {"w": w}}, {"half": {"w": u}}, 6)["half"]["w"]]
    bits = [np.asarray(x).tobytes() for x in [whole["half"]["w"], *others]]
    assert len(set(bits)) == 3
    same_bits(whole["full"], params["full"] + updates["full"])


def test_the_same_bits_under_jit_and_eagerly():
    params, updates = few_bits()
    eagerly = add_updates(params, updates, jax.random.key(5))
    same_bits(eagerly, apply(params, updates, 5))  # and a seed is its key


@pytest.mark.parametrize("axis", [0, 1])
def test_the_same_bits_on_eight_devices(axis):
    params, updates = few_bits()
    alone = apply(params, updates, 5)
    mesh = jax.make_mesh((8,), ("d",))

    def place(x):
        last = P(*[None] * (x.ndim - 1), "d") if x.shape[-1] % 8 == 0 else P()
        spec = P("d") if axis == 0 else last
        return jax.device_put(x, NamedSharding(mesh, spec))

    spread = jax.tree.map(place, (params, updates))
    assert len(spread[0]["int8"].codes.devices()) == 8
    new = apply(*spread, 5)
    assert not new["half"]["w"].sharding.is_fully_replicated
    same_bits(new, alone)


def test_updates_that_do_not_fit():
    params, updates = few_bits()
    with pytest.raises(ValueError, match="half/w: weights in few bits need a key"):
        add_updates(params, updates)
    short = {**updates, "int8": updates["int8"][0]}
    with pytest.raises(
        ValueError, match=r"int8: an update of shape \(2, 512\) for .* \(8, 2, 512\)"
    ):
        add_updates(params, short, 0)
    with pytest.raises(ValueError, match="full: an update of shape"):
        add_updates(params, {**updates, "full": 1.0}, 0)
    with pytest.raises(ValueError, match="float8_e4m3fn: choose bfloat16 or float16"):
        add_updates(jnp.ones(2, jnp.float8_e4m3fn), jnp.ones(2), 0)


# --- dense, store ---


def transformer():
    a, b, c, d = jax.random.normal(jax.random.key(3), (4, 64, 512))
    return {
        "embed": {"embedding": a},
        "layers": {
            "attn": {"q": {"kernel": b.reshape(2, 64, 256), "bias": jnp.ones(256)}},
            "mlp": {"up": {"kernel": c}},
            "norm": {"scale": jnp.ones((2, 64))},
        },
        "router": d,
        "count": jnp.arange(3),
    }


def test_stored_weights():
    params = transformer()
    in_int8 = store(params, "int8")
    layers = in_int8["layers"]
    for block, name in (("mlp", "up"), ("attn", "q")):
        w = params["layers"][block][name]["kernel"]
        stored = layers[block][name]["kernel"]
        same_bits(stored, quantize(w))
        assert stored.codes.nbytes + stored.scales.nbytes == w.size * (1 + 4 / 128)
    rest = [in_int8["embed"], in_int8["router"], layers["norm"]]
    rest = jax.tree.leaves([*rest, layers["attn"]["q"]["bias"]])
    assert {x.dtype for x in rest} == {jnp.dtype(jnp.bfloat16)}
    same_bits(in_int8["count"], params["count"])

    half = store(params, "bfloat16")
    same_bits(half["router"], params["router"].astype(jnp.bfloat16))
    same_bits(store(params, "float32"), params)
    masked = store(params, "int8", mask=lambda path: path == "router")
    assert isinstance(masked["router"], QuantizedWeights)
    assert masked["layers"]["mlp"]["up"]["kernel"].dtype == jnp.bfloat16
    with pytest.raises(ValueError, match="dtype='int4': choose float32, bfloat16 or"):
        store(params, "int4")  # pyright: ignore[reportArgumentType]


def test_dense():
    stored = store(transformer(), "int8")
    for dtype in (jnp.float32, jnp.bfloat16):
        found = dense(stored, dtype)
        kernel = stored["layers"]["mlp"]["up"]["kernel"]
        same_bits(found["layers"]["mlp"]["up"]["kernel"], kernel.dequantize(dtype))
        assert found["router"] is stored["router"]
    assert jax.tree.structure(dense(stored)) == jax.tree.structure(transformer())
    assert dense([None, jnp.ones(2)])[0] is None


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_training_in_few_bits_follows_training_in_float32(dtype):
    """Adam's steps of 0.001, where the weights are 0.008 and about 0.02 apart."""
    start, way = jax.random.normal(jax.random.key(4), (2, 16, 512))
    target = start + 0.1 * jnp.sign(way)
    tx, steps = optax.adam(1e-3), keys(5, 250)

    def distance(params):
        return jnp.sqrt(jnp.mean((dense(params) - target) ** 2))

    def train(params, apply):
        def step(carry, key):
            params, state = carry
            updates, state = tx.update(dense(params) - target, state)
            return (apply(params, updates, key), state), None

        carry = params, tx.init(jnp.asarray(dense(params), jnp.float32))
        return jax.jit(lambda c: jax.lax.scan(step, c, steps))(carry)[0][0]

    def to_nearest(w, u, _):
        if isinstance(w, QuantizedWeights):
            return quantize(w.dequantize() + u)
        return optax.apply_updates(w, u)

    stored = store(start, dtype, mask=lambda _: True)
    assert distance(start) > 0.099
    assert distance(train(start, add_updates)) < 0.001
    # Half a gap for the draw, in the mean square, and half for Adam's turning round.
    gap = 2.0**-7 if dtype == "bfloat16" else float(jnp.mean(stored.scales))
    assert distance(train(stored, add_updates)) < gap
    # A few small weights, with closer neighbours, arrive all the same.
    assert distance(train(stored, to_nearest)) > 0.08
