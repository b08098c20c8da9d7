"""Where: bases stored in 4 or 8 bits a number (Q-GaLore)."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.basis import BasisState, clock_of, turn_between, with_basis
from lowrank_optax.frame import Clock, Frame, are_coordinates, map_frames, nothing
from lowrank_optax.quantize import from_blocks, in_blocks


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
        groups = in_blocks(codes, self.group_size).astype(self.scales.dtype)
        values = (groups - self.zero_points[..., None]) * self.scales[..., None]
        return from_blocks(values, codes).reshape(*codes.shape[:-1], m, r)


def pack_basis(s: jax.Array, bits: int, group_size: int) -> QuantizedBasis:
    """S (*batch, m, r) in the nearest of 2^bits evenly spaced values a group."""
    *batch, m, r = s.shape
    flat = s.reshape(*batch, m * r)
    groups, largest = in_blocks(flat, group_size), 2**bits - 1
    low = jnp.minimum(jnp.min(groups, axis=-1, keepdims=True), 0)
    high = jnp.maximum(jnp.max(groups, axis=-1, keepdims=True), 0)
    scales = (high - low) / largest
    step = jnp.where(scales > 0, scales, 1)
    zero_points = jnp.round(-low / step)
    codes = jnp.clip(jnp.round(groups / step) + zero_points, 0, largest)
    codes = from_blocks(codes, flat).astype(jnp.uint8)
    if bits == 4:
        pairs = in_blocks(codes, 2)
        codes = pairs[..., 0] | pairs[..., 1] << 4
    return QuantizedBasis(
        codes=codes,
        scales=scales[..., 0],
        zero_points=zero_points[..., 0].astype(jnp.uint8),
        shape=(m, r),
        bits=bits,
        group_size=group_size,
    )


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
      >>> tx = lro.galore(0.01, rank=4, refresh_every=200,
      ...     basis=lro.quantize_basis(lro.sara_sample(key=0)))
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
                "quantize_basis() goes around a rule that keeps its basis in a "
                f"BasisState, not a {type(state).__name__}; put lazy_refresh() around "
                "quantize_basis(), and leave out gaussian(), which keeps none"
            )

        def pack(frame: Frame, s: jax.Array) -> QuantizedBasis:
            if are_coordinates(s):
                raise ValueError(
                    f"{frame.path}: the basis is r coordinates, not m x r numbers that "
                    "quantize_basis() could make smaller; take the rule without it"
                )
            return pack_basis(s, bits, group_size)

        packed = map_frames(pack, params, state.basis, plain=nothing)
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
        old = _unpacked(state.basis)
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
                repack, frames, state.basis, old, new, plain=nothing
            ),
            lambda _: state.basis,
            bases.basis,
        )
        new = _unpacked(packed)
        turn = jax.lax.cond(
            now.refresh,
            lambda: map_frames(
                lambda f, s, s_old: turn_between(s, s_old, f.gradient.dtype),
                frames,
                new,
                old,
                plain=nothing,
            ),
            lambda: map_frames(Frame.still, frames, plain=nothing),
        )
        frames = map_frames(
            lambda f, s, c: with_basis(f, s, c, orthonormal=False), frames, new, turn
        )
        return frames, QuantizedBasisState(_without_basis(rule_state), packed)

    return optax.GradientTransformationExtraArgs(init, update)


def _unpacked(tree: Any) -> Any:
    return jax.tree.map(
        QuantizedBasis.dequantize, tree, is_leaf=lambda x: isinstance(x, QuantizedBasis)
    )


def _without_basis(state: Any) -> Any:
    basis = jax.tree.map(lambda _: optax.MaskedNode(), state.basis)
    return state._replace(basis=basis)
