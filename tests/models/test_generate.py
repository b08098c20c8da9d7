"""Decoding with a key/value cache against the model without one."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import LlamaConfig, forward, generate, init_params
from models.rope import Llama3Scaling

# A large init_std makes the tokens differ.
PLAIN = LlamaConfig(
    61, 32, 40, num_heads=4, num_layers=3, init_std=0.3, compute_dtype="float32"
)
CONFIGS = {
    "plain": PLAIN,
    "all": replace(
        PLAIN,
        num_kv_heads=2,
        head_dim=12,
        tie_embeddings=True,
        attention_bias="qkv",
        sliding_window=4,
        rope_theta=1e3,
        rope_scaling=Llama3Scaling(4.0, low=1.0, high=4.0, original_positions=16),
    ),
}
run = jax.jit(forward, static_argnums=0)
STEPS, KEY = 7, jax.random.key(5)


def recomputed(config, params, tokens, temperature, steps=STEPS):
    """The same draws, each from the logits of the whole text so far."""
    start, length = tokens.shape[1], tokens.shape[1] + steps
    tokens = jnp.pad(tokens, ((0, 0), (0, steps)))
    for position in range(start, length):
        logits = run(config, params, tokens)[:, position - 1]
        if temperature == 0:
            new = logits.argmax(-1)
        else:
            key = jax.random.fold_in(KEY, position)
            new = jax.random.categorical(key, logits / temperature)
        tokens = tokens.at[:, position].set(new)
    return tokens


@pytest.mark.parametrize("temperature", [0, 0.8])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_cache_changes_no_token(name, temperature):
    config = CONFIGS[name]
    params = init_params(config, jax.random.key(0))
    prompt = jax.random.randint(jax.random.key(1), (3, 6), 0, config.vocab_size)
    expected = recomputed(config, params, prompt, temperature)
    found = generate(
        config, params, prompt, steps=STEPS, key=KEY, temperature=temperature
    )
    np.testing.assert_array_equal(found, expected)
    assert len(np.unique(expected[:, 6:])) > 5


def test_a_row_repeats_its_end_token_and_the_others_go_on():
    params = init_params(PLAIN, jax.random.key(0))
    prompt = jax.random.randint(jax.random.key(1), (3, 6), 0, PLAIN.vocab_size)
    free = np.asarray(recomputed(PLAIN, params, prompt, 0.8))
    first, second = int(free[0, 8]), int(free[1, 6])
    ends = (first, second)
    expected = free.copy()
    for row in expected:
        stop = next((i for i in range(6, 13) if row[i] in ends), 12)
        row[stop:] = row[stop]
    assert (expected != free).any()
    options = {"steps": STEPS, "key": KEY, "temperature": 0.8}
    found = generate(PLAIN, params, prompt, end=ends, **options)
    np.testing.assert_array_equal(found, expected)
    # An end token of the prompt ends nothing; all rows may end before the last step.
    prompt = prompt[:1].at[0, -1].set(second)
    free = np.asarray(recomputed(PLAIN, params, prompt, 0.8))
    third = int(free[0, 7])
    assert third not in free[0, 6:7]
    found = generate(PLAIN, params, prompt, end=[third, second], **options)
    stop = next(i for i in range(6, 13) if free[0, i] in (third, second))
    np.testing.assert_array_equal(found[0, : stop + 1], free[0, : stop + 1])
    assert (found[0, stop:] == free[0, stop]).all()


def test_no_steps_change_nothing():
    params = init_params(PLAIN, jax.random.key(0))
    prompt = jnp.array([[3, 4]])
    assert generate(PLAIN, params, prompt, steps=0, key=KEY).tolist() == [[3, 4]]
