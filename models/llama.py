"""LLaMA in Flax NNX: a stack of identical blocks, scanned over depth.

Array names end in their axes: B batch, T tokens, D hidden, N query heads,
K key/value heads, H head size, F MLP, V vocabulary, L layers.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend.backend import get_backend

from models.config import LlamaConfig
from models.padding import NO_PADDING, PadKernel, aligned, pad_to
from models.rope import rotary_angles, rotate

Mix = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""(B, T, N, H) queries, (B, S, K, H) keys and values -> (B, T, N, H) mixed values."""

# Of functions of arrays; a module is one in a scan, which hands it its arrays.
REMAT: dict[str, Callable[..., Any]] = {
    "none": lambda block: block,
    # What devices store in shards is not gathered to be stored.
    "gathers": partial(
        jax.checkpoint,
        prevent_cse=False,
        policy=lambda operation, *_, **__: operation.name != "sharding_constraint",
    ),
    # A scan already keeps XLA from merging the recomputation with the forward pass.
    "full": partial(jax.checkpoint, prevent_cse=False),
    "dots": partial(
        jax.checkpoint,
        prevent_cse=False,
        policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    ),
}


def _options(
    config: LlamaConfig, pad: PadKernel, rngs: nnx.Rngs, bias: bool = False
) -> dict[str, Any]:
    return {
        "use_bias": bias,
        "dtype": jnp.dtype(config.compute_dtype),
        "promote_dtype": pad,
        "kernel_init": nnx.initializers.normal(config.init_std),
        "rngs": rngs,
    }


def _linear(
    config: LlamaConfig,
    size_in: int,
    size_out: int,
    rngs: nnx.Rngs,
    *,
    bias: bool,
    pad: PadKernel = NO_PADDING,
) -> nnx.Linear:
    return nnx.Linear(size_in, size_out, **_options(config, pad, rngs, bias))


class Head(nnx.Linear):
    """(..., D) -> float32 (..., V): logits that the loss never sees in 16 bits."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        super().__init__(
            config.hidden_size,
            config.vocab_size,
            preferred_element_type=jnp.float32,
            **_options(config, PadKernel(outputs=True), rngs),
        )

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        return super().__call__(inputs, out_sharding)[..., : self.out_features]


def rms_norm(config: LlamaConfig, rngs: nnx.Rngs) -> nnx.RMSNorm:
    # float32 in and out: the caller rounds once, after the scale.
    return nnx.RMSNorm(
        config.hidden_size, epsilon=config.norm_eps, dtype=jnp.float32, rngs=rngs
    )


def embedding(config: LlamaConfig, rngs: nnx.Rngs) -> nnx.Embed:
    # Looked up in float32, so that the gradients of a frequent token, which the
    # backward pass adds up one by one, are not summed in 16 bits.
    return nnx.Embed(
        config.vocab_size,
        config.hidden_size,
        dtype=jnp.float32,
        embedding_init=nnx.initializers.normal(config.init_std),
        rngs=rngs,
    )


def _attention_kernel(
    config: LlamaConfig, T: int, limits: dict[str, Any]
) -> Literal["xla", "cudnn"]:
    if config.attention != "auto":
        return config.attention
    # Some JAX releases refuse odd lengths in the backward pass of the cuDNN kernel.
    fits = aligned(config.head_size) <= 128 and T % 2 == 0
    fits &= len(limits) < 2  # older ones refuse a window with a mask
    if config.compute_dtype == "float32" or not fits:
        return "xla"
    backend = get_backend()
    if "cuda" not in backend.platform_version:
        return "xla"
    capability = float(backend.local_devices()[0].compute_capability)
    return "cudnn" if capability >= 8 else "xla"


def attend(
    config: LlamaConfig,
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    mask_B1TT: jax.Array | None = None,
) -> jax.Array:
    """Causal attention, within the sliding window and the mask if there are any."""
    T, H = q_BTNH.shape[1], config.head_size
    limits: dict[str, Any] = {}
    if config.sliding_window is not None and config.sliding_window < T:
        limits["local_window_size"] = (config.sliding_window - 1, 0)
    if mask_B1TT is not None:
        limits["mask"] = mask_B1TT
    kernel = _attention_kernel(config, T, limits)
    padded = (
        pad_to(x, aligned(H) if kernel == "cudnn" else H, -1)
        for x in (q_BTNH, k_BTKH, v_BTKH)
    )
    mixed_BTNH = jax.nn.dot_product_attention(
        *padded, scale=1 / math.sqrt(H), is_causal=True, implementation=kernel, **limits
    )
    return mixed_BTNH[..., :H]


class Context(NamedTuple):
    """Angles and attention of a batch, which all its layers share.

    Attributes:
      angles: those of RoPE, float32 (T, P) or (B, T, P).
      mix: the attention between rotated queries, keys and values.
    """

    angles: jax.Array
    mix: Mix


def context_of(
    config: LlamaConfig,
    T: int,
    segment_ids_BT: jax.Array | None = None,
    positions_BT: jax.Array | None = None,
) -> Context:
    """The angles and the attention of sequences of T tokens.

    With segment ids a token attends to tokens of its own segment alone.

    Args:
      config: the model's.
      T: the length.
      segment_ids_BT: int (B, T), equal in tokens of one segment, which lie side by
        side; None for one segment.
      positions_BT: int (B, T), what RoPE takes as positions; None for 0 to T - 1,
        counted anew in every segment.
    """
    mask_B1TT, positions = None, jnp.arange(T, dtype=jnp.float32)
    if segment_ids_BT is not None:
        mask_B1TT = (segment_ids_BT[:, :, None] == segment_ids_BT[:, None])[:, None]
        begins_BT = jnp.diff(segment_ids_BT, axis=1, prepend=-1) != 0
        begins_BT = begins_BT.at[:, 0].set(True)
        positions -= jax.lax.cummax(jnp.where(begins_BT, positions, 0), axis=1)
    if positions_BT is not None:
        positions = positions_BT
    angle_TP = rotary_angles(
        positions, config.head_size, config.rope_theta, config.rope_scaling
    )
    return Context(angle_TP, partial(attend, config, mask_B1TT=mask_B1TT))


class Attention(nnx.Module):
    """Causal self-attention with rotary positions and grouped key/value heads."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        D, H = config.hidden_size, config.head_size
        q_size, kv_size = config.num_heads * H, config.kv_heads * H
        qkv, o = config.attention_bias != "none", config.attention_bias == "qkvo"
        self.config = config
        self.q = _linear(config, D, q_size, rngs, bias=qkv)
        self.k = _linear(config, D, kv_size, rngs, bias=qkv)
        self.v = _linear(config, D, kv_size, rngs, bias=qkv)
        self.o = _linear(config, q_size, D, rngs, bias=o)

    def __call__(self, x_BTD: jax.Array, context: Context) -> jax.Array:
        B, T, _ = x_BTD.shape
        H = self.config.head_size
        q_BTNH = rotate(self.q(x_BTD).reshape(B, T, -1, H), context.angles)
        k_BTKH = rotate(self.k(x_BTD).reshape(B, T, -1, H), context.angles)
        v_BTKH = self.v(x_BTD).reshape(B, T, -1, H)
        return self.o(context.mix(q_BTNH, k_BTKH, v_BTKH).reshape(B, T, -1))


class MLP(nnx.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (https://arxiv.org/abs/2002.05202)."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        D, F = config.hidden_size, config.mlp_size
        inner = {"bias": config.mlp_bias, "pad": PadKernel(outputs=True)}
        outer = {"bias": config.mlp_bias, "pad": PadKernel(inputs=True)}
        self.gate = _linear(config, D, F, rngs, **inner)
        self.up = _linear(config, D, F, rngs, **inner)
        self.down = _linear(config, F, D, rngs, **outer)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        return self.down(jax.nn.silu(self.gate(x_BTD)) * self.up(x_BTD))


class Block(nnx.Module):
    """One pre-norm layer: attention, then MLP, each added to the residual stream."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.attention_norm = rms_norm(config, rngs)
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm = rms_norm(config, rngs)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(self, x_BTD: jax.Array, context: Context) -> jax.Array:
        normed_BTD = self.attention_norm(x_BTD).astype(x_BTD.dtype)
        x_BTD = x_BTD + self.attention(normed_BTD, context)
        return x_BTD + self.mlp(self.mlp_norm(x_BTD).astype(x_BTD.dtype))


class Llama(nnx.Module):
    """LLaMA (Touvron et al., 2023, https://arxiv.org/abs/2302.13971).

    Token ids int (B, T) -> float32 logits (B, T, V). Weights are float32,
    activations `config.compute_dtype`. An id of V or more turns its sequence's
    logits to NaN.

    Several examples may share a row: `segment_ids` int (B, T), 0 for padding and 1, 2,
    ... for the examples, which lie side by side, keep them apart. `positions` int
    (B, T) are those of RoPE; by default they count from 0 in every segment.

    Example:
      >>> config = LlamaConfig(64, 16, 24, num_heads=2, num_layers=2)
      >>> model = Llama(config, rngs=nnx.Rngs(0))
      >>> model(jnp.array([[1, 2, 3]])).shape
      (1, 3, 64)
    """

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stack_blocks(rngs: nnx.Rngs) -> Block:
            return Block(config, rngs=rngs)

        self.config = config
        self.embed = embedding(config, rngs)
        self.layers = stack_blocks(rngs)
        self.norm = rms_norm(config, rngs)
        if not config.tie_embeddings:
            self.head = Head(config, rngs=rngs)

    def hidden(
        self,
        tokens_BT: jax.Array,
        *,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
    ) -> jax.Array:
        """Computes the head's input: int (B, T) -> float32 (B, T, D)."""
        x_BTD = self.embed(tokens_BT).astype(self.config.compute_dtype)
        own = context_of(self.config, tokens_BT.shape[1], segment_ids, positions)
        graph, layers = nnx.split(self.layers)

        @REMAT[self.config.remat]
        def run(x_BTD: jax.Array, layer: Any) -> tuple[jax.Array, None]:
            return nnx.merge(graph, layer)(x_BTD, own), None

        return self.norm(jax.lax.scan(run, x_BTD, layers)[0])

    def logits(self, x: jax.Array) -> jax.Array:
        """Logits of the head's input: (..., D) -> float32 (..., V)."""
        if not self.config.tie_embeddings:
            return self.head(x)
        return tied_logits(self.config, self.embed.embedding[...], x)

    def __call__(
        self,
        tokens_BT: jax.Array,
        *,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
    ) -> jax.Array:
        x_BTD = self.hidden(tokens_BT, segment_ids=segment_ids, positions=positions)
        return self.logits(x_BTD)


def tied_logits(
    config: LlamaConfig, embedding_VD: jax.Array, x: jax.Array
) -> jax.Array:
    """`Head` with the embedding as its kernel: (..., D) -> float32 (..., V)."""
    V, dtype = config.vocab_size, config.compute_dtype
    padded_VD = pad_to(embedding_VD.astype(dtype), aligned(V), 0)
    logits = jnp.einsum(
        "...d,vd->...v",
        x.astype(dtype),
        padded_VD,
        preferred_element_type=jnp.float32,
    )
    return logits[..., :V]
