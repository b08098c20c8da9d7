"""From a config to an optimizer: schedule, methods and bases, weight decay."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_optax as lro
from models import LlamaConfig, init_params
from train.config import Config, OptimizerConfig, resolve
from train.optimizer import decayed, make_optimizer, make_schedule

MODEL = LlamaConfig(64, 16, 24, num_heads=2, num_layers=2, compute_dtype="float32")


def resolved_optimizer(**fields) -> OptimizerConfig:
    return resolve(Config(optimizer=OptimizerConfig(**fields))).optimizer


def test_schedule_warms_up_linearly_and_ends_at_a_tenth():
    config = resolved_optimizer(learning_rate=0.5, warmup=0.1, final=0.1)
    rates = [float(make_schedule(config, 100)(count)) for count in range(100)]
    expected = [0.5 * (count + 1) / 10 for count in range(10)]
    expected += [
        0.5 * (0.1 + 0.45 * (1 + math.cos(math.pi * (count + 1 - 10) / 90)))
        for count in range(10, 100)
    ]
    # optax evaluates the schedule in float32.
    np.testing.assert_allclose(rates, expected, rtol=1e-5)
    assert rates[-1] == pytest.approx(0.05)


def test_a_schedule_without_warm_up_falls_from_near_the_peak():
    config = resolved_optimizer(learning_rate=1.0, warmup=0.0, final=0.0)
    schedule = make_schedule(config, 10)
    expected = [0.5 * (1 + math.cos(math.pi * (count + 1) / 10)) for count in range(10)]
    rates = [float(schedule(count)) for count in range(10)]
    # float32 again; the last rate is 0 up to its rounding.
    np.testing.assert_allclose(rates, expected, atol=1e-6)


LOW_RANK = ("galore", "fira", "grass_walk", "grass_jump")
BASES = ("default", "svd", "sara", "walk", "jump")


@pytest.mark.parametrize(
    ("name", "basis"),
    [("adamw", "default"), *((n, b) for n in LOW_RANK for b in BASES)],
)
def test_every_optimizer_takes_every_basis(name, basis):
    config = resolved_optimizer(name=name, basis=basis, rank=4)
    optimizer = make_optimizer(config, 10, jax.random.key(0))
    params = init_params(MODEL, jax.random.key(0))
    state = jax.eval_shape(optimizer.tx.init, params)
    updates, after = jax.eval_shape(optimizer.tx.update, params, state, params)
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, params)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    ranks = {row.path: row.rank for row in lro.memory_report(optimizer.tx, params).rows}
    matrices = {
        *(f"layers/attention/{x}/kernel" for x in "qkvo"),
        *(f"layers/mlp/{x}/kernel" for x in ("gate", "up", "down")),
    }
    low = {path for path, rank in ranks.items() if rank == 4}
    assert low == (set() if name == "adamw" else matrices)


def updates_of(seed: int = 0, **fields) -> list[np.ndarray]:
    """Two updates of one stack of matrices, with a basis of its own for each."""
    config = resolved_optimizer(rank=4, refresh_every=1, **fields)
    tx = make_optimizer(config, 10, jax.random.key(seed)).tx
    kernel = jnp.asarray(np.random.default_rng(0).standard_normal((2, 8, 16)))
    params = {"layers": {"mlp": {"up": {"kernel": kernel}}}}
    state, update, found = tx.init(params), jax.jit(tx.update), []
    for _ in range(2):
        updates, state = update(params, state, params)
        found.append(np.asarray(updates["layers"]["mlp"]["up"]["kernel"]))
    return found


def far_apart(a: np.ndarray, b: np.ndarray) -> bool:
    return bool(np.abs(a - b).max() > 1e-2 * np.abs(a).max())


def test_a_basis_replaces_the_method_s_own():
    own = updates_of(name="galore")
    np.testing.assert_array_equal(own, updates_of(name="galore", basis="svd"))
    for basis in ("sara", "walk", "jump"):
        # Walks and jumps start from the SVD, so only their second basis is another.
        assert far_apart(own[1], updates_of(name="galore", basis=basis)[1])


def test_the_key_decides_a_random_basis():
    jumps = updates_of(name="grass_jump")
    np.testing.assert_array_equal(jumps, updates_of(name="grass_jump"))
    assert far_apart(jumps[1], updates_of(seed=1, name="grass_jump")[1])


def test_matrices_and_embedding_decay_and_norm_scales_do_not():
    params = init_params(MODEL, jax.random.key(0))
    mask = {
        jax.tree_util.keystr(path, simple=True, separator="/"): decays
        for path, decays in jax.tree_util.tree_leaves_with_path(decayed(params))
    }
    assert {path for path, decays in mask.items() if not decays} == {
        "norm/scale",
        "layers/attention_norm/scale",
        "layers/mlp_norm/scale",
    }
    zero = jax.tree.map(jnp.zeros_like, params)
    for name in ("adamw", "grass_jump"):
        config = resolved_optimizer(name=name, weight_decay=0.1, learning_rate=1.0)
        optimizer = make_optimizer(config, 10, jax.random.key(0))
        updates, _ = optimizer.tx.update(zero, optimizer.tx.init(params), params)
        rate = float(optimizer.schedule(0))
        # A gradient of 0 leaves only the decay: -rate * 0.1 * weight, in float32.
        np.testing.assert_allclose(
            updates["embed"]["embedding"],
            -rate * 0.1 * params["embed"]["embedding"],
            rtol=1e-5,
        )
        assert not updates["norm"]["scale"].any()


def test_a_parameter_without_a_rule_is_an_error():
    config = resolved_optimizer(name="galore", rank=4)
    optimizer = make_optimizer(config, 10, jax.random.key(0))
    with pytest.raises(ValueError, match="adapter/kernel"):
        optimizer.tx.init({"adapter": {"kernel": jnp.ones((8, 8))}})
