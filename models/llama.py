"""LLaMA in Flax NNX: a stack of identical blocks, scanned over depth.

Array names end in their axes: B batch, T tokens, D hidden, N query heads,
K key/value heads, H head size, F MLP, V vocabulary, L layers.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend.backend import get_backend

from models.config import LlamaConfig
from models.padding import NO_PADDING, PadKernel, aligned, pad_to

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


def _options(config: LlamaConfig, pad: PadKernel, rngs: nnx.Rngs) -> dict[str, Any]:
    return {
        "use_bias": False,
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
    pad: PadKernel = NO_PADDING,
) -> nnx.Linear:
    return nnx.Linear(size_in, size_out, **_options(config, pad, rngs))


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


def rotary_angles(T: int, H: int, theta: float) -> jax.Array:
    """Radians that position t turns pair i of a head by: t * theta**(-2 i / H).

    Returns float32 (T, H / 2).
    """
    frequency = theta ** (-jnp.arange(0, H, 2, dtype=jnp.float32) / H)
    return jnp.arange(T, dtype=jnp.float32)[:, None] * frequency


def rotate(x_BTNH: jax.Array, angle_TP: jax.Array) -> jax.Array:
    """Rotary position embedding (Su et al., 2021, https://arxiv.org/abs/2104.09864).

    Turns the pair (unit i, unit i + H / 2) of every head by its angle, in float32.
    Keeps shape and dtype.
    """
    cos, sin = jnp.cos(angle_TP)[:, None], jnp.sin(angle_TP)[:, None]
    a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return rotated.astype(x_BTNH.dtype)


def _attention_kernel(config: LlamaConfig, T: int) -> Literal["xla", "cudnn"]:
    if config.attention != "auto":
        return config.attention
    # Some JAX releases refuse odd lengths in the backward pass of the cuDNN kernel.
    fits = aligned(config.head_size) <= 128 and T % 2 == 0
    if config.compute_dtype == "float32" or not fits:
        return "xla"
    backend = get_backend()
    if "cuda" not in backend.platform_version:
        return "xla"
    capability = float(backend.local_devices()[0].compute_capability)
    return "cudnn" if capability >= 8 else "xla"


class Attention(nnx.Module):
    """Causal self-attention with rotary positions and grouped key/value heads."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        D, kv_size = config.hidden_size, config.kv_heads * config.head_size
        self.config = config
        self.q = _linear(config, D, D, rngs)
        self.k = _linear(config, D, kv_size, rngs)
        self.v = _linear(config, D, kv_size, rngs)
        self.o = _linear(config, D, D, rngs)

    def __call__(self, x_BTD: jax.Array, angle_TP: jax.Array) -> jax.Array:
        B, T, D = x_BTD.shape
        H = self.config.head_size
        q_BTNH = rotate(self.q(x_BTD).reshape(B, T, -1, H), angle_TP)
        k_BTKH = rotate(self.k(x_BTD).reshape(B, T, -1, H), angle_TP)
        v_BTKH = self.v(x_BTD).reshape(B, T, -1, H)
        kernel = _attention_kernel(self.config, T)
        padded = (
            pad_to(x, aligned(H) if kernel == "cudnn" else H, -1)
            for x in (q_BTNH, k_BTKH, v_BTKH)
        )
        mixed_BTNH = jax.nn.dot_product_attention(
            *padded, scale=1 / math.sqrt(H), is_causal=True, implementation=kernel
        )
        return self.o(mixed_BTNH[..., :H].reshape(B, T, D))


class MLP(nnx.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (https://arxiv.org/abs/2002.05202)."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        D, F = config.hidden_size, config.mlp_size
        self.gate = _linear(config, D, F, rngs, pad=PadKernel(outputs=True))
        self.up = _linear(config, D, F, rngs, pad=PadKernel(outputs=True))
        self.down = _linear(config, F, D, rngs, pad=PadKernel(inputs=True))

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        return self.down(jax.nn.silu(self.gate(x_BTD)) * self.up(x_BTD))


class Block(nnx.Module):
    """One pre-norm layer: attention, then MLP, each added to the residual stream."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.attention_norm = rms_norm(config, rngs)
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm = rms_norm(config, rngs)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(self, x_BTD: jax.Array, angle_TP: jax.Array) -> jax.Array:
        normed_BTD = self.attention_norm(x_BTD).astype(x_BTD.dtype)
        x_BTD = x_BTD + self.attention(normed_BTD, angle_TP)
        return x_BTD + self.mlp(self.mlp_norm(x_BTD).astype(x_BTD.dtype))


class Llama(nnx.Module):
    """LLaMA (Touvron et al., 2023, https://arxiv.org/abs/2302.13971), untied head.

    Token ids int (B, T) -> float32 logits (B, T, V). Weights are float32,
    activations `config.compute_dtype`. An id of V or more turns its sequence's
    logits to NaN.

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
        self.head = Head(config, rngs=rngs)

    def hidden(self, tokens_BT: jax.Array) -> jax.Array:
        """Computes the head's input: int (B, T) -> float32 (B, T, D)."""
        x_BTD = self.embed(tokens_BT).astype(self.config.compute_dtype)
        angle_TP = rotary_angles(
            tokens_BT.shape[1], self.config.head_size, self.config.rope_theta
        )
        graph, layers = nnx.split(self.layers)

        @REMAT[self.config.remat]
        def run(x_BTD: jax.Array, layer: Any) -> tuple[jax.Array, None]:
            return nnx.merge(graph, layer)(x_BTD, angle_TP), None

        return self.norm(jax.lax.scan(run, x_BTD, layers)[0])

    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        return self.head(self.hidden(tokens_BT))
