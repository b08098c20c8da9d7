"""Numbers in 8-bit blocks: how far they are off, and what is exact."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_optax.steps import quantize as stored
from lowrank_optax.steps.quantize import (
    QuantizedArray,
    quantize_array,
)
from models import SIZES, LlamaConfig
from tests.helpers.numpy_quantize import MAPS, block_count, blocks_of, half_gap

LIMIT: Any = functools.partial(settings, derandomize=True, deadline=None)


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


@pytest.mark.parametrize("config", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("devices", [2, 4, 8, 16, 32])
def test_devices_split_no_block_of_a_llama(config: LlamaConfig, devices: int) -> None:
    for n in (config.hidden_size, config.mlp_size):
        if n % devices == 0 and n // devices >= 128:
            assert stored.blocks_of(n, 256) % devices == 0


@given(n=st.integers(1, 4096), size=st.sampled_from([64, 256]))
def test_blocks_are_equal_and_as_many_devices_as_can_be_split_none(
    n: int, size: int
) -> None:
    count = stored.blocks_of(n, size)
    assert math.ceil(n / count) <= size
    possible = [n // x for x in range(size // 2, min(size, n) + 1) if n % x == 0]
    for devices in (2, 4, 8, 16, 32, 64):
        if any(other % devices == 0 for other in possible):
            assert n % count == 0
            assert count % devices == 0
