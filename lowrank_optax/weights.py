"""Weights stored in few bits, and stochastic rounding of their updates."""

import zlib
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lowrank_optax.core.aliases import Key, Tree
from lowrank_optax.core.by_name import decide_by_name
from lowrank_optax.core.checks import check_count
from lowrank_optax.core.keys import canonical_key
from lowrank_optax.core.paths import map_with_paths, with_paths
from lowrank_optax.steps.quantize import blocks_of, from_blocks, in_blocks

__all__ = [
    "QuantizedWeights",
    "add_updates",
    "dense",
    "quantize",
    "round_stochastically",
    "store",
]

_LARGEST = 127  # of the codes, of either sign
# A scale has 17 significant bits, so that its product with a code is exact in float32,
# and is no smaller than this, so that it can divide.
_SCALE_BITS, _SMALLEST = 17, 2.0**-100


def round_stochastically(key: Key, x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Rounds x to one of its two neighbors in bfloat16 or float16, with the mean x.

        P(x <- x+) = (x - x-) / (x+ - x-),   x- <= x < x+ neighbors in the dtype

    so that many updates, each below half a bit of the weight, add up in the mean, where
    rounding to nearest loses every one of them (Gupta et al. 2015, "Deep Learning with
    Limited Numerical Precision", section 3). bfloat16 is float32's upper half: 16
    random bits are added to the lower half, which is then dropped. The mean is exactly
    x.

    Numbers that the dtype holds exactly stay, NaN and Inf too. A finite x beyond the
    largest finite number becomes that number, never Inf.

    Args:
      key: a typed key or a seed.
      x: real numbers, taken as float32.
      dtype: bfloat16 or float16.

    Returns:
      x's shape, in `dtype`. The bits depend on the key and the shape, not on the
      sharding.

    Raises:
      ValueError: another dtype.

    Example:
      >>> x = jnp.full(10_000, 1 + 2**-10)  # an eighth of the way from 1 to 1 + 2^-7
      >>> y = lro.weights.round_stochastically(jax.random.key(0), x, jnp.bfloat16)
      >>> jnp.unique(y).tolist(), round(float(jnp.mean(y == 1)), 2)
      ([1.0, 1.0078125], 0.88)
    """
    key, dtype = canonical_key(key), jnp.dtype(dtype)
    if dtype not in (jnp.bfloat16, jnp.float16):
        raise ValueError(f"dtype={dtype.name}: choose bfloat16 or float16")
    x = jnp.asarray(x, jnp.float32)
    limits = jnp.finfo(dtype)
    largest = float(limits.max)
    if dtype == jnp.float16:
        # The distance of x's neighbours.
        step = jnp.maximum(_power_of_two(x), float(limits.tiny)) * float(limits.eps)
        y = _multiple(x, step, jax.random.uniform(key, x.shape)) * step
        y = jnp.clip(y, -largest, largest)
        return jnp.where(jnp.isfinite(x), y, x).astype(dtype)
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    noise = jnp.where(jnp.abs(x) < largest, noise, 0)  # so is NaN's
    upper = (jax.lax.bitcast_convert_type(x, jnp.uint32) + noise) >> 16
    y = jax.lax.bitcast_convert_type(upper.astype(jnp.uint16), dtype)
    return jnp.where(jnp.isnan(x), x.astype(dtype), y)  # its upper half may be Inf's


def _power_of_two(x: jax.Array) -> jax.Array:
    """2^e <= |x| < 2^(e + 1) of float32 numbers, exactly; 0 for those under 2^-126."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) & 0x7F800000
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _multiple(x: jax.Array, step: jax.Array, u: jax.Array | None) -> jax.Array:
    """x / step as an integer: the nearest or, with u uniform, of mean x / step.

    What is left by the nearest is exact in float32 wherever multiples of the step are,
    however the compiler divides: a multiple stays one, whatever u.
    """
    nearest = jnp.round(x / step)
    if u is None:
        return nearest
    left = x - nearest * step
    return jnp.where(u * step < jnp.abs(left), nearest + jnp.sign(left), nearest)


class QuantizedWeights(NamedTuple):
    """Weights in 8 bits a number, in equal blocks along the last axis.

    Attributes:
      codes: int8, the weights' shape, from -127 to 127.
      scales: float32, (..., blocks), the distance of two codes, of 17 significant bits.
        A block has ceil(n / blocks) of the n numbers, the last one what is left.
    """

    codes: jax.Array
    scales: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    def dequantize(self, dtype: DTypeLike = jnp.float32) -> jax.Array:
        """Each code times its block's scale, exact in float32; then in `dtype`."""
        parts = in_blocks(self.codes, self.scales.shape[-1]).astype(jnp.float32)
        return from_blocks(parts * self.scales[..., None], self.codes).astype(dtype)


def quantize(
    x: jax.Array, key: Key | None = None, block_size: int = 256
) -> QuantizedWeights:
    """Rounds x (..., n) to 8 bits per number: to nearest, or stochastically with a key.

    For each block of x, along the last axis:

        scale = round(max |x| / 127),   q = round(x / scale)  in [-127, 127]

    The scale is rounded to 17 significant bits and q to an integer, each stochastically
    with a key: E[q scale] = x, to 2^-23 of a scale (Zhang et al. 2024, "Q-GaLore").
    Zero is exact. Quantizing the result again changes no bit, with any key: 127 scale
    and every q scale are exact in float32, and the largest number always gets 127. A
    NaN or an Inf makes its block NaN.

    Deviations: Q-GaLore's codes are affine, (max - min) / 255 apart with an integer
    zero point, and clipped at both ends. By that formula, a zero update moves the
    weights of a third of normal blocks, and only half of a small update to a block's
    largest number arrives. Numbers within 2^-16 of a block's largest may be clipped
    here too. Blocks lie along the last axis here, theirs along the flattened array.

    Args:
      x: real numbers, taken as float32, of one axis or more. The axes before the last
        are independent: nearest rounding under `jax.vmap` gives the same.
      key: a typed key or a seed; None for nearest.
      block_size: the most numbers along the last axis that share a scale; a block may
        be half as long, as in `quantize_moments`.

    Raises:
      ValueError: a scalar, an empty array, numbers that are not real; a block_size
        below 1.

    Example:
      >>> q = lro.weights.quantize(jnp.array([127.0, 1.25, 0.0, -60.0]))
      >>> q.codes.tolist(), q.scales.tolist(), q.dequantize().tolist()
      ([127, 1, 0, -60], [1.0], [127.0, 1.0, 0.0, -60.0])
    """
    check_count("block_size", block_size)
    if not x.ndim or not x.size or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"cannot store {x.dtype} of shape {x.shape} in blocks of int8; "
            "pass a nonempty array of real numbers"
        )
    key = None if key is None else canonical_key(key)
    return _quantized(x, blocks_of(x.shape[-1], block_size), key)


def _quantized(x: jax.Array, blocks: int, key: jax.Array | None) -> QuantizedWeights:
    parts = in_blocks(x.astype(jnp.float32), blocks)
    magnitudes = jnp.abs(parts)
    largest = jnp.max(magnitudes, axis=-1, keepdims=True)
    u = for_scales = None
    if key is not None:
        keys = jax.random.split(key)
        for_scales = jax.random.uniform(keys[0], largest.shape)
        u = jax.random.uniform(keys[1], parts.shape)
        u = jnp.where(magnitudes < largest, u, 1)  # the largest: to nearest, 127

    # The last bit of a scale, by the scale's power of two alone: at a power's edge an
    # ulp in the product may halve the bit, and the same scale is found with either.
    bit = _power_of_two(jnp.maximum(largest * (1 / _LARGEST), _SMALLEST))
    bit = bit * 2.0 ** (1 - _SCALE_BITS)
    scales = _multiple(largest, _LARGEST * bit, for_scales) * bit
    scales = jnp.maximum(scales, _SMALLEST)
    codes = jnp.clip(_multiple(parts, scales, u), -_LARGEST, _LARGEST)
    return QuantizedWeights(from_blocks(codes, x).astype(jnp.int8), scales[..., 0])


def add_updates(params: Tree, updates: Tree, key: Key | None = None) -> Tree:
    """`optax.apply_updates` for weights stored in few bits.

        W <- round(W + U)

    with the sum in float32 at least. `round_stochastically` rounds a bfloat16 or
    float16 leaf, `quantize` rounds `QuantizedWeights` and finds their scales anew
    (Zhang et al. 2024, "Q-GaLore", which rounds bfloat16 to nearest). Other leaves are
    added to as by optax, and need no key. A zero update changes no stored bit. Each
    leaf's key derives from its path: its bits depend neither on the other leaves nor on
    the sharding.

    Args:
      params: the weights.
      updates: like `dense(params)`; None leaves a leaf as it is.
      key: a typed key or a seed, another one at every step, and none that draws bases:
        `jax.random.fold_in(key, step)`.

    Returns:
      New weights, of the structure, shapes and dtypes of `params`.

    Raises:
      ValueError: an update of another shape than its weights; weights in few bits and
        no key; float8 weights.

    Example:
      >>> params = {"norm": jnp.ones(1000, jnp.bfloat16)}
      >>> updates = {"norm": jnp.full(1000, 2**-11)}
      >>> for step in range(64):  # each a sixteenth of the way to the next number
      ...     key = jax.random.fold_in(jax.random.key(0), step)
      ...     params = lro.weights.add_updates(params, updates, key)
      >>> round(float(jnp.mean(params["norm"], dtype=jnp.float32)), 2)  # 1 + 2^-5
      1.03
    """
    key = None if key is None else canonical_key(key)

    def apply(path: str, w: Tree, u: Tree) -> Tree:
        if w is None or u is None:
            return w
        u = jnp.asarray(u)
        quantized = isinstance(w, QuantizedWeights)
        w = w if quantized else jnp.asarray(w)
        if u.shape != w.shape:
            raise ValueError(
                f"{path}: an update of shape {u.shape} for weights of shape {w.shape}"
            )
        if not quantized and not _in_few_bits(w.dtype):
            return (w + u).astype(w.dtype)
        if key is None:
            raise ValueError(
                f"{path}: weights in few bits need a key to round with; pass key"
            )
        own = jax.random.fold_in(key, zlib.crc32(path.encode()))
        if quantized:
            return _quantized(w.dequantize() + u, w.scales.shape[-1], own)
        return round_stochastically(own, w.astype(jnp.float32) + u, w.dtype)

    return map_with_paths(apply, params, updates, is_leaf=_is_leaf)


def _in_few_bits(dtype: jnp.dtype) -> bool:
    return jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32


def _is_leaf(x: object) -> bool:
    return x is None or isinstance(x, QuantizedWeights)


def dense(params: Tree, dtype: DTypeLike = jnp.float32) -> Tree:
    """`params` with every `QuantizedWeights` as an array of `dtype`, the rest as it is.

    The model computes with this tree. An optimizer's `init` and `update` take it, and
    gradients have its structure.

    Args:
      params: the weights, as they are stored.
      dtype: of those that were quantised.

    Example:
      >>> stored = {"w": lro.weights.quantize(jnp.eye(2) * 127), "b": jnp.zeros(2)}
      >>> lro.weights.dense(stored)["w"].tolist()
      [[127.0, 0.0], [0.0, 127.0]]
    """

    def unpack(w: Tree) -> Tree:
        return w.dequantize(dtype) if isinstance(w, QuantizedWeights) else w

    return jax.tree.map(unpack, params, is_leaf=_is_leaf)


def store(
    params: Tree,
    dtype: Literal["float32", "bfloat16", "int8"],
    mask: Callable[[str], bool] | None = None,
) -> Tree:
    """Rounds `params` to nearest for storage, once, before training.

    With "int8", the leaves of `mask` become `QuantizedWeights`, 1 + 4/128 bytes a
    number, and all other real leaves bfloat16 (Q-GaLore: the linear layers of attention
    and MLP are in 8 bits, embeddings, head and norms are not). Integers and keys stay.

    Args:
      params: the weights.
      dtype: "float32", "bfloat16" or "int8".
      mask: whether the leaf of a path, "layers/mlp/up/kernel", is stored in int8; for
        leaves of two or more axes. By default the matrices of the default rules
        (docs/concepts/layout.md).

    Raises:
      ValueError: another dtype.

    Example:
      >>> params = {"mlp": {"kernel": jnp.ones((2, 64, 256))}, "norm": jnp.ones(64)}
      >>> stored = lro.weights.store(params, "int8")
      >>> jax.tree.map(lambda x: x.dtype.name, stored)["mlp"]["kernel"]
      QuantizedWeights(codes='int8', scales='float32')
      >>> stored["norm"].dtype.name
      'bfloat16'
    """
    if dtype not in ("float32", "bfloat16", "int8"):
        raise ValueError(f"dtype={dtype!r}: choose float32, bfloat16 or int8")

    if mask is None:
        rows = with_paths(params, is_leaf=_is_leaf)
        kinds = decide_by_name({path: jnp.shape(w) for path, w in rows})
        mask = {path: kind.kind == "matrix" for path, kind in kinds.items()}.__getitem__

    def store(path: str, w: Tree) -> Tree:
        if _is_leaf(w) or not jnp.issubdtype(w.dtype, jnp.floating):
            return w
        if dtype == "int8" and w.ndim > 1 and mask(path):
            return quantize(w)
        return w.astype(jnp.float32 if dtype == "float32" else jnp.bfloat16)

    return map_with_paths(store, params, is_leaf=_is_leaf)
