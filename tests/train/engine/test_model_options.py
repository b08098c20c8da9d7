"""The step of models with a tied head, biases, another head size and a window."""

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import LlamaConfig, forward, init_params
from models.rope import LinearScaling
from train.config.config import Config, MeshConfig, OptimizerConfig
from train.config.resolve import quarter, resolve
from train.config.sizes import large_layers
from train.engine.flops import flops_per_token, multiplied_weights
from train.engine.mesh import make_mesh, to_devices
from train.engine.optimizer import decayed, make_optimizer, parted, smaller_sides
from train.engine.step import Work, init_state, init_weights, loss_sums, train_step
from train.run.first_state import initial
from train.run.loop import lower_step

# 60 tokens are padded to 64 columns in the head's product.
MODEL = LlamaConfig(
    60,
    16,
    24,
    num_heads=4,
    num_layers=2,
    num_kv_heads=2,
    head_dim=8,
    tie_embeddings=True,
    attention_bias="qkvo",
    mlp_bias=True,
    sliding_window=5,
    rope_scaling=LinearScaling(2.0),
    init_std=0.3,
    compute_dtype="float32",
)
ROWS, T = 8, 12


def config_of(fsdp: int = 1, tensor: int = 1) -> Config:
    optimizer = OptimizerConfig(
        name="adamw", learning_rate=1e-2, warmup=0, weight_decay=0.1, clip_norm=None
    )
    mesh = MeshConfig(fsdp, tensor)
    return resolve(
        Config(steps=9, batch_size=ROWS, seq_len=T, optimizer=optimizer, mesh=mesh)
    )


def work_of(model: LlamaConfig = MODEL, **how: Any) -> Work:
    optimizer = make_optimizer(config_of().optimizer, 9, jax.random.key(1))
    return Work(model, optimizer, jax.random.key(2), **how)


def batch_of(model: LlamaConfig = MODEL) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {"tokens": rng.integers(0, model.vocab_size, (ROWS, T), dtype=np.int32)}


@cache
def stepped(layerwise: bool) -> tuple[Any, Any]:
    """The metrics and the weights after the first step, on one device."""
    work = work_of(layerwise=layerwise)
    state = init_state(work, init_weights(work, jax.random.key(0)))
    step = jax.jit(partial(train_step, work), static_argnames="refresh")
    state, metrics = step(state, batch_of(), refresh=False)
    return metrics, state.params


def close(found: Any, expected: Any, **tolerance: float) -> None:
    jax.tree.map(partial(np.testing.assert_allclose, **tolerance), found, expected)


def test_the_loss_and_its_gradient_are_those_of_all_logits():
    """The embedding's gradient is the sum over both of its uses."""
    params = init_params(MODEL, jax.random.key(0))
    tokens = batch_of()["tokens"]

    def plain(params: Any) -> jax.Array:
        logp = jax.nn.log_softmax(forward(MODEL, params, tokens)[:, :-1])
        return -jnp.take_along_axis(logp, tokens[:, 1:, None], axis=-1).sum()

    work = work_of()
    blockwise = jax.jit(
        jax.value_and_grad(lambda p: loss_sums(work, p, {"tokens": tokens})[0])
    )
    # Float32 sums of some hundred terms, in another order.
    close(
        blockwise(params),
        jax.jit(jax.value_and_grad(plain))(params),
        rtol=1e-4,
        atol=1e-4,
    )


def test_a_step_layer_by_layer_is_the_ordinary_one():
    # Adam divides by the root of small squares, which magnifies rounding.
    for found, expected in zip(stepped(True), stepped(False), strict=True):
        close(found, expected, rtol=1e-3, atol=1e-5)
    moved = jax.tree.map(
        lambda x, y: float(jnp.abs(x - y).max()),
        stepped(False)[1],
        init_params(MODEL, jax.random.key(0)),
    )
    assert min(jax.tree.leaves(moved)) > 1e-3


@pytest.mark.parametrize(
    "layerwise", [True, pytest.param(False, marks=pytest.mark.slow)]
)
def test_a_mesh_takes_the_step_of_one_device(layerwise):
    config = config_of(2, 2)
    work, mesh = work_of(layerwise=layerwise), make_mesh(config, jax.devices()[:4])
    make, like = initial(work, mesh)
    with jax.set_mesh(mesh):
        state = make(jax.random.key(0))
        step = lower_step(config, mesh, work, like, False).compile()
        state, metrics = step(state, to_devices(mesh, batch_of()))
    for found, expected in zip(
        (metrics, state.params), stepped(layerwise), strict=True
    ):
        close(found, expected, rtol=1e-3, atol=1e-5)
    embedding = state.params["embed"]["embedding"]
    assert embedding.sharding.shard_shape(embedding.shape) == (60, 4)
    q = state.params["layers"]["attention"]["q"]
    assert q["kernel"].sharding.shard_shape((2, 16, 32)) == (2, 16, 8)
    assert q["bias"].sharding.is_fully_replicated


def test_biases_and_a_tied_embedding_have_full_rank_and_only_matrices_decay():
    params = jax.eval_shape(partial(init_params, MODEL), jax.random.key(0))
    sides = smaller_sides(parted(params).layers)
    names = [f"attention/{n}" for n in "qkvo"]
    names += [f"mlp/{n}" for n in ("gate", "up", "down")]
    assert sides == {f"layers/{name}/kernel": 16 for name in names}
    decays = jax.tree_util.tree_leaves_with_path(decayed(params))
    found = {
        jax.tree_util.keystr(p, simple=True, separator="/") for p, x in decays if x
    }
    assert found == {"embed/embedding", *sides}
    assert quarter(MODEL) == 0.25


def test_operations_count_each_product_and_what_a_window_sees():
    params = jax.eval_shape(partial(init_params, MODEL), jax.random.key(0))
    leaves = jax.tree_util.tree_leaves_with_path(params)
    sizes = [x.size for path, x in leaves if path[-1].key in ("kernel", "embedding")]
    assert multiplied_weights(MODEL) == sum(sizes)
    # Token t of 10 sees min(t + 1, 5): 1 + 2 + 3 + 4 + 6 * 5 = 40, and half of the
    # diagonal does not count, as where a token sees T / 2 of T in the mean.
    seen = (40 - 5 / 2) / 10
    attention = 12 * MODEL.num_layers * 32 * seen
    assert flops_per_token(MODEL, 10) == 6 * multiplied_weights(MODEL) + attention


def test_a_wide_head_makes_a_layer_large():
    model = LlamaConfig(64, 4096, 4096, num_heads=32, num_layers=1)
    assert large_layers(model)
    small = LlamaConfig(64, 4096, 4096, 32, 1, num_kv_heads=2, head_dim=64)
    assert not large_layers(small)
