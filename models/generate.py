"""Sampling text from a model, one token at a time, with a key/value cache."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from models.config import LlamaConfig
from models.llama import Context, Llama, attend
from models.params import Params, bind
from models.rope import rotary_angles


def generate(
    config: LlamaConfig,
    params: Params,
    prompt: jax.Array,
    *,
    steps: int,
    key: jax.Array,
    temperature: float = 1.0,
    end: int | Sequence[int] = (),
) -> jax.Array:
    """Continue each prompt by `steps` tokens: int (B, P) -> int (B, P + steps).

    Tokens are drawn from softmax(logits / temperature); temperature 0 takes the
    likeliest token and ignores `key`. Same key, same tokens.

    The prompts go through the model once, and each new token then goes through it
    alone: the keys and values of all tokens before it, (L, B, P + steps, K, H) each in
    the compute dtype, are kept.

    Args:
      config: the model's configuration.
      params: its weights.
      prompt: int (B, P), of one length.
      steps: how many tokens to add.
      key: decides what is drawn.
      temperature: above 1 for more surprise, below for less.
      end: the id, or ids, that end a text. A row repeats its end token from there on,
        and the work stops when all rows have ended.

    Raises:
      ValueError: if the prompt is not an integer matrix with at least one token a
        row, or if `steps` or `temperature` is negative.

    Example:
      >>> from models import init_params
      >>> config = LlamaConfig(64, 16, 24, num_heads=2, num_layers=2)
      >>> params, key = init_params(config, jax.random.key(0)), jax.random.key(1)
      >>> generate(config, params, jnp.array([[1, 2, 3]]), steps=5, key=key).shape
      (1, 8)
    """
    if prompt.ndim != 2 or prompt.shape[1] < 1:
        raise ValueError(
            f"prompt has shape {prompt.shape}; give (batch, tokens) with at least one "
            "token, such as the beginning-of-text id"
        )
    if not jnp.issubdtype(prompt.dtype, jnp.integer):
        raise ValueError(f"prompt is {prompt.dtype}; give integer token ids")
    if steps < 0 or temperature < 0:
        raise ValueError(f"{steps=} and {temperature=} must not be negative")
    ends = (end,) if isinstance(end, int) else tuple(end)
    if steps == 0:
        return jnp.asarray(prompt)
    greedy = temperature == 0
    return _sample(config, params, prompt, steps, key, temperature, greedy, ends)


class _Cache(NamedTuple):
    """The rotated keys and the values of all layers, (L, B, S, K, H)."""

    k: jax.Array
    v: jax.Array


@partial(jax.jit, static_argnames=("config", "steps", "greedy", "ends"))
def _sample(
    config: LlamaConfig,
    params: Params,
    prompt: jax.Array,
    steps: int,
    key: jax.Array,
    temperature: float,
    greedy: bool,
    ends: tuple[int, ...],
) -> jax.Array:
    model = bind(config, params)
    begin, length = prompt.shape[1], prompt.shape[1] + steps

    def draw(logits_BV: jax.Array, position: jax.Array) -> jax.Array:
        if greedy:
            return logits_BV.argmax(axis=-1)
        step_key = jax.random.fold_in(key, position)
        return jax.random.categorical(step_key, logits_BV / temperature)

    def write(tokens: jax.Array, position: Any, logits_BV: jax.Array) -> Any:
        """The tokens with one more in each row, and which rows have ended."""
        new_B = draw(logits_BV, position).astype(tokens.dtype)
        last_B = tokens[:, position - 1]
        # A prompt may hold end tokens.
        ended_B = jnp.isin(last_B, jnp.array(ends, tokens.dtype)) & (position > begin)
        new_B = jnp.where(ended_B, last_B, new_B)
        ended_B = jnp.isin(new_B, jnp.array(ends, tokens.dtype))
        return tokens.at[:, position].set(new_B), ended_B

    def going_on(carry: Any) -> jax.Array:
        _, position, ended_B, _ = carry
        return (position < length) & ~ended_B.all()

    def step(carry: Any) -> Any:
        tokens, position, _, cache = carry
        logits_BV, cache = _next(model, tokens[:, position - 1], position - 1, cache)
        tokens, ended_B = write(tokens, position, logits_BV)
        return tokens, position + 1, ended_B, cache

    logits_BV, cache = _prefill(model, prompt, length)
    tokens, ended_B = write(
        jnp.pad(prompt, ((0, 0), (0, steps))), jnp.int32(begin), logits_BV
    )
    tokens, stopped, _, _ = jax.lax.while_loop(
        going_on, step, (tokens, jnp.int32(begin + 1), ended_B, cache)
    )
    last = jax.lax.dynamic_slice_in_dim(tokens, stopped - 1, 1, axis=1)
    return jnp.where(jnp.arange(length) < stopped, tokens, last)


def _angles(config: LlamaConfig, positions: jax.Array) -> jax.Array:
    return rotary_angles(
        positions, config.head_size, config.rope_theta, config.rope_scaling
    )


def _prefill(
    model: Llama, tokens_BT: jax.Array, length: int
) -> tuple[jax.Array, _Cache]:
    """The logits (B, V) after the prompts, and a cache with room for `length`."""
    config, T = model.config, tokens_BT.shape[1]
    graph, layers = nnx.split(model.layers)
    angles = _angles(config, jnp.arange(T, dtype=jnp.float32))

    def run(x_BTD: jax.Array, layer: Any) -> tuple[jax.Array, _Cache]:
        kept = []

        def mix(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            kept[:] = k, v
            return attend(config, q, k, v)

        x_BTD = nnx.merge(graph, layer)(x_BTD, Context(angles, mix))
        room = ((0, 0), (0, length - T), (0, 0), (0, 0))
        return x_BTD, _Cache(*(jnp.pad(x, room) for x in kept))

    x_BTD = model.embed(tokens_BT).astype(config.compute_dtype)
    x_BTD, cache = jax.lax.scan(run, x_BTD, layers)
    return model.logits(model.norm(x_BTD[:, -1])), cache


def _next(
    model: Llama, token_B: jax.Array, position: jax.Array, cache: _Cache
) -> tuple[jax.Array, _Cache]:
    """The logits (B, V) after one more token, and the cache with it."""
    config = model.config
    graph, layers = nnx.split(model.layers)
    angles = _angles(config, position[None])
    at_S = jnp.arange(cache.k.shape[2])
    seen_S = at_S <= position
    if config.sliding_window is not None:
        seen_S &= at_S > position - config.sliding_window

    def run(carry: Any, of_layer: Any) -> tuple[Any, None]:
        x_B1D, cache = carry
        layer, index = of_layer
        written = []

        def mix(q: jax.Array, *new: jax.Array) -> jax.Array:
            # The whole cache is carried, so that it is written in place.
            written[:] = (
                x.at[index, :, position].set(y[:, 0])
                for x, y in zip(cache, new, strict=True)
            )
            k, v = (x[index] for x in written)
            scale = 1 / math.sqrt(config.head_size)
            return jax.nn.dot_product_attention(
                q, k, v, mask=seen_S[None, None, None], scale=scale
            )

        x_B1D = nnx.merge(graph, layer)(x_B1D, Context(angles, mix))
        return (x_B1D, _Cache(*written)), None

    x_B1D = model.embed(token_B[:, None]).astype(config.compute_dtype)
    (x_B1D, cache), _ = jax.lax.scan(
        run, (x_B1D, cache), (layers, jnp.arange(config.num_layers))
    )
    return model.logits(model.norm(x_B1D[:, 0])), cache
