"""A step on examples that share windows is the one on examples in their own windows."""

from functools import partial

import jax
import numpy as np
import pytest

from models import LlamaConfig
from train.config.config import Config, OptimizerConfig
from train.config.resolve import resolve
from train.data.example_windows import ExampleTokens, example_window, pack
from train.engine.optimizer import make_optimizer
from train.engine.step import Work, init_state, init_weights, loss_sums, train_step

MODEL = LlamaConfig(64, 16, 24, num_heads=2, num_layers=2, compute_dtype="float32")
T = 12


@pytest.fixture(scope="module")
def batches() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Eight examples in four windows, and each in a window without segments."""
    rng = np.random.default_rng(0)
    lengths = [9, 8, 7, 6, 5, 4, 3, 3]
    examples = [
        ExampleTokens(
            rng.integers(1, MODEL.vocab_size, n, dtype=np.int32), np.arange(n) >= n // 2
        )
        for n in lengths
    ]
    packed = [example_window([examples[i] for i in own], T) for own in pack(lengths, T)]
    assert len(packed) == 4
    alone = [example_window([example], T) for example in examples]
    rows, whole = (
        {name: np.stack([window[name] for window in windows]) for name in windows[0]}
        for windows in (packed, alone)
    )
    return rows, {name: whole[name] for name in ("tokens", "weights")}


def work_of(**how) -> Work:
    options = OptimizerConfig(name="galore", rank=4, refresh_every=3, clip_norm=None)
    options = resolve(Config(optimizer=options)).optimizer
    optimizer = make_optimizer(options, steps=20, key=jax.random.key(1))
    return Work(MODEL, optimizer, jax.random.key(2), **how)


def test_loss_and_gradient(batches):
    work = work_of()
    params = init_weights(work, jax.random.key(0))

    @jax.jit
    def graded(batch):
        return jax.value_and_grad(partial(loss_sums, work), has_aux=True)(params, batch)

    packed, alone = map(graded, batches)
    without = graded({name: batches[0][name] for name in ("tokens", "weights")})
    # Float32 sums in another order, as in the next test.
    np.testing.assert_allclose(packed[0], alone[0], rtol=1e-5)
    jax.tree.map(partial(np.testing.assert_allclose, atol=2e-5), packed[1], alone[1])
    assert abs(without[0][0] - alone[0][0]) > 1e-3


@pytest.mark.parametrize(
    "how",
    [{"layerwise": True}, {"layerwise": True, "microbatches": 2}],
    ids=["layer by layer", "summed in the subspace"],
)
def test_steps_that_update_in_the_backward_pass(batches, how):
    work = work_of(**how)
    step = jax.jit(partial(train_step, work, refresh=False))
    state = jax.jit(partial(init_state, work))(init_weights(work, jax.random.key(0)))
    (_, packed), (_, alone) = (step(state, batch) for batch in batches)
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(packed[name], alone[name], rtol=2e-5)
