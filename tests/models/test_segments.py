"""Several examples in a row, kept apart, and positions that are given."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import LlamaConfig, bind, forward, init_params
from models.params import embed, finish, run_layer
from models.rope import LinearScaling, rotary_angles

SMALL = LlamaConfig(
    61, 32, 40, num_heads=4, num_layers=2, init_std=0.3, compute_dtype="float32"
)
# Rows of 12: examples of 5 and 4 tokens and padding, and one of 12.
SEGMENTS = jnp.array([[1] * 5 + [2] * 4 + [0] * 3, [1] * 12], jnp.int32)
PARTS = [(0, slice(0, 5)), (0, slice(5, 9)), (0, slice(9, 12)), (1, slice(0, 12))]
TOKENS = jax.random.randint(jax.random.key(1), (2, 12), 0, 61)
# Float32 sums of some dozen terms in another order.
ROUNDING = {"rtol": 2e-5, "atol": 2e-5}
run = jax.jit(forward, static_argnums=0)


@pytest.mark.parametrize(
    "change",
    [{}, {"sliding_window": 3, "rope_scaling": LinearScaling(2.0), "remat": "full"}],
)
def test_an_example_has_the_logits_that_it_has_alone(change):
    config = replace(SMALL, **change)
    params = init_params(config, jax.random.key(0))
    together = run(config, params, TOKENS, segment_ids=SEGMENTS)
    for row, part in PARTS:
        alone = run(config, params, TOKENS[row : row + 1, part])
        np.testing.assert_allclose(together[row, part], alone[0], **ROUNDING)
    assert not jnp.allclose(together[0, 5:], run(config, params, TOKENS)[0, 5:], 0.1)


@pytest.mark.parametrize("window", [1, 3, 12])
def test_a_token_sees_as_many_as_the_window_has(window):
    config = replace(SMALL, num_layers=1, sliding_window=window)
    params = init_params(config, jax.random.key(0))
    changed = run(config, params, TOKENS.at[:, 2].add(1) % 61)
    moved = jnp.abs(changed - run(config, params, TOKENS)).max(axis=(0, 2)) > 1e-3
    assert moved.tolist() == [2 <= t < 2 + window for t in range(12)]


def test_positions_are_those_that_are_given():
    params = init_params(SMALL, jax.random.key(0))
    plain = run(SMALL, params, TOKENS)
    count = jnp.broadcast_to(jnp.arange(12), (2, 12))
    np.testing.assert_allclose(run(SMALL, params, TOKENS, positions=count), plain)
    # RoPE sees distances alone, so a shift changes nothing and a stretch does.
    shifted = run(SMALL, params, TOKENS, positions=count + 7)
    np.testing.assert_allclose(shifted, plain, rtol=1e-3, atol=1e-3)
    stretched = run(SMALL, params, TOKENS, positions=3 * count)
    assert not jnp.allclose(stretched[:, 3:], plain[:, 3:], 0.1)
    # Within segments they count from 0 by themselves.
    own = jnp.array([[*range(5), *range(4), *range(3)], [*range(12)]])
    np.testing.assert_array_equal(
        run(SMALL, params, TOKENS, segment_ids=SEGMENTS, positions=own),
        run(SMALL, params, TOKENS, segment_ids=SEGMENTS),
    )


@pytest.mark.parametrize("remat", ["none", "dots"])
def test_layer_by_layer_it_is_the_same(remat):
    config = replace(SMALL, remat=remat, compute_dtype="bfloat16")
    params = init_params(config, jax.random.key(0))

    def in_steps(params):
        def body(x, layer):
            return run_layer(config, layer, x, segment_ids=SEGMENTS), None

        x, _ = jax.lax.scan(body, embed(config, params, TOKENS), params["layers"])
        return finish(config, params, x)

    def whole(params):
        return bind(config, params).hidden(TOKENS, segment_ids=SEGMENTS)

    def gradient(hidden):
        return jax.jit(jax.grad(lambda p: jnp.sum(jnp.sin(hidden(p)))))(params)

    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-4),
        gradient(in_steps),
        gradient(whole),
    )


def test_angles_follow_the_published_equations():
    """RoPE, "YaRN" (Peng et al., 2023) for linear; Llama 3.1's code for its own."""
    from models.rope import Llama3Scaling

    H, theta, T = 16, 5e5, 6
    frequency = theta ** (-2 * np.arange(H // 2) / H)
    scaling = Llama3Scaling(8.0, low=1.0, high=4.0, original_positions=512)
    expected = []
    for f in frequency:
        wavelength = 2 * np.pi / f
        if wavelength < 512 / 4.0:
            expected.append(f)
        elif wavelength > 512 / 1.0:
            expected.append(f / 8.0)
        else:
            smooth = (512 / wavelength - 1.0) / (4.0 - 1.0)
            expected.append((1 - smooth) * f / 8.0 + smooth * f)
    assert len({e / f for e, f in zip(expected, frequency, strict=True)}) == 3
    for rule, frequencies in ((None, frequency), (scaling, np.array(expected))):
        found = rotary_angles(jnp.arange(T), H, theta, rule)
        np.testing.assert_allclose(
            found, np.arange(T)[:, None] * frequencies, rtol=2e-6
        )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LinearScaling(0.5), "factor=0.5 must be 1 or more"),
        (lambda: replace(SMALL, head_dim=7), "head_dim=7 must be even"),
        (lambda: replace(SMALL, sliding_window=0), "sliding_window=0 must be positive"),
        (lambda: replace(SMALL, attention_bias="all"), "use one of none, qkv, qkvo"),
    ],
)
def test_a_bad_option_is_refused_with_the_fix(make, message):
    with pytest.raises(ValueError, match=message):
        make()
