"""Cross-entropy of a language model's head whose logits are never all there.

Array names end in their axes: B batch, T tokens, S tokens of a block, D hidden,
V vocabulary, G groups of the batch's rows.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from models.padding import aligned, pad_to

_einsum = partial(jnp.einsum, preferred_element_type=jnp.float32)


class Spread(NamedTuple):
    """How the work is spread over the mesh that is set.

    Attributes:
      groups: into how many groups of rows a batch is sharded.
      rows: the mesh axes that shard it; None for no mesh.
      kernel: the spec of the stored kernel, and of its gradient.
      used: the spec of the kernel while it is used, its rows gathered.
    """

    groups: int = 1
    rows: tuple[str, ...] | None = None
    kernel: P = P()
    used: P = P()

    def put(self, x: jax.Array, spec: P) -> jax.Array:
        return x if self.rows is None else jax.lax.with_sharding_constraint(x, spec)


ALONE = Spread()


def head_cross_entropy(
    x_BTD: jax.Array,
    kernel_DV: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    *,
    compute_dtype: DTypeLike,
    block_tokens: int,
    spread: Spread = ALONE,
) -> jax.Array:
    """Weighted sum of the next-token cross-entropy, in nats, in blocks of tokens.

        sum_bt weights_bt (logsumexp_v(logits_btv) - logits_bt,target_bt),
        logits = x @ kernel

    The same as a head in `compute_dtype` with float32 sums, then a float32 loss on its
    logits, but the logits of one block only live at a time. Under differentiation the
    forward pass also makes each block's gradients while its logits are there, so
    they are computed once, and the backward pass only scales them, as in Liger kernel
    (Hsu et al., 2024, https://arxiv.org/abs/2410.10989).

    A block is some positions of every row, so a batch whose rows are spread over
    devices stays so. As long as all tokens fit one block, there is no loop. Each group
    of rows has a sum of its own of the kernel's gradient, so that devices exchange it
    once, and not for every block.

    Args:
      x_BTD: float (B, T, D), what the head reads.
      kernel_DV: float (D, V).
      targets_BT: int (B, T). A negative id counts from the end. One outside of the
        vocabulary (Hugging Face's -100) makes the loss NaN, but where its weight is 0.
      weights_BT: (B, T), the weight of each token.
      compute_dtype: dtype of the product's inputs.
      block_tokens: about how many of the B * T tokens have their logits at a time;
        a block has one position at least.
      spread: over which devices; its groups divide B.

    Returns:
      () float32. The gradients have the dtypes of x, kernel and weights; a weight's is
      its token's cross-entropy.

    Raises:
      ValueError: if the shapes do not fit each other, there is no token, or
        `block_tokens` is not positive.

    Example:
      >>> x, kernel = jnp.zeros((2, 6, 4)), jnp.ones((4, 8))
      >>> targets, weights = jnp.zeros((2, 6), int), jnp.ones((2, 6)) / 12
      >>> loss = head_cross_entropy(
      ...     x, kernel, targets, weights, compute_dtype="bfloat16", block_tokens=4
      ... )
      >>> f"{loss:.4f} = log 8"
      '2.0794 = log 8'
    """
    if not (
        x_BTD.shape[:-1] == targets_BT.shape == weights_BT.shape
        and targets_BT.ndim == kernel_DV.ndim == 2
        and x_BTD.shape[-1] == kernel_DV.shape[0]
        and targets_BT.size > 0
    ):
        raise ValueError(
            f"x {x_BTD.shape}, kernel {kernel_DV.shape}, targets {targets_BT.shape} "
            f"and weights {weights_BT.shape} do not fit; give (B, T, D), (D, V), "
            "(B, T) and (B, T), with at least one token"
        )
    if block_tokens < 1:
        raise ValueError(
            f"block_tokens={block_tokens} must be positive; set it above 0"
        )
    B, T, _ = x_BTD.shape
    blocks = -(-T // max(1, block_tokens // B))
    return _loss(
        jnp.dtype(compute_dtype),
        -(-T // blocks),
        spread,
        x_BTD,
        kernel_DV,
        targets_BT,
        weights_BT.astype(jnp.float32),
    )


def _fold(T: int, S: int, step: Callable[..., Any], carry: Any) -> Any:
    """`carry = step(carry, read, write, fresh_S)` for blocks of S that cover T.

    `read(array)` is a block's part along axis 1, and `write(array, part)` writes it. If
    S does not divide T, the last block reaches back into the one before it. It goes
    first, so that what it wrote there is overwritten, with `fresh_S` False there, so
    that nothing is added up twice. (A block apart for the rest could be scheduled
    beside the loop, and have its logits in memory together with the loop's.)
    """
    blocks = -(-T // S)

    def visit(i: jax.Array, carry: Any) -> Any:
        own = (blocks - 1 - i) * S
        start = jnp.minimum(own, T - S)
        return step(
            carry,
            lambda array: jax.lax.dynamic_slice_in_dim(array, start, S, 1),
            lambda array, part: jax.lax.dynamic_update_slice_in_dim(
                array, part, start, 1
            ),
            start + jnp.arange(S) >= own,
        )

    return jax.lax.fori_loop(0, blocks, visit, carry)


def _block_losses(
    x_BSD: jax.Array, kernel_DV: jax.Array, targets_BS: jax.Array, tokens: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Each token's loss (B, S), its normalizer (B, S, 1) and its logits (B, S, V).

    The kernel and the logits may have more columns than the vocabulary has tokens.
    """
    logits_BSV = _einsum("bsd,dv->bsv", x_BSD, kernel_DV)
    columns = kernel_DV.shape[1]
    if columns > tokens:
        logits_BSV = jnp.where(jnp.arange(columns) < tokens, logits_BSV, -jnp.inf)
    normalizer_BS1 = jax.nn.logsumexp(logits_BSV, axis=-1, keepdims=True)
    target_BS1 = jnp.take_along_axis(
        logits_BSV[..., :tokens], targets_BS[..., None], axis=-1
    )
    return (normalizer_BS1 - target_BS1)[..., 0], normalizer_BS1, logits_BSV


def _weighted_sum(losses_BT: jax.Array, weights_BT: jax.Array) -> jax.Array:
    """Without the losses of weight 0: one may be NaN, of an id that there is not."""
    return jnp.sum(jnp.where(weights_BT == 0, 0, losses_BT * weights_BT))


def _narrow(kernel_DV: jax.Array, dtype: jnp.dtype, spread: Spread) -> jax.Array:
    """The kernel as the product takes it: rounded, moved, then of an aligned width."""
    kernel_DV = spread.put(kernel_DV, spread.kernel).astype(dtype)
    kernel_DV = spread.put(kernel_DV, spread.used)
    return pad_to(kernel_DV, aligned(kernel_DV.shape[1]), 1)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _loss(
    dtype: jnp.dtype,
    S: int,
    spread: Spread,
    x_BTD: jax.Array,
    kernel_DV: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
) -> jax.Array:
    tokens = kernel_DV.shape[1]
    kernel_DV = _narrow(kernel_DV, dtype, spread)

    def step(losses_BT: jax.Array, read: Any, write: Any, _: Any) -> jax.Array:
        losses_BS, _, _ = _block_losses(
            read(x_BTD).astype(dtype), kernel_DV, read(targets_BT), tokens
        )
        return write(losses_BT, losses_BS)

    losses_BT = _fold(x_BTD.shape[1], S, step, jnp.zeros_like(weights_BT))
    return _weighted_sum(losses_BT, weights_BT)


def _forward(
    dtype: jnp.dtype,
    S: int,
    spread: Spread,
    x_BTD: jax.Array,
    kernel_DV: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    tokens = kernel_DV.shape[1]
    narrow_DV = _narrow(kernel_DV, dtype, spread)
    id_V = jnp.arange(narrow_DV.shape[1])
    of_groups = P(spread.rows, *spread.used)
    # The logits' gradient is rounded before its two products, which then run at the
    # speed of 16 bits; JAX's own rule rounds the products instead, by as much. But
    # float16 has no exponents for small probabilities: it gets float32.
    slope_dtype = jnp.promote_types(dtype, jnp.bfloat16)

    def step(carry: Any, read: Any, write: Any, fresh_S: jax.Array) -> Any:
        losses_BT, dx_BTD, dkernel_GDV = carry
        x_BSD, targets_BS = read(x_BTD).astype(dtype), read(targets_BT)
        losses_BS, normalizer_BS1, logits_BSV = _block_losses(
            x_BSD, narrow_DV, targets_BS, tokens
        )
        # As take_along_axis reads ids: a negative one counts from the end.
        # (What this hits beyond the vocabulary meets zeros, and is cut off at the end.)
        targets_BS1 = targets_BS[..., None]
        hit_BSV = (targets_BS1 == id_V) | (targets_BS1 == id_V - tokens)
        slope_BSV = jnp.exp(logits_BSV - normalizer_BS1) - hit_BSV
        weights_BS1 = jnp.where(fresh_S, read(weights_BT), 0)[..., None]
        slope_BSV = (weights_BS1 * slope_BSV).astype(slope_dtype)
        dx_BSD = _einsum("bsv,dv->bsd", slope_BSV, narrow_DV).astype(dx_BTD.dtype)
        x, slope = (
            y.reshape(spread.groups, -1, *y.shape[1:]) for y in (x_BSD, slope_BSV)
        )
        dkernel_GDV += _einsum("gbsd,gbsv->gdv", x, slope)
        return (
            write(losses_BT, losses_BS),
            write(dx_BTD, dx_BSD),
            spread.put(dkernel_GDV, of_groups),
        )

    zeros_GDV = jnp.zeros((spread.groups, *narrow_DV.shape), jnp.float32)
    zeros = (
        jnp.zeros_like(weights_BT),
        jnp.zeros_like(x_BTD),
        spread.put(zeros_GDV, of_groups),
    )
    losses_BT, dx_BTD, dkernel_GDV = _fold(x_BTD.shape[1], S, step, zeros)
    dkernel_DV = jnp.sum(dkernel_GDV[..., :tokens], axis=0)
    dkernel_DV = spread.put(dkernel_DV, spread.kernel)
    gradients = dx_BTD, dkernel_DV.astype(kernel_DV.dtype), losses_BT
    return _weighted_sum(losses_BT, weights_BT), gradients


def _backward(
    dtype: jnp.dtype,
    S: int,
    spread: Spread,
    gradients: tuple[jax.Array, ...],
    g: jax.Array,
) -> tuple[jax.Array, jax.Array, None, jax.Array]:
    # In float32: g rounded to a gradient's 16 bits would skew all of it.
    dx_BTD, dkernel_DV, dweights_BT = ((g * x).astype(x.dtype) for x in gradients)
    return dx_BTD, dkernel_DV, None, dweights_BT


_loss.defvjp(_forward, _backward)
