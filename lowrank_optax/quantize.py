"""State in few bits: moments in blocks of 8 bits, bases in groups of 4 or 8."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lowrank_optax.basis import BasisState, clock_of, turn_between, with_basis
from lowrank_optax.frame import Clock, Frame, are_coordinates, map_frames
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
        codes = _blocks(self.codes, self.block_size).astype(jnp.int32)
        table = jnp.asarray(_VALUES, scales.dtype)
        values = jnp.take(table, codes + 256 * (scales < 0), mode="clip")
        return _flat(values * jnp.abs(scales), self.codes).astype(self.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizedBasis:
    """A basis S in 4 or 8 bits a number, in groups along the flattened (m, r).

    Attributes:
      codes: uint8, (*batch, mr) or, two 4-bit codes a byte, (*batch, ceil(mr / 2)).
      scales: (*batch, groups), the distance of two codes, in the dtype of S.
      zero_points: uint8, (*batch, groups), the code of zero.
      shape: (m, r).
      bits: 4 or 8.
      group_size: numbers in a group; the last one may hold fewer.
    """

    codes: jax.Array
    scales: jax.Array
    zero_points: jax.Array
    shape: tuple[int, int] = dataclasses.field(metadata={"static": True})
    bits: int = dataclasses.field(metadata={"static": True})
    group_size: int = dataclasses.field(metadata={"static": True})

    def dequantize(self) -> jax.Array:
        """S = (code - zero point) scale, (*batch, m, r)."""
        m, r = self.shape
        codes = self.codes
        if self.bits == 4:
            codes = jnp.stack([codes & 15, codes >> 4], axis=-1)
            codes = codes.reshape(*self.codes.shape[:-1], -1)[..., : m * r]
        groups = _blocks(codes, self.group_size).astype(self.scales.dtype)
        values = (groups - self.zero_points[..., None]) * self.scales[..., None]
        return _flat(values, codes).reshape(*codes.shape[:-1], m, r)


def quantize_array(x: jax.Array, block_size: int) -> QuantizedArray:
    """x (..., n) in the nearest codes, the lower one of two equally near."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    blocks = _blocks(wide, block_size)
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
        codes=_flat(codes - start, x).astype(jnp.uint8),
        scales=jnp.where(signed, -scales, scales)[..., 0],
        dtype=x.dtype,
        block_size=block_size,
    )


def pack_basis(s: jax.Array, bits: int, group_size: int) -> QuantizedBasis:
    """S (*batch, m, r) in the nearest of 2^bits evenly spaced values a group."""
    *batch, m, r = s.shape
    flat = s.reshape(*batch, m * r)
    groups, largest = _blocks(flat, group_size), 2**bits - 1
    low = jnp.minimum(jnp.min(groups, axis=-1, keepdims=True), 0)
    high = jnp.maximum(jnp.max(groups, axis=-1, keepdims=True), 0)
    scales = (high - low) / largest
    step = jnp.where(scales > 0, scales, 1)
    zero_points = jnp.round(-low / step)
    codes = jnp.clip(jnp.round(groups / step) + zero_points, 0, largest)
    codes = _flat(codes, flat).astype(jnp.uint8)
    if bits == 4:
        pairs = _blocks(codes, 2)
        codes = pairs[..., 0] | pairs[..., 1] << 4
    return QuantizedBasis(
        codes=codes,
        scales=scales[..., 0],
        zero_points=zero_points[..., 0].astype(jnp.uint8),
        shape=(m, r),
        bits=bits,
        group_size=group_size,
    )


def _blocks(x: jax.Array, size: int) -> jax.Array:
    """(..., n) to (..., ceil(n / size), size), the end filled up with zeros."""
    n = x.shape[-1]
    size = min(size, n)
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -n % size)])
    return x.reshape(*x.shape[:-1], -1, size)


def _flat(blocks: jax.Array, like: jax.Array) -> jax.Array:
    """Undoes `_blocks`."""
    return blocks.reshape(*blocks.shape[:-2], -1)[..., : like.shape[-1]]


def _is_quantized(x: Any) -> bool:
    return isinstance(x, (QuantizedArray, QuantizedBasis))


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

    As there, a V under 1.6e-7 of its block's largest is stored as 0: what divides that
    number's next step is eps and its new gradient alone. Memory is saved between steps;
    during one, XLA holds what it works on in full precision.

    Args:
      inner: any optax transformation, `optax.scale_by_adam()` for example.
      block_size: numbers along the last axis that share a scale.
      min_size: arrays of fewer numbers stay as they are; so do scalars, integers, keys
        and arrays that would not get smaller. Shapes alone decide, at init.

    Raises:
      ValueError: a block_size or min_size below 1.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from lowrank_optax.quantize import quantize_moments
      >>> tx = quantize_moments(optax.scale_by_adam())
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
        return quantize_array(x, block_size) if x.size >= min_size and smaller else x

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
    if unit is state:
        # Asked by `first_moments`, which looks only: `inner` need not have a rotation.
        for moment in first_moments(inner):
            rotation.first(moment)
        return state
    turned = rotate_state(inner, _dequantized(unit.inner_state), rotation)
    return QuantizedState(_quantized_like(state.inner_state, turned))


class QuantizedBasisState(NamedTuple):
    """State of `quantize_basis`.

    Attributes:
      rule_state: the rule's `BasisState`, with `optax.MaskedNode` for every basis.
      basis: a `QuantizedBasis` at every matrix leaf, `optax.MaskedNode` at others.
    """

    rule_state: Any
    basis: Any


def quantize_basis(
    rule: optax.GradientTransformation, *, bits: int = 4, group_size: int = 256
) -> optax.GradientTransformationExtraArgs:
    """`rule` with its bases in 4 or 8 bits a number (Q-GaLore).

    For each group x of `group_size` numbers of the flattened S (m, r), at a refresh:

        scale = (max(x) - min(x)) / (2^bits - 1),   zero = round(-min(x) / scale)
        q = clip(round(x / scale) + zero, 0, 2^bits - 1),   S <- (q - zero) scale

    (Zhang et al. 2024, "Q-GaLore: Quantized GaLore with INT4 Projection and Layer-
    Adaptive Low-Rank Gradients"). Every stage after it gets this rounded S, from the
    refresh itself on, and its turn S_t^T S_{t-1}; between refreshes its bits do not
    change. A basis takes bits / 32 of its float32 bytes and 5 bytes a group.

    The rounded S is not orthonormal, so that `recover_residual` and eq. 8 of
    `rotate_moments` refuse it: take `project_back`, and `in_subspace` or
    `rotate_moments(inner, moments="first")`. A rule that goes on from the last basis
    (`grassmann_walk`) goes on from the rounded one.

    Deviations: two 4-bit codes share a byte, where q-galore-torch 1.0 stores one in
    each; and min(x) <= 0 <= max(x) is made to hold, where theirs clips a group of one
    sign. So such a group, and one of equal numbers, comes back to half a scale too.

    Args:
      rule: a basis rule with a `BasisState`, whose basis changes at refreshes only.
      bits: 4 or 8.
      group_size: numbers that share a scale and a zero point.

    Raises:
      ValueError: other bits, a group_size below 1; at init, a rule with another state
        or with coordinates for a basis; at update, outside `low_rank`.

    Example:
      >>> import lowrank_optax as lro
      >>> from lowrank_optax.quantize import quantize_basis
      >>> tx = lro.galore(0.01, rank=4, refresh_every=200,
      ...     basis=quantize_basis(lro.sara_sample(key=0)))
    """
    if bits not in (4, 8):
        raise ValueError(f"bits={bits!r}: choose 4 or 8")
    if not isinstance(group_size, int) or group_size < 1:
        raise ValueError(f"group_size must be an int of at least 1, not {group_size!r}")
    rule = optax.with_extra_args_support(rule)

    def init(params: Any) -> Any:
        state: Any = rule.init(params)
        if not isinstance(state, BasisState):
            raise ValueError(
                "quantize_basis() needs a basis rule, with a BasisState; "
                f"the state here is {type(state).__name__}"
            )

        def pack(frame: Frame, s: jax.Array) -> QuantizedBasis:
            if are_coordinates(s):
                raise ValueError(
                    f"{frame.path}: the basis is r coordinates, not m x r numbers that "
                    "quantize_basis() could make smaller; take the rule without it"
                )
            return pack_basis(s, bits, group_size)

        packed = map_frames(pack, params, state.basis, plain=_nothing)
        return QuantizedBasisState(_without_basis(state), packed)

    def update(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        clock: Clock | None = None,
        **extra_args: Any,
    ) -> tuple[Any, Any]:
        now = clock_of(clock)
        old = _dequantized(state.basis)
        frames, rule_state = rule.update(
            updates,
            state.rule_state._replace(basis=old),
            params,
            clock=now,
            **extra_args,
        )

        def repack(_: Frame, q: QuantizedBasis, s_old: Any, s: jax.Array) -> Any:
            # A rule may keep its basis at a refresh; to round it again would move it.
            kept = jnp.all(s == s_old)
            packed = pack_basis(s, bits, group_size)
            return jax.tree.map(lambda x, y: jnp.where(kept, x, y), q, packed)

        bases: Any = rule_state
        packed = jax.lax.cond(
            now.refresh,
            lambda new: map_frames(
                repack, frames, state.basis, old, new, plain=_nothing
            ),
            lambda _: state.basis,
            bases.basis,
        )
        new = _dequantized(packed)
        turn = jax.lax.cond(
            now.refresh,
            lambda: map_frames(
                lambda f, s, s_old: turn_between(s, s_old, f.gradient.dtype),
                frames,
                new,
                old,
                plain=_nothing,
            ),
            lambda: map_frames(Frame.still, frames, plain=_nothing),
        )
        frames = map_frames(
            lambda f, s, c: with_basis(f, s, c, orthonormal=False), frames, new, turn
        )
        return frames, QuantizedBasisState(_without_basis(rule_state), packed)

    return optax.GradientTransformationExtraArgs(init, update)


def _without_basis(state: Any) -> Any:
    basis = jax.tree.map(lambda _: optax.MaskedNode(), state.basis)
    return state._replace(basis=basis)


def _nothing(*_: Any) -> optax.MaskedNode:
    return optax.MaskedNode()
