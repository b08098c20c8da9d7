"""Step: moments stored in 8 bits a number."""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lowrank_optax.core.linalg import fence
from lowrank_optax.core.moments import register_storage
from lowrank_optax.core.sharding import on_auto_axes, shard_along, spec_of
from lowrank_optax.core.stage import stage
from lowrank_optax.core.trees import nothing

_DECADES = 7


def _code_values(bits: int) -> np.ndarray:
    """The middles of 2^(bits - k) equal parts of (10^-(k+1), 10^-k], ascending."""
    parts = [
        10.0**-k * (0.1 + 0.9 * (np.arange(2 ** (bits - k)) + 0.5) / 2 ** (bits - k))
        for k in reversed(range(_DECADES))
    ]
    return np.concatenate(parts)


def _tables() -> tuple[np.ndarray, np.ndarray]:
    """The 256 codes' values, ascending: not negative, and of either sign."""
    signed, unsigned = _code_values(6), _code_values(7)
    return (
        np.concatenate([[0.0], unsigned, [1.0]]),
        # The lowest is -1, not -0.993, so that no block's largest entry is rounded.
        np.concatenate([[-1.0], -signed[-2::-1], [0.0], signed, [1.0]]),
    )


def _middles(table: np.ndarray) -> np.ndarray:
    return np.append((table[1:].astype(np.float64) + table[:-1]) / 2, np.inf)


_UNSIGNED, _SIGNED = (table.astype(np.float32) for table in _tables())
# Both maps in one table each, the signed one from 256 on.
_VALUES = np.concatenate([_UNSIGNED, _SIGNED])
_MIDDLES = np.concatenate([_middles(_UNSIGNED), _middles(_SIGNED)])
# A positive second moment must not become zero: it divides the step.
_MIDDLES[0] = 0.0
# At or under this part of a block's largest entry, a number rounds to a negative code.
_NEGATIVE = _MIDDLES[_MIDDLES < 0][-1]


class QuantizedArray(NamedTuple):
    """An array in 8 bits a number, in equal blocks along its last axis.

    Attributes:
      codes: uint8, the array's shape; places in a map of 256 values in [-1, 1].
      scales: (..., blocks), the largest magnitude of each block, with a minus where the
        block's map is the signed one; in the array's dtype, which holds it exactly. A
        block has ceil(n / blocks) of the n numbers, the last one what is left.
    """

    codes: jax.Array
    scales: jax.Array

    def dequantize(self) -> jax.Array:
        """The array: each code's value times its block's scale."""
        wide = jnp.promote_types(self.scales.dtype, jnp.float32)
        scales = self.scales[..., None].astype(wide)
        codes = in_blocks(self.codes, self.scales.shape[-1]).astype(jnp.int32)
        table = jnp.asarray(_VALUES, scales.dtype)
        values = jnp.take(table, codes + 256 * (scales < 0), mode="clip")
        values = from_blocks(values * jnp.abs(scales), self.codes)
        return values.astype(self.scales.dtype)


def quantize_array(x: jax.Array, blocks: int) -> QuantizedArray:
    """x (..., n) in the nearest codes, the lower one of two equally near."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    parts = in_blocks(wide, blocks)
    scales = jnp.max(jnp.abs(parts), axis=-1, keepdims=True)
    parts = parts / jnp.where(scales == 0, 1, scales)
    # By what is left after rounding, so that to quantise twice is to do it once.
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
    """(..., n) to (..., blocks, ceil(n / blocks)), the end filled up with zeros."""
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
      inner_state: the inner transformation's, with the codes of a `QuantizedArray` in
        place of every large array of real numbers that belongs to a parameter.
      scales: the scales in the same order, in a tree for each tree in the inner state
        that is like the parameters; False for an array that is stored as it is.
    """

    inner_state: Any
    scales: tuple[Any, ...]


def _dequantized(state: QuantizedState) -> optax.OptState:
    """The inner state, in full precision."""
    codes, structure = jax.tree.flatten(state.inner_state)
    scales = jax.tree.leaves(state.scales)
    return structure.unflatten(
        QuantizedArray(c, s).dequantize() if s.dtype != jnp.bool_ else c
        for c, s in zip(codes, scales, strict=True)
    )


def _quantized_by(blocks: int, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    # Fenced, or XLA spends seconds on folding the zeros of a large first state.
    codes, scales = quantize_array(fence(x), blocks)
    return codes, scales


def _quantized_like(
    state: QuantizedState, inner_state: optax.OptState
) -> QuantizedState:
    """`inner_state` with its arrays quantised where `state` has them so."""
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
    inner: optax.GradientTransformation,
    *,
    block_size: int = 256,
    min_size: int = 4096,
) -> optax.GradientTransformationExtraArgs:
    """`inner` with its state in 8 bits a number, block by block.

    state <- Q(inner(G, D(state))): D before every step, Q after it, so that the step
    itself is taken in full precision (Dettmers et al. 2022, "8-bit Optimizers via
    Block-wise Quantization", section 2). A block of x is its largest magnitude a and,
    for each number, the code q of the nearest value c_q to x / a in a map of 256:

        D(q) = a c_q,   c = 0, 1 and the middles of 2^(b-k) equal parts of each decade
                        (10^-(k+1), 10^-k], k = 0 ... 6

    with b = 7 in a block without negative numbers, and b = 6 for either sign in others
    ("dynamic quantisation"). Zero and a come back exactly; quantising twice is
    quantising once, so that state which a step leaves alone does not drift; and a NaN
    or an Inf makes its whole block not finite. Put it inside `in_subspace` or
    `rotate_moments`; the latter turns the dequantised moments.

    Deviations: a block chooses its map by itself, where bitsandbytes is told the
    moment's sign; blocks lie along the last axis, so that the state keeps the array's
    shape and paths; and -1 is a value, where theirs ends at -0.993.

    A positive number in a block without negative ones is never stored as 0, but as the
    smallest value at least, a 3.25e-7. Rounded to 0, as theirs, a small V beside a
    large one (rare tokens in an output head) leaves eps alone to divide the step: a
    LLaMA of 60M parameters diverged so. Memory is saved between steps; during one, XLA
    holds what it works on in full precision.

    Args:
      inner: any optax transformation, `optax.scale_by_adam()` for example.
      block_size: the most numbers along the last axis that share a scale. A block may
        have half as many: wherever the axis allows, 2, 4, 8 ... devices then split no
        block as long as each has that many numbers. 1376 numbers are 8 blocks of 172,
        and 2048 are 16 of 128, on any number of devices.
      min_size: arrays of fewer numbers stay as they are; so do scalars, integers, keys,
        arrays that would not get smaller, and those that belong to no parameter. Shapes
        alone decide, at init.

    Raises:
      ValueError: a block_size or min_size below 1.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro, optax
      >>> tx = lro.quantize_moments(optax.scale_by_adam())
      >>> state = tx.init({"w": jnp.ones((64, 512)), "b": jnp.ones(512)})
      >>> mu = optax.tree.get(state, "mu")
      >>> mu["w"].dtype.name, mu["b"].dtype.name
      ('uint8', 'float32')
    """
    for name, value in (("block_size", block_size), ("min_size", min_size)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an int of at least 1, not {value!r}")
    inner = optax.with_extra_args_support(inner)

    def scales_of(x: jax.Array) -> jax.Array:
        """Zeros where the array is to be quantised."""
        if not x.ndim or not jnp.issubdtype(x.dtype, jnp.floating):
            return nothing()
        blocks = blocks_of(x.shape[-1], block_size)
        scales = x.size // max(x.shape[-1], 1) * blocks
        smaller = x.size + x.dtype.itemsize * scales < x.size * x.dtype.itemsize
        if x.size < min_size or not smaller:
            return nothing()
        zeros = jnp.zeros((*x.shape[:-1], blocks), x.dtype)
        cut = spec_of(x) if x.shape[-1] % blocks == 0 else spec_of(x)[:-1]
        return shard_along(zeros, cut, of=x)

    def init(params: optax.Params) -> QuantizedState:
        state = inner.init(params)
        trees, inside = jax.tree.flatten(
            inner.init(_PLACEHOLDER), is_leaf=_is_placeholder
        )
        scales = tuple(
            jax.tree.map(scales_of if _is_placeholder(tree) else nothing, part)
            for tree, part in zip(trees, inside.flatten_up_to(state), strict=True)
        )
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


def _placeholder() -> Any:
    """What optax puts in the parameters' place to find the trees like them."""
    seen = []
    optax.tree_map_params(lambda tree: seen.append(tree) or tree, lambda x: x, {})
    return seen[0]


_PLACEHOLDER = _placeholder()


def _is_placeholder(x: object) -> bool:
    return isinstance(x, type(_PLACEHOLDER))
