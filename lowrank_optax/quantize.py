"""Step: moments stored in 8 bits a number."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lowrank_optax.linalg import fence
from lowrank_optax.moments import (
    Rotation,
    first_moments,
    register_rotation,
    rotate_state,
)

_DECADES = 7


def _means(bits: int) -> np.ndarray:
    """The middles of 2^(bits - k) equal parts of (10^-(k+1), 10^-k], ascending."""
    parts = [
        10.0**-k * (0.1 + 0.9 * (np.arange(2 ** (bits - k)) + 0.5) / 2 ** (bits - k))
        for k in reversed(range(_DECADES))
    ]
    return np.concatenate(parts)


def _tables() -> tuple[np.ndarray, np.ndarray]:
    """The 256 codes' values, ascending: not negative, and of either sign."""
    signed, unsigned = _means(6), _means(7)
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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizedArray:
    """An array in 8 bits a number, in blocks along its last axis.

    Attributes:
      codes: uint8, the array's shape; places in a map of 256 values in [-1, 1].
      scales: (..., blocks), the largest magnitude of each block, with a minus where the
        block's map is the signed one; float32, or float64 for a float64 array.
      dtype: of the array.
      block_size: numbers in a block; the last one of a row may hold fewer.
    """

    codes: jax.Array
    scales: jax.Array
    dtype: Any = dataclasses.field(metadata={"static": True})
    block_size: int = dataclasses.field(metadata={"static": True})

    def dequantize(self) -> jax.Array:
        """The array: each code's value times its block's scale."""
        scales = self.scales[..., None]
        codes = in_blocks(self.codes, self.block_size).astype(jnp.int32)
        table = jnp.asarray(_VALUES, scales.dtype)
        values = jnp.take(table, codes + 256 * (scales < 0), mode="clip")
        return from_blocks(values * jnp.abs(scales), self.codes).astype(self.dtype)


def quantize_array(x: jax.Array, block_size: int) -> QuantizedArray:
    """x (..., n) in the nearest codes, the lower one of two equally near."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    blocks = in_blocks(wide, block_size)
    scales = jnp.max(jnp.abs(blocks), axis=-1, keepdims=True)
    blocks = blocks / jnp.where(scales == 0, 1, scales)
    # By what is left after rounding, so that to quantise twice is to do it once.
    signed = jnp.min(blocks, axis=-1, keepdims=True) <= _NEGATIVE.astype(wide.dtype)

    middles = jnp.asarray(_MIDDLES, wide.dtype)
    codes = start = 256 * signed.astype(jnp.int32)
    for bit in (128, 64, 32, 16, 8, 4, 2, 1):  # how many middles lie below
        middle = jnp.take(middles, codes + (bit - 1), mode="clip")
        codes = codes + bit * (blocks > middle)
    return QuantizedArray(
        codes=from_blocks(codes - start, x).astype(jnp.uint8),
        scales=jnp.where(signed, -scales, scales)[..., 0],
        dtype=x.dtype,
        block_size=block_size,
    )


def in_blocks(x: jax.Array, size: int) -> jax.Array:
    """(..., n) to (..., ceil(n / size), size), the end filled up with zeros."""
    n = x.shape[-1]
    size = min(size, n)
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -n % size)])
    return x.reshape(*x.shape[:-1], -1, size)


def from_blocks(blocks: jax.Array, like: jax.Array) -> jax.Array:
    """Undoes `in_blocks`."""
    return blocks.reshape(*blocks.shape[:-2], -1)[..., : like.shape[-1]]


def _is_quantized(x: Any) -> bool:
    return isinstance(x, QuantizedArray)


def _dequantized(tree: Any) -> Any:
    return jax.tree.map(
        lambda x: x.dequantize() if _is_quantized(x) else x, tree, is_leaf=_is_quantized
    )


def _quantized_like(old: Any, new: Any) -> Any:
    """`new` with its arrays quantised where `old` has them so."""

    def leaf(q: Any, x: Any) -> Any:
        if not _is_quantized(q):
            return x
        return quantize_array(x.astype(q.dtype), q.block_size)

    return jax.tree.map(leaf, old, new, is_leaf=_is_quantized)


class QuantizedState(NamedTuple):
    """State of `quantize_moments`.

    Attributes:
      inner_state: the inner transformation's, with a `QuantizedArray` in place of every
        large array of real numbers.
    """

    inner_state: Any


def quantize_moments(
    inner: optax.GradientTransformation, *, block_size: int = 256, min_size: int = 4096
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
      block_size: numbers along the last axis that share a scale.
      min_size: arrays of fewer numbers stay as they are; so do scalars, integers, keys
        and arrays that would not get smaller. Shapes alone decide, at init.

    Raises:
      ValueError: a block_size or min_size below 1.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro, optax
      >>> tx = lro.quantize_moments(optax.scale_by_adam())
      >>> state = tx.init({"w": jnp.ones((64, 512)), "b": jnp.ones(512)})
      >>> mu = optax.tree.get(state, "mu")
      >>> mu["w"].codes.shape, mu["w"].scales.shape, mu["b"].dtype.name
      ((64, 512), (64, 2), 'float32')
    """
    for name, value in (("block_size", block_size), ("min_size", min_size)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an int of at least 1, not {value!r}")
    inner = optax.with_extra_args_support(inner)

    def store(x: Any) -> Any:
        if not jnp.ndim(x) or not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        scales = x.size // x.shape[-1] * -(-x.shape[-1] // block_size) if x.size else 0
        smaller = x.size + max(4, x.dtype.itemsize) * scales < x.size * x.dtype.itemsize
        if x.size < min_size or not smaller:
            return x
        # Fenced, or XLA spends seconds on folding the zeros of a large state.
        return quantize_array(fence(x), block_size)

    def init(params: Any) -> Any:
        return QuantizedState(jax.tree.map(store, inner.init(params)))

    def update(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        old = state.inner_state
        updates, new = inner.update(updates, _dequantized(old), params, **extra_args)
        return updates, QuantizedState(_quantized_like(old, new))

    return optax.GradientTransformationExtraArgs(init, update)


@register_rotation(QuantizedState)
def _quantized(state: Any, unit: Any, rotation: Rotation) -> Any:
    inner = _dequantized(state.inner_state)
    if rotation.looks_only:  # `inner` need not have a rotation
        for moment in first_moments(inner):
            rotation.first(moment)
        return state
    turned = rotate_state(inner, _dequantized(unit.inner_state), rotation)
    return QuantizedState(_quantized_like(state.inner_state, turned))
