"""Step: moments stored in 8 bits per number."""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lowrank_optax.core.checks import check_count, transformation
from lowrank_optax.core.like_params import map_like_params
from lowrank_optax.core.linalg import fence
from lowrank_optax.core.moments import register_storage
from lowrank_optax.core.sharding import on_auto_axes, shard_along, spec_of
from lowrank_optax.core.stage import stage
from lowrank_optax.core.trees import nothing

_DECADES = 7


def _code_values(bits: int) -> np.ndarray:
    """Returns the middles of 2^(bits - k) equal parts of each decade, ascending."""
    parts = [
        10.0**-k * (0.1 + 0.9 * (np.arange(2 ** (bits - k)) + 0.5) / 2 ** (bits - k))
        for k in reversed(range(_DECADES))
    ]
    return np.concatenate(parts)


def _tables() -> tuple[np.ndarray, np.ndarray]:
    """Returns the values of the 256 codes, ascending: unsigned and signed."""
    signed, unsigned = _code_values(6), _code_values(7)
    return (
        np.concatenate([[0.0], unsigned, [1.0]]),
        # The lowest is -1 instead of -0.993, so that a block's largest entry is exact.
        np.concatenate([[-1.0], -signed[-2::-1], [0.0], signed, [1.0]]),
    )


def _middles(table: np.ndarray) -> np.ndarray:
    return np.append((table[1:].astype(np.float64) + table[:-1]) / 2, np.inf)


_UNSIGNED, _SIGNED = (table.astype(np.float32) for table in _tables())
# Both tables in one array, the signed one from 256 on.
_VALUES = np.concatenate([_UNSIGNED, _SIGNED])
_MIDDLES = np.concatenate([_middles(_UNSIGNED), _middles(_SIGNED)])
# A positive second moment must not become zero: it divides the step.
_MIDDLES[0] = 0.0
# At or below this fraction of a block's largest entry, a number has a negative code.
_NEGATIVE = _MIDDLES[_MIDDLES < 0][-1]


class QuantizedArray(NamedTuple):
    """An array in 8 bits per number, in equal blocks along its last axis.

    Attributes:
      codes: uint8, the array's shape; indices into a table of 256 values in [-1, 1].
      scales: (..., blocks), the largest magnitude of each block, negative if the block
        uses the signed table; in the array's dtype, which holds it exactly. A block has
        ceil(n / blocks) of the n numbers, the last one the rest.
    """

    codes: jax.Array
    scales: jax.Array

    def dequantize(self) -> jax.Array:
        """Returns the array: each code's value times its block's scale."""
        wide = jnp.promote_types(self.scales.dtype, jnp.float32)
        scales = self.scales[..., None].astype(wide)
        codes = in_blocks(self.codes, self.scales.shape[-1]).astype(jnp.int32)
        table = jnp.asarray(_VALUES, scales.dtype)
        values = jnp.take(table, codes + 256 * (scales < 0), mode="clip")
        values = from_blocks(values * jnp.abs(scales), self.codes)
        return values.astype(self.scales.dtype)


def quantize_array(x: jax.Array, blocks: int) -> QuantizedArray:
    """Quantizes x (..., n) to the nearest codes, to the lower one of a tie."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    parts = in_blocks(wide, blocks)
    scales = jnp.max(jnp.abs(parts), axis=-1, keepdims=True)
    parts = parts / jnp.where(scales == 0, 1, scales)
    # Whether any rounded value is negative, so that quantizing twice changes nothing.
    signed = jnp.min(parts, axis=-1, keepdims=True) <= _NEGATIVE.astype(wide.dtype)

    middles = jnp.asarray(_MIDDLES, wide.dtype)
    codes = start = 256 * signed.astype(jnp.int32)
    for bit in (128, 64, 32, 16, 8, 4, 2, 1):  # how many middles lie below
        middle = jnp.take(middles, codes + (bit - 1), mode="clip")
        codes = codes + bit * (parts > middle)
    return QuantizedArray(
        codes=from_blocks(codes - start, x).astype(jnp.uint8),
        scales=jnp.where(signed, -scales, scales)[..., 0].astype(x.dtype),
    )


def blocks_of(n: int, size: int) -> int:
    """The number of blocks in which n numbers are stored, of `size` numbers at most.

    Equal blocks of size / 2 to `size` numbers: the number of blocks with the highest
    power of two as a factor, so that as many devices split no block. If no such length
    divides n, the fewest blocks. The mesh plays no part: a state has the same bits on
    every mesh.
    """
    lengths = range(math.ceil(size / 2), min(size, n) + 1)
    counts = [n // length for length in lengths if n % length == 0]
    powers_of_two = {count: count & -count for count in counts}
    fewest = math.ceil(n / size)
    return max(counts, key=lambda x: (powers_of_two[x], -x), default=fewest)


def in_blocks(x: jax.Array, blocks: int) -> jax.Array:
    """Splits (..., n) into (..., blocks, ceil(n / blocks)), padded with zeros."""
    n = x.shape[-1]
    size = math.ceil(n / blocks)
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, blocks * size - n)])
    return x.reshape(*x.shape[:-1], blocks, size)


def from_blocks(parts: jax.Array, like: jax.Array) -> jax.Array:
    """Undoes `in_blocks`."""
    return parts.reshape(*parts.shape[:-2], -1)[..., : like.shape[-1]]


class QuantizedState(NamedTuple):
    """State of `quantize_moments`.

    Attributes:
      inner_state: the inner transformation's state, with the codes of a
        `QuantizedArray` for every large array of real numbers of a parameter.
      scales: the scales in the same order, a tree for each tree in the inner state that
        is like the parameters; False for an array that is not quantized.
    """

    inner_state: optax.OptState
    scales: tuple[optax.Params, ...]


def _dequantized(state: QuantizedState) -> optax.OptState:
    """Returns the inner state in full precision."""
    codes, structure = jax.tree.flatten(state.inner_state)
    scales = jax.tree.leaves(state.scales)
    return structure.unflatten(
        QuantizedArray(c, s).dequantize() if s.dtype != jnp.bool_ else c
        for c, s in zip(codes, scales, strict=True)
    )


def _quantized_by(blocks: int, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    # The fence stops XLA from spending seconds on folding a large state of zeros.
    codes, scales = quantize_array(fence(x), blocks)
    return codes, scales


def _quantized_like(
    state: QuantizedState, inner_state: optax.OptState
) -> QuantizedState:
    """Quantizes the arrays of `inner_state` that are quantized in `state`."""
    leaves, structure = jax.tree.flatten(inner_state)
    scales, inside = jax.tree.flatten(state.scales)
    pairs = [
        on_auto_axes(partial(_quantized_by, s.shape[-1]), x, like=(x, s))
        if s.dtype != jnp.bool_
        else (x, s)
        for x, s in zip(leaves, scales, strict=True)
    ]
    return QuantizedState(
        structure.unflatten([x for x, _ in pairs]),
        inside.unflatten([s for _, s in pairs]),
    )


register_storage(QuantizedState, unpack=_dequantized, pack=_quantized_like)


def quantize_moments(
    inner: optax.GradientTransformation, *, block_size: int = 256, min_size: int = 4096
) -> optax.GradientTransformationExtraArgs:
    """Stores `inner`'s state in 8 bits per number, block by block.

    state <- Q(inner(G, D(state))), so that the step has full precision (Dettmers et al.
    2022, "8-bit Optimizers via Block-wise Quantization", section 2). A block is stored
    as its largest magnitude a and a code q per number, the nearest to x / a in a table
    c of 256:

        D(q) = a c_q,   c = 0, 1 and the middles of 2^(b-k) equal parts of each decade
                        (10^-(k+1), 10^-k], k = 0 ... 6

    with b = 7 for blocks without negative numbers, and b = 6 with both signs otherwise.
    Zero and a are exact, and Q(D(Q(x))) = Q(x). A NaN or an Inf makes its block not
    finite. Use it inside `in_subspace` or `rotate_moments`.

    Deviations from bitsandbytes: each block chooses its table by its signs; blocks lie
    along the last axis; -1 is a value; a positive number in a block without negative
    ones never becomes 0.

    Args:
      inner: any optax transformation, such as `optax.scale_by_adam()`.
      block_size: the most numbers along the last axis that share a scale. A block may
        have half as many, so that 2, 4, 8 ... devices split no block: 1376 numbers are
        8 blocks of 172, and 2048 are 16 of 128, on any number of devices.
      min_size: arrays of fewer numbers are not quantized. Neither are scalars,
        integers, keys, arrays that would not shrink, or arrays that belong to no
        parameter.

    Raises:
      ValueError: a block_size or min_size below 1.

    Example:
      >>> tx = lro.quantize_moments(optax.scale_by_adam())
      >>> state = tx.init({"w": jnp.ones((64, 512)), "b": jnp.ones(512)})
      >>> mu = optax.tree.get(state, "mu")
      >>> mu["w"].dtype.name, mu["b"].dtype.name
      ('uint8', 'float32')
    """
    check_count("block_size", block_size)
    check_count("min_size", min_size)
    inner = transformation("quantize_moments()", inner)

    scales_of = partial(_zero_scales, block_size=block_size, min_size=min_size)

    def init(params: optax.Params) -> QuantizedState:
        state = inner.init(params)
        scales = map_like_params(scales_of, inner, state)
        return _quantized_like(QuantizedState(state, scales), state)

    def update(
        updates: optax.Updates,
        state: QuantizedState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, QuantizedState]:
        updates, new = inner.update(updates, _dequantized(state), params, **extra_args)
        return updates, _quantized_like(state, new)

    return stage(init, update)


def _zero_scales(_: str, x: jax.Array, block_size: int, min_size: int) -> jax.Array:
    """Zero scales for an array to quantize, and False for any other."""
    if not x.ndim or not jnp.issubdtype(x.dtype, jnp.floating):
        return nothing()
    blocks = blocks_of(x.shape[-1], block_size)
    scales = x.size // max(x.shape[-1], 1) * blocks
    smaller = x.size + x.dtype.itemsize * scales < x.size * x.dtype.itemsize
    if x.size < min_size or not smaller:
        return nothing()
    zeros = jnp.zeros((*x.shape[:-1], blocks), x.dtype)
    # Blocks of unequal length cannot be sharded as the numbers are.
    spec = spec_of(x) if x.shape[-1] % blocks == 0 else spec_of(x)[:-1]
    return shard_along(zeros, spec, of=x)
