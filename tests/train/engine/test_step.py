"""The training step: microbatches, evaluation, meshes, NaN gradients."""

from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import train.engine.step
from models import LlamaConfig, bind, forward, init_params
from tests.helpers.marks import NIGHTLY
from train.config.config import Config, OptimizerConfig
from train.config.resolve import resolve
from train.engine.mesh import make_mesh, replicated
from train.engine.optimizer import make_optimizer
from train.engine.step import (
    TrainState,
    Work,
    head_loss,
    init_state,
    init_weights,
    loss_sums,
    mean_gradient,
    train_step,
)
from train.run.first_state import like_of
from train.run.loop import build_program, check_finite, evaluate, kinds_of_steps

MODEL = LlamaConfig(64, 16, 24, num_heads=2, num_layers=2, compute_dtype="float32")


def tokens_of(seed: int, rows: int = 16, length: int = 12) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, MODEL.vocab_size, (rows, length), dtype=np.int32)


def make_params():
    return jax.jit(partial(init_params, MODEL))(jax.random.key(0))


def work_of(name: str, **how: Any) -> Work:
    config = OptimizerConfig(
        name=name, rank=4, refresh_every=3, weight_decay=0.5, clip_norm=1e-3
    )
    config = resolve(Config(optimizer=config)).optimizer
    optimizer = make_optimizer(config, steps=20, key=jax.random.key(1))
    return Work(MODEL, optimizer, jax.random.key(2), **how)


@cache
def make(name: str, **how: Any):
    """An optimizer, its jitted step, and a state to start from."""
    work = work_of(name, **how)
    step = jax.jit(partial(train_step, work), static_argnames="refresh")
    init = jax.jit(lambda key: init_state(work, init_weights(work, key)))
    return work.optimizer, step, init(jax.random.key(0))


def refresh_due(state: TrainState) -> bool:
    """As the host asks for it, of a method that has refreshes."""
    return int(state.until_refresh) == 0


sums_of_adamw = jax.jit(partial(loss_sums, work_of("adamw")))
gradient_in_parts = jax.jit(
    partial(mean_gradient, partial(loss_sums, work_of("adamw"))), static_argnums=2
)


def norm(tree) -> float:
    return np.sqrt(sum(float(jnp.sum(x**2)) for x in jax.tree.leaves(tree)))


def same_bits(a, b) -> bool:
    def bits(x):
        keys = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(x) if keys else x).tobytes()

    return jax.tree.map(bits, a) == jax.tree.map(bits, b)


def test_microbatches_give_the_gradient_of_the_whole_batch():
    params = make_params()
    rng = np.random.default_rng(1)
    # Weights that differ in sum from part to part: a mean of means would be wrong.
    weights = (rng.random((16, 12)) < np.linspace(0.1, 1, 16)[:, None]) * 1.0
    batch = {"tokens": tokens_of(0), "weights": weights.astype(np.float32)}
    loss, whole = gradient_in_parts(params, batch, 1)
    loss_in_parts, in_parts = gradient_in_parts(params, batch, 4)
    # Float32 sums in another order: a few units in the last place, 1.2e-7 each, of the
    # largest terms.
    np.testing.assert_allclose(loss_in_parts, loss, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(in_parts), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * np.abs(b).max())


@pytest.mark.parametrize(
    ("name", "layerwise"),
    [("grass_jump", False), pytest.param("adamw", True, marks=pytest.mark.slow)],
)
def test_padding_outside_of_the_vocabulary_changes_nothing(name, layerwise):
    _, step, state = make(name, layerwise=layerwise)
    step = partial(step, refresh=name != "adamw")
    tokens, weights = tokens_of(0), np.ones((16, 12), np.float32)
    weights[:, 7:] = 0

    def after(padding: int) -> tuple[TrainState, Any]:
        padded = np.where(weights > 0, tokens, padding)
        return step(state, {"tokens": padded, "weights": weights})

    expected = after(0)
    for padding in (MODEL.vocab_size, -100, 2**31 - 1):
        assert same_bits(after(padding), expected)
    assert float(expected[1]["loss"]) > 0
    # A prompt, which is read and not to be predicted, is not padding.
    weights = np.roll(weights, 5, axis=1)
    assert not same_bits(
        step(state, {"tokens": tokens, "weights": weights}),
        step(state, {"tokens": tokens * (weights > 0), "weights": weights}),
    )


def numpy_losses(params, tokens: np.ndarray) -> np.ndarray:
    """-log p of each next token, (B, T - 1), by numpy in float64."""
    logits = jax.jit(partial(forward, MODEL))(params, tokens)
    logits = np.asarray(logits, np.float64)[:, :-1]
    log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return -np.take_along_axis(log_p, tokens[:, 1:, None], axis=-1)[..., 0]


def test_evaluation_is_a_mean_over_tokens_not_over_batches():
    # Larger than at the start of a training, so that batches differ in their loss.
    params = jax.tree.map(lambda p: 10 * p, make_params())
    batches = []
    for seed, kept in ((0, 12), (1, 3)):
        weights = np.zeros((16, 12), np.float32)
        weights[:, :kept] = 1
        batches.append({"tokens": tokens_of(seed), "weights": weights})
    program = SimpleNamespace(loss_sums=sums_of_adamw, put=lambda batch: batch)
    sums, means = [], []
    for batch in batches:
        losses, weights = numpy_losses(params, batch["tokens"]), batch["weights"][:, 1:]
        sums.append([(losses * weights).sum(), weights.sum()])
        means.append(sums[-1][0] / sums[-1][1])
    expected = np.sum(sums, axis=0)[0] / np.sum(sums, axis=0)[1]
    assert abs(np.mean(means) - expected) > 1e-2
    # The model's logits are float32; both sides add up in float64 or nearly so.
    np.testing.assert_allclose(
        evaluate(program, params, batches)["eval_loss"], expected, rtol=1e-6
    )


def test_an_evaluation_that_is_not_finite_is_an_error():
    nan = SimpleNamespace(loss_sums=lambda params, b: (np.nan, 1.0), put=lambda b: b)
    with pytest.raises(FloatingPointError, match="held-out loss is nan"):
        evaluate(nan, None, [{}])


def test_the_first_token_of_a_window_is_no_target_and_nothing_follows_the_last():
    params = make_params()
    weights = np.zeros((16, 12), np.float32)
    weights[:, 0] = 1
    loss, weight = sums_of_adamw(params, {"tokens": tokens_of(0), "weights": weights})
    assert (float(loss), float(weight)) == (0.0, 0.0)
    _, weight = sums_of_adamw(params, {"tokens": tokens_of(0)})
    assert float(weight) == 16 * 11


def test_the_loss_in_blocks_is_that_of_all_logits(monkeypatch):
    monkeypatch.setattr(train.engine.step, "LOGIT_TOKENS", 40)  # of 192, so five blocks
    params, tokens = jax.tree.map(lambda p: 10 * p, make_params()), tokens_of(3)
    weights = np.random.default_rng(3).random((16, 12), np.float32)
    x = bind(MODEL, params).hidden(tokens)
    batch = {"tokens": tokens, "weights": weights}
    expected = (numpy_losses(params, tokens) * weights[:, 1:]).sum()
    # Float32 sums of some hundred terms, against float64's.
    for params_of_head in (params, {"head": params["head"]}):
        loss = head_loss(work_of("adamw"), params_of_head, x, batch)
        np.testing.assert_allclose(loss, expected, rtol=1e-6)
    total, weight = loss_sums(work_of("adamw"), params, batch)
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    np.testing.assert_allclose(weight, weights[:, 1:].sum(), rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "how"),
    [
        pytest.param("adamw", {"microbatches": 2}, marks=pytest.mark.slow),
        pytest.param("grass_jump", {"microbatches": 2}, marks=NIGHTLY),
        pytest.param("grass_jump", {"layerwise": True}, marks=NIGHTLY),
    ],
    ids=["adamw", "whole", "layerwise"],
)
def test_eight_devices_take_the_steps_of_one(name, how):
    work = work_of(name, **how)
    config = Config(batch_size=16, seq_len=12, microbatches=work.microbatches)
    start, losses = make(name)[-1], []
    for mesh in (make_mesh(config), make_mesh(config, jax.devices()[:1])):
        with jax.set_mesh(mesh):
            kinds = kinds_of_steps(work.optimizer)
            like = like_of(work, mesh)
            program = build_program(config, mesh, work, like, kinds)
            # A copy, since the step consumes the state it is given.
            copy = jax.tree.map(jnp.copy, start)
            state = jax.device_put(copy, replicated(mesh))
            for seed in range(4):
                batch = program.put({"tokens": tokens_of(seed)})
                assert len(batch["tokens"].sharding.device_set) == mesh.size
                refresh = True in kinds and refresh_due(state)
                state, metrics = program.step(state, batch, refresh)
                losses.append(float(metrics["loss"]))
    assert mesh.size == 1
    assert len(set(losses[:4])) == 4
    # The devices' sums are added in another order, and Adam's division by sqrt(V)
    # magnifies the rounding of small gradients.
    np.testing.assert_allclose(losses[:4], losses[4:], rtol=1e-5)


def test_a_batch_that_does_not_fit_the_devices_is_an_error():
    with pytest.raises(
        ValueError, match=r"batch_size=12 .* 8 devices x 2 microbatches"
    ):
        make_mesh(Config(batch_size=12, microbatches=2))


@pytest.mark.parametrize("name", ["adamw", "grass_jump"])
def test_a_step_without_a_finite_gradient_is_skipped_and_counted(name):
    # Weight decay is chained behind the method: it must not act on a skipped step.
    _, step, start = make(name)
    good, poisoned = {"tokens": tokens_of(0)}, {"tokens": tokens_of(0)}
    poisoned["tokens"][3, 5] = MODEL.vocab_size  # no such token: the logits are NaN

    refresh = name != "adamw"
    state, metrics = step(start, good, refresh=refresh)
    assert metrics["skipped"] == 0
    for count in (1, 2):
        before = state
        state, metrics = step(state, poisoned, refresh=False)
        assert not np.isfinite(metrics["loss"])
        assert same_bits(state.params, before.params)
        for moment in ("mu", "nu"):
            moments = [optax.tree.get_all_with_path(s, moment) for s in (state, before)]
            assert same_bits(*([x for _, x in found] for found in moments))
        assert metrics["skipped"] == metrics["skipped_in_a_row"] == count
        assert state.step == 1 + count
    state, metrics = step(state, good, refresh=False)
    assert (metrics["skipped"], metrics["skipped_in_a_row"]) == (2, 0)
    assert np.isfinite(metrics["loss"])
    assert not same_bits(state.params, before.params)


def test_too_many_skipped_steps_in_a_row_stop_the_run():
    record = {"step": 40, "skipped_in_a_row": 19}
    check_finite(record, 20, None)
    with pytest.raises(FloatingPointError, match=r"step 40: 20 steps .*\(no checkp"):
        check_finite({**record, "skipped_in_a_row": 20}, 20, None)
    with pytest.raises(FloatingPointError, match=r"--init-from FOLDER@20"):
        check_finite({**record, "skipped_in_a_row": 20}, 20, 20)


def test_metrics_are_those_of_the_step():
    optimizer, step, state = make("grass_jump")
    refreshes, waits = [], []
    for seed in range(7):
        batch = {"tokens": tokens_of(seed)}
        expected = optimizer.schedule(seed)
        before = state.params
        state, metrics = step(state, batch, refresh=refresh_due(state))
        assert float(metrics["learning_rate"]) == pytest.approx(float(expected))
        refreshes.append(int(metrics["refreshes"]))
        waits.append(int(state.until_refresh))
    assert refreshes == [1, 1, 1, 2, 2, 2, 3]
    assert waits == [2, 1, 0, 2, 1, 0, 2]
    assert metrics.keys() == {
        *("loss", "grad_norm", "learning_rate", "refreshes"),
        *("skipped", "skipped_in_a_row"),
    }
    loss, gradient = gradient_in_parts(before, batch, 1)
    # The norm is that before clipping. Another program: other fusions, other rounding.
    assert float(metrics["grad_norm"]) == pytest.approx(norm(gradient), rel=1e-5)
    assert float(metrics["loss"]) == pytest.approx(float(loss), rel=1e-6)
