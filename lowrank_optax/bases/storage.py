"""Where: bases stored in 4, 8 or 16 bits a number."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from lowrank_optax.bases.follow import follow
from lowrank_optax.bases.redrawn import Redrawn
from lowrank_optax.bases.rule import AS_IT_IS, BasisRule, Rule, Storage, rule_of
from lowrank_optax.core.aliases import Tree
from lowrank_optax.core.checks import check_count
from lowrank_optax.core.frame import Frame


class QuantizedBasis(NamedTuple):
    """A basis S in 4 or 8 bits a number, in groups along the flattened (m, r).

    Attributes:
      codes: uint8, (*batch, mr) or, two 4-bit codes a byte, (*batch, ceil(mr / 2)).
      scales: (*batch, groups), the distance of two codes, in the dtype of S.
      zero_points: uint8, (*batch, groups), the code of zero.
    """

    codes: Tree
    scales: Tree
    zero_points: Tree


def packing(bits: int, group_size: int) -> Storage:
    """`bits` a number, the last group of a basis filled up with zeros."""
    largest = 2**bits - 1

    def in_groups(flat: jax.Array) -> jax.Array:
        pad = [(0, 0)] * (flat.ndim - 1) + [(0, -flat.shape[-1] % group_size)]
        return jnp.pad(flat, pad).reshape(*flat.shape[:-1], -1, group_size)

    def pack(frame: Frame, s: jax.Array) -> QuantizedBasis:
        flat = s.reshape(*frame.batch, -1)
        groups = in_groups(flat)
        # Zero lies inside, so that the code of zero is one of the codes.
        low = jnp.minimum(jnp.min(groups, axis=-1, keepdims=True), 0)
        high = jnp.maximum(jnp.max(groups, axis=-1, keepdims=True), 0)
        scales = (high - low) / largest
        step = jnp.where(scales > 0, scales, 1)
        zero_points = jnp.round(-low / step)
        codes = jnp.clip(jnp.round(groups / step) + zero_points, 0, largest)
        codes = codes.astype(jnp.uint8).reshape(*frame.batch, -1)
        codes = codes[..., : flat.shape[-1]]
        if bits == 4:
            odd = [(0, 0)] * len(frame.batch) + [(0, codes.shape[-1] % 2)]
            pairs = jnp.pad(codes, odd).reshape(*frame.batch, -1, 2)
            codes = pairs[..., 0] | pairs[..., 1] << 4
        return QuantizedBasis(
            codes, scales[..., 0], zero_points[..., 0].astype(jnp.uint8)
        )

    def unpack(frame: Frame, stored: QuantizedBasis) -> jax.Array:
        """S = (code - zero point) scale, (*batch, m, r)."""
        m, r = frame.basis_shape[-2:]
        codes = stored.codes
        if bits == 4:
            codes = jnp.stack([codes & 15, codes >> 4], axis=-1)
        codes = codes.reshape(*frame.batch, -1)[..., : m * r]
        groups = in_groups(codes).astype(stored.scales.dtype)
        values = (groups - stored.zero_points[..., None]) * stored.scales[..., None]
        return values.reshape(*frame.batch, -1)[..., : m * r].reshape(frame.basis_shape)

    return Storage(pack, unpack, like=QuantizedBasis(0, 0, 0))


def quantize_basis(
    rule: optax.GradientTransformation, *, bits: int = 4, group_size: int = 256
) -> BasisRule:
    """Stores the bases of `rule` in 4 or 8 bits per number (Q-GaLore).

    For each group x of `group_size` numbers of the flattened S (m, r), at a refresh:

        scale = (max(x) - min(x)) / (2^bits - 1),   zero = round(-min(x) / scale)
        q = clip(round(x / scale) + zero, 0, 2^bits - 1),   S <- (q - zero) scale

    (Zhang et al. 2024, "Q-GaLore: Quantized GaLore with INT4 Projection and
    Layer-Adaptive Low-Rank Gradients"). Every later stage sees this rounded S, and the
    next basis starts from it. A basis takes bits / 32 of its float32 bytes and 5 bytes
    a group. The rounded S is not orthonormal: use `project_back`, and `in_subspace` or
    `rotate_moments(inner, moments="first")`.

    Deviations: two 4-bit codes share a byte, where q-galore-torch 1.0 stores one in
    each. Zero always lies in [min(x), max(x)], where theirs clips a group of one sign.

    Args:
      rule: a basis rule, from `basis_rule` or any of the library's but `online_pca`.
      bits: 4 or 8.
      group_size: numbers that share a scale and a zero point.

    Raises:
      ValueError: other bits, a group_size below 1; a stage that is no basis rule, whose
        bases are coordinates, or that stores none; at update, outside `low_rank`.

    Example:
      >>> tx = lro.galore(0.01, rank=4, refresh_every=200,
      ...     basis=lro.bases.quantize_basis(lro.sara_sample(key=0)))
    """
    if bits not in (4, 8):
        raise ValueError(f"bits={bits!r}: choose 4 or 8")
    check_count("group_size", group_size)
    inside = _stored_as_it_is(rule, "quantize_basis()")
    return follow(
        dataclasses.replace(
            inside, storage=packing(bits, group_size), orthonormal=False
        )
    )


def cast_basis(
    rule: optax.GradientTransformation, dtype: DTypeLike = jnp.bfloat16
) -> BasisRule:
    """Rounds the bases of `rule` to a smaller float: half the bytes in bfloat16.

    Every later stage sees the rounded S, and the next basis starts from it. In bfloat16
    each entry of S is off by at most 2^-9 of itself. Each entry of S^T S is off by
    about 2^-9, as in any product of bfloat16 operands. So the rounded S counts as
    orthonormal if that of `rule` does, and stages may recover the residual.

    Args:
      rule: a basis rule, from `basis_rule` or any of the library's but `online_pca`.
      dtype: bfloat16, or another float.

    Raises:
      ValueError: a dtype that is no float; a stage that is no basis rule, whose bases
        are coordinates, or that stores none; at update, outside `low_rank`.

    Example:
      >>> tx = lro.galore(0.01, rank=4, refresh_every=200,
      ...     basis=lro.bases.cast_basis(lro.sara_sample(key=0)))
      >>> state = tx.init({"mlp": {"kernel": jnp.ones((8, 16))}})
      >>> optax.tree.get(state, "basis")["mlp"]["kernel"].dtype.name
      'bfloat16'
    """
    dtype = jnp.dtype(dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype={dtype.name}: choose a float, such as bfloat16")
    inside = _stored_as_it_is(rule, "cast_basis()")
    rounded = Storage(
        pack=lambda _, s: s.astype(dtype),
        unpack=lambda frame, stored: stored.astype(frame.gradient.dtype),
    )
    return follow(dataclasses.replace(inside, storage=rounded))


def _stored_as_it_is(rule: optax.GradientTransformation, wrapper: str) -> Rule:
    inside = rule_of(rule, wrapper)
    stored = inside.storage is AS_IT_IS and not isinstance(rule, Redrawn)
    if inside.coordinates or not stored:
        raise ValueError(
            f"{wrapper} stores m x r numbers in fewer bits, and this rule stores "
            "coordinates, a key or packed numbers already; use the rule without it"
        )
    return inside
