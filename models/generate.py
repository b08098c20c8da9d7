"""Sampling text from a model, one token at a time."""

from functools import partial

import jax
import jax.numpy as jnp

from models.config import LlamaConfig
from models.params import Params, bind


def generate(
    config: LlamaConfig,
    params: Params,
    prompt: jax.Array,
    *,
    steps: int,
    key: jax.Array,
    temperature: float = 1.0,
) -> jax.Array:
    """Continue each prompt by `steps` tokens: int (B, P) -> int (B, P + steps).

    Tokens are drawn from softmax(logits / temperature); temperature 0 takes the
    likeliest token and ignores `key`. Same key, same tokens.

    Every step runs the whole window again, since there is no key/value cache: fit for
    looking at samples during training, not for serving.

    Raises:
      ValueError: if the prompt is not an integer matrix with at least one token a
        row, or if `steps` or `temperature` is negative.
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
    return _sample(config, params, prompt, steps, key, temperature, temperature == 0)


@partial(jax.jit, static_argnames=("config", "steps", "greedy"))
def _sample(
    config: LlamaConfig,
    params: Params,
    prompt: jax.Array,
    steps: int,
    key: jax.Array,
    temperature: float,
    greedy: bool,
) -> jax.Array:
    def step(tokens: jax.Array, position: jax.Array) -> tuple[jax.Array, None]:
        model = bind(config, params)
        # Attention is causal, so the unwritten end of the window changes nothing here.
        logits = model.head(model.hidden(tokens)[:, position - 1])
        if greedy:
            token = logits.argmax(axis=-1)
        else:
            step_key = jax.random.fold_in(key, position)
            token = jax.random.categorical(step_key, logits / temperature)
        return tokens.at[:, position].set(token.astype(tokens.dtype)), None

    start = prompt.shape[1]
    window = jnp.pad(prompt, ((0, 0), (0, steps)))
    tokens, _ = jax.lax.scan(step, window, jnp.arange(start, start + steps))
    return tokens
