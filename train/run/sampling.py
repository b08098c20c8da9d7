"""Text from a trained model."""

import jax
import jax.numpy as jnp

from models import LlamaConfig, Params, generate
from train.data.tokenizer import Tokenizer


def prompt_tokens(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The tokens of a prompt; ValueError if it has none."""
    tokens = tokenizer.encode(prompt)
    if not tokens:
        raise ValueError(
            f"prompt={prompt!r} has no token to begin with; give the first words of a "
            "text"
        )
    return tokens


def continued(
    model: LlamaConfig,
    weights: Params,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    tokens: int,
    seed: int,
    temperature: float = 0.8,
) -> str:
    """The prompt and the model's continuation."""
    start = jnp.asarray([prompt_tokens(tokenizer, prompt)], jnp.int32)
    text = generate(
        model,
        weights,
        start,
        steps=tokens,
        key=jax.random.key(seed),
        temperature=temperature,
    )
    return tokenizer.decode(text[0].tolist())
