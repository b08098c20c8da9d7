"""Text from a trained model."""

import jax
import jax.numpy as jnp

from models import LlamaConfig, Params, generate
from train.data.chat import Chat
from train.data.tokenizer import Tokenizer


def prompt_tokens(
    tokenizer: Tokenizer, prompt: str, chat: Chat | None = None
) -> list[int]:
    """The tokens of a prompt, with `chat` as a user's turn; ValueError if none."""
    tokens = chat.prompt(prompt).tolist() if chat else tokenizer.encode(prompt)
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
    chat: Chat | None = None,
    tokens: int,
    seed: int,
    temperature: float = 0.8,
) -> str:
    """The prompt and the model's continuation, to the end of the text or shorter.

    With `chat`, a user's turn and the model's answer, to its end or shorter.
    """
    start = jnp.asarray([prompt_tokens(tokenizer, prompt, chat)], jnp.int32)
    end = chat.end if chat else None
    text = generate(
        model,
        weights,
        start,
        steps=tokens,
        key=jax.random.key(seed),
        temperature=temperature,
        end=tokenizer.eos_id if end is None else end,
    )
    return tokenizer.decode(text[0].tolist())
