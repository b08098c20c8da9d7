"""The number by which a damaged array is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from train.run.checksum import checksums

DTYPES = ["float32", "bfloat16", "int8", "uint8", "int32", "bool", "float64", "int64"]


def in_numpy(x: np.ndarray) -> int:
    """The same in Python's integers, from the array's bytes."""
    size = min(x.dtype.itemsize, 4)
    words = np.frombuffer(np.ascontiguousarray(x).tobytes(), f"<u{size}")
    total = sum(int(w) * (2 * 1640531527 * i + 1) for i, w in enumerate(words))
    return total % 2**32


def array_of(dtype: str, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    return (100 * random.normal(size=(3, 5, 7))).astype(jnp.dtype(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_as_it_is_written(dtype):
    x = array_of(dtype)
    with jax.enable_x64(True):
        assert checksums([jnp.asarray(x)]) == {"[0]": in_numpy(x)}


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["float32", "bfloat16", "uint8"]), st.data())
def test_one_bit_is_enough(dtype, data):
    x = array_of(dtype)
    wrong = bytearray(x.tobytes())
    wrong[data.draw(st.integers(0, len(wrong) - 1))] ^= 1 << data.draw(
        st.integers(0, 7)
    )
    y = np.frombuffer(bytes(wrong), x.dtype).reshape(x.shape)
    assert checksums(jnp.asarray(x)) != checksums(jnp.asarray(y))


def test_numbers_in_other_places_are_others():
    x = jnp.asarray(array_of("float32"))
    assert checksums(x) != checksums(jnp.roll(x, 1, axis=0))
    assert checksums(x) != checksums(x[::-1])


def test_keys_and_the_paths_of_a_tree():
    key = jax.random.key(7)
    tree = {"key": key, "none": None, "list": [jnp.zeros(0), jnp.float32(1)]}
    found = checksums(tree)
    assert list(found) == ["['key']", "['list'][0]", "['list'][1]"]
    assert found["['key']"] == in_numpy(np.asarray(jax.random.key_data(key)))
    assert found["['list'][0]"] == 0


def test_the_same_whatever_the_sharding():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    x = np.random.default_rng(0).normal(size=(16, 24)).astype(np.float32)
    for spec in (PartitionSpec("x"), PartitionSpec(None, "x"), PartitionSpec()):
        y = jax.device_put(x, NamedSharding(mesh, spec))
        assert checksums(y) == {"": in_numpy(x)}
