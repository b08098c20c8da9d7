"""Runs layer by layer, with small weights, stopped and skipped, and their refreshes."""

import dataclasses
import json
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import train.engine.step
import train.run.loop
from models import SIZES, LlamaConfig, generate
from tests.helpers.marks import NIGHTLY, slow_but
from train.config.config import (
    Config,
    ModelConfig,
    OptimizerConfig,
    ReportConfig,
    to_json,
)
from train.config.resolve import resolve
from train.data.dataset import Data
from train.engine.memory import describe
from train.engine.mesh import make_mesh
from train.engine.optimizer import check_optimizer, make_optimizer
from train.engine.step import (
    Work,
    added,
    init_state,
    init_weights,
    loss_sums,
    train_step,
)
from train.records.metrics import read_metrics
from train.run.checkpoint import Restored
from train.run.first_state import initial
from train.run.loop import Outputs, Trained, fit, kinds_of_steps
from train.run.report import sample_text

VOCABULARY, LAYERS, T = 64, 3, 4
MODEL = LlamaConfig(VOCABULARY, 16, 24, num_heads=2, num_layers=LAYERS)


def config_of(name: str, dtype: str = "float32", layerwise: str = "on", **fields):
    """A resolved run of the model above: 14 steps, a refresh at every fourth."""
    return resolve(
        Config(
            **{"steps": 14, "batch_size": 8, "seq_len": 12, **fields},
            layerwise=layerwise,
            model=ModelConfig(size="micro", weight_dtype=dtype),
            optimizer=OptimizerConfig(
                name=name,
                rank=4,
                refresh_every=T,
                learning_rate=1e-2,
                weight_decay=0.1,
                clip_norm=None,
            ),
            report=ReportConfig(log_every=1, eval_every=0, checkpoint_every=5),
        )
    )


def batches_of(steps: int, poisoned: int | None = None) -> list[dict[str, np.ndarray]]:
    """Some tokens are much more frequent than others, which is soon learnt."""
    rng = np.random.default_rng(0)
    tokens = rng.geometric(0.2, (steps, 8, 12)).clip(max=VOCABULARY - 1)
    if poisoned is not None:
        tokens[poisoned, 3, 5] = VOCABULARY  # no such token: its logits are NaN
    return [{"tokens": x.astype(np.int32)} for x in tokens]


def data_of(batches: list[dict[str, np.ndarray]], tokenizer: Any = None) -> Data:
    stream = grain.MapDataset.source(batches).to_iter_dataset()
    return Data(stream, batches_of(2), tokenizer, VOCABULARY, {})  # pyright: ignore


MESH = make_mesh(Config(), jax.devices()[:1])
build_program = train.run.loop.build_program
PROGRAMS: dict[Config, Any] = {}


@pytest.fixture(autouse=True)
def asked(monkeypatch) -> list[tuple[bool, int]]:
    """Of each step, whether it was asked to refresh, and what is left to the next.

    Runs of one configuration share one program: compiling takes most of their time.
    """
    monkeypatch.setitem(SIZES, "micro", MODEL)
    steps = []

    def build(config: Config, mesh: Any, work: Work, like: Any, *others: Any) -> Any:
        key = dataclasses.replace(config, out=None, resume=False)
        if key not in PROGRAMS:
            PROGRAMS[key] = build_program(config, mesh, work, like, *others)
        program = PROGRAMS[key]

        def step(state: Any, batch: Any, refresh: bool) -> Any:
            state, metrics = program.step(state, batch, refresh)
            steps.append((refresh, int(state.until_refresh)))
            return state, metrics

        return program._replace(step=step)

    monkeypatch.setattr(train.run.loop, "build_program", build)
    return steps


def run(config: Config, folder: Path, data: Data) -> Trained:
    return train.run.loop.train(dataclasses.replace(config, out=folder), data, MESH)


def run_in_parts(*parts: Config, folder: Path, stops: tuple[int, ...], **how) -> Any:
    """Each part dies when it has no more batches, and the next one resumes it."""
    for config, stop in zip(parts, stops, strict=False):
        with pytest.raises(StopIteration):
            run(config, folder, data_of(batches_of(14, **how)[:stop]))
    return run(parts[-1], folder, data_of(batches_of(14, **how)))


def records(folder: Path) -> list[dict[str, Any]]:
    times = {"ms_per_step", "tokens_per_s"}
    return [
        {k: v for k, v in record.items() if k not in times}
        for record in read_metrics(folder)
    ]


def bits(tree: Any) -> dict[str, bytes]:
    """Every leaf's, by path."""

    def of(x: jax.Array) -> bytes:
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(x) if is_key else x).tobytes()

    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): of(x) for path, x in leaves}


def arrays_bytes(tree: Any) -> int:
    return sum(map(len, bits(tree).values()))


@pytest.mark.parametrize(
    "name",
    slow_but([], ["adamw", "grass_jump", "galore_adam8bit"], slow=["adamw"]),
)
def test_a_step_may_be_taken_layer_by_layer_and_changed_when_resumed(
    name, tmp_path, asked
):
    off, on = (config_of(name, layerwise=how) for how in ("off", "on"))
    folders = [tmp_path / part for part in ("off", "on", "changed")]
    whole = run(off, folders[0], data_of(batches_of(14)))
    layerwise = run(on, folders[1], data_of(batches_of(14)))
    # From step 5 on as a whole, from step 10 on layer by layer again.
    changed = run_in_parts(on, off, on, folder=folders[2], stops=(7, 12))
    curves = [records(folder) for folder in folders]
    assert [len(curve) for curve in curves] == [14] * 3
    for curve in curves[1:]:
        for record, expected in zip(curve, curves[0], strict=True):
            assert record.keys() == expected.keys()
            for key, value in record.items():
                # The same sums in other programs; Adam's division by sqrt(V) magnifies
                # the rounding of small gradients.
                assert value == pytest.approx(expected[key], rel=1e-4), key
    assert curves[0][-1]["refreshes"] == (0 if name == "adamw" else 4)
    shapes = [jax.tree.map(jax.typeof, x.state) for x in (whole, layerwise, changed)]
    assert shapes[0] == shapes[1] == shapes[2]
    if name == "grass_jump":  # its bases are drawn by a key
        asked.clear()
        check_a_stopped_run(on, tmp_path, asked)


@pytest.mark.parametrize("dtype", slow_but([], ["bfloat16", "int8"], slow=["int8"]))
def test_weights_of_few_bits_train_and_resume_bit_for_bit(dtype, tmp_path, asked):
    config = config_of("galore_adam8bit", dtype)
    trained = check_a_stopped_run(config, tmp_path, asked)
    last = records(tmp_path / "whole")[-1]
    check_small_weights(config, trained, last["eval_loss"])
    check_memory(trained)


def check_a_stopped_run(
    config: Config, tmp_path: Path, asked: list[tuple[bool, int]]
) -> Trained:
    """Bit for bit the run that was never stopped.

    The fifth step, a refresh, is skipped; the sixth refreshes in its place. The first
    checkpoint is between the two, the second one between refreshes.
    """
    whole = run(config, tmp_path / "whole", data_of(batches_of(14, poisoned=4)))
    taken = asked.copy()
    assert [refresh for refresh, _ in taken] == [
        *(True, False, False, False, True),
        *(True, False, False, False, True, False, False, False, True),
    ]
    left = [3, 2, 1, 0, 0, 3, 2, 1, 0, 3, 2, 1, 0, 3]
    assert [until for _, until in taken] == left
    assert [r["skipped"] for r in records(tmp_path / "whole")] == [0] * 4 + [1] * 10
    refreshes = [r["refreshes"] for r in records(tmp_path / "whole")]
    assert refreshes == [1] * 5 + [2] * 4 + [3] * 4 + [4]

    asked.clear()
    again = run_in_parts(
        *(config, config, config), folder=tmp_path / "parts", stops=(6, 12), poisoned=4
    )
    first, second, third = asked[:6], asked[6:13], asked[13:]
    assert [*first[:5], *second[:5], *third] == taken
    assert first[5] == second[0]
    assert second[5:] == third[:2]
    expected, found = bits(whole.state), bits(again.state)
    assert [path for path in expected if expected[path] != found.get(path)] == []
    assert len(expected) == len(found)
    assert records(tmp_path / "parts") == records(tmp_path / "whole")

    losses = [r["loss"] for r in records(tmp_path / "whole")]
    assert losses.pop(4) is None
    assert losses[-1] < losses[0] - 0.3
    return whole


@pytest.mark.parametrize(
    ("name", "layerwise"),
    [
        ("galore", "on"),
        pytest.param("galore", "off", marks=pytest.mark.slow),
        pytest.param("grass_walk", "off", marks=NIGHTLY),
        pytest.param("grass_walk", "on", marks=NIGHTLY),
    ],
)
def test_staggered_refreshes_resume_bit_for_bit(name, layerwise, tmp_path, asked):
    """All bases at the first step, then some at each; a skipped step's come again."""
    config = config_of(name, layerwise=layerwise, steps=10)
    optimizer = dataclasses.replace(config.optimizer, stagger=True)
    config = dataclasses.replace(config, optimizer=optimizer)
    whole = run(config, tmp_path / "whole", data_of(batches_of(14, poisoned=4)))
    assert [refresh for refresh, _ in asked] == [True] + [False] * 9
    again = run_in_parts(
        *(config, config), folder=tmp_path / "parts", stops=(6,), poisoned=4
    )
    assert bits(again.state) == bits(whole.state)
    assert records(tmp_path / "parts") == records(tmp_path / "whole")
    intervals = [r["refreshes"] for r in records(tmp_path / "whole")]
    assert intervals == [1] * 5 + [2] * 4 + [3]
    assert int(whole.state.skipped_in_a_row) == 0


def check_small_weights(config: Config, trained: Trained, eval_loss: float) -> None:
    model, weights = trained.work.model, trained.weights
    in_float32 = jax.eval_shape(
        partial(init_weights, trained.work._replace(weight_dtype="float32")),
        jax.random.key(0),
    )
    assert jax.tree.map(jnp.shape, weights) == jax.tree.map(jnp.shape, in_float32)
    memory = min(trained.program.memory.items())[1]
    full = sum(4 * x.size for x in jax.tree.leaves(in_float32))
    assert memory.weights <= full / 2
    dtypes = {x.dtype.name for x in jax.tree.leaves(trained.state.params)}
    # What evaluates and samples has dense weights, whatever the state keeps.
    if config.model.weight_dtype == "int8":
        assert memory.weights < full / 2
        assert dtypes == {"bfloat16", "int8", "float32"}  # of the blocks' scales
        kernel = weights["layers"]["mlp"]["up"]["kernel"]
        stored = trained.state.params["layers"]["mlp"]["up"]["kernel"]
        np.testing.assert_array_equal(kernel, stored.dequantize())
    else:
        assert dtypes == {"bfloat16"}
    work = trained.work._replace(model=model)
    sums = [loss_sums(work, weights, batch) for batch in batches_of(2)]
    loss = sum(float(x) for x, _ in sums) / sum(float(w) for _, w in sums)
    assert eval_loss == pytest.approx(loss, rel=1e-5)

    tokenizer = SimpleNamespace(
        encode=lambda text: [*map(int, text.split())],
        decode=lambda tokens: " ".join(map(str, tokens)),
        eos_id=0,
    )
    report = dataclasses.replace(config.report, prompt="3 1 2", sample_tokens=4)
    config = dataclasses.replace(config, report=report)
    text = sample_text(config, data_of(batches_of(1), tokenizer), trained)
    prompt, key = jnp.array([[3, 1, 2]]), jax.random.key(config.seed)
    expected = generate(
        model, weights, prompt, steps=4, key=key, temperature=0.8, end=0
    )
    assert text == " ".join(map(str, expected[0].tolist()))
    assert text.startswith("3 1 2 ")


def check_memory(trained: Trained) -> None:
    """What the compiler counts, beside what the arrays have."""
    assert [*trained.program.memory] == [False, True]
    for memory in trained.program.memory.values():
        assert memory.weights == arrays_bytes(trained.state.params)
        assert memory.state == arrays_bytes(trained.state.opt_state)
        rest = {**trained.weights, "layers": None}
        a_layer = arrays_bytes(trained.weights["layers"]) // LAYERS
        assert memory.gradients == arrays_bytes(rest) + a_layer
        assert memory.temporaries is not None
        assert memory.peak is not None
        kept = memory.weights + memory.state
        batch = 4 * 8 * 12
        assert memory.peak >= kept + memory.temporaries + batch
        assert memory.temporaries >= a_layer
    assert trained.program.step_bytes == trained.program.memory[False].peak
    adamw = trained.program.adamw
    assert adamw is not None
    assert adamw.weights == arrays_bytes(trained.state.params)
    assert adamw.gradients == arrays_bytes(trained.weights)
    assert adamw.state > 2 * adamw.gradients


@pytest.mark.slow
def test_adamws_step_is_compiled_beside_where_it_costs_nothing(monkeypatch):
    config = config_of("galore", layerwise="off")
    optimizer = make_optimizer(config.optimizer, config.steps, jax.random.key(0))
    model = dataclasses.replace(MODEL, compute_dtype="float32")
    work = Work(model, optimizer, jax.random.key(1))
    like, adamw = initial(work, MESH)[1], train.run.loop.adamw_work(config, work)
    monkeypatch.setattr(train.run.loop.jax, "default_backend", lambda: "gpu")
    program = build_program(config, MESH, work, like, [False], adamw)
    ours, theirs = program.memory[False], program.adamw
    assert [*program.memory] == [False]
    assert theirs is not None
    assert None not in theirs
    assert theirs.peak > theirs.weights + theirs.state + theirs.gradients
    lines = describe(program.memory, theirs).splitlines()
    assert [line[:15].strip() for line in lines[1:3]] == ["ordinary", "adamw, ordinary"]
    assert lines[2].split()[-1] == f"{theirs.peak / 2**20:,.1f}"
    assert theirs.weights == ours.weights
    adamw = dataclasses.replace(config.optimizer, name="adamw")
    assert (
        train.run.loop.adamw_work(dataclasses.replace(config, optimizer=adamw), work)
        is None
    )


class Waits:
    """The number of steps to the next refresh; counts how often the host asks."""

    asked = 0

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def __int__(self) -> int:
        Waits.asked += 1
        return self.steps


@pytest.mark.parametrize(
    ("every", "expected", "asked_for"),
    [(None, [], 1), (1, [*range(9)], 1), (4, [0, 4, 5], 4), (2**31 - 1, [0], 2)],
)
def test_the_host_asks_for_a_refresh_when_it_is_due(every, expected, asked_for):
    refreshes, taken = [], iter(range(9))

    def step(state: Any, batch: Any, refresh: bool) -> Any:
        number, until = next(taken), state.until_refresh.steps - 1
        if refresh:
            refreshes.append(number)
            until = 0 if number == 4 else every - 1  # step 4 is refused
        metrics = {"loss": np.float32(1), "skipped_in_a_row": np.int32(0)}
        return SimpleNamespace(until_refresh=Waits(until), params=None), metrics

    program = SimpleNamespace(
        step=step,
        put=lambda batch: batch,
        loss_sums=lambda params, batch: (1.0, 1.0),
        refresh_every=every,
    )
    report = ReportConfig(log_every=3, eval_every=0, checkpoint_every=0)
    Waits.asked = 0
    start = SimpleNamespace(step=0, until_refresh=Waits(0), params=None)
    ignore = lambda *_: None  # noqa: E731
    progress = SimpleNamespace(record=ignore, step=ignore)
    stop = SimpleNamespace(reached=ignore)
    around = Outputs(
        SimpleNamespace(write=ignore),
        SimpleNamespace(healthy=None, preserve=ignore, check_place=ignore),
        progress,
        stop,
    )  # pyright: ignore
    fit(
        Config(steps=9, report=report),
        program,  # pyright: ignore
        Restored(start, []),  # pyright: ignore
        iter([{}] * 9),  # pyright: ignore
        [{}],
        around,  # pyright: ignore
    )
    assert refreshes == expected
    # At the start, and at refreshes between which there are other steps.
    assert Waits.asked == asked_for


def with_an_overflow(state: Any, layer: int) -> Any:
    """One layer's gradient, and no other, has no finite sum of squares.

    Its values are huge times zero, so that the attention says nothing either way; the
    gradient of the zero is huge.
    """
    layers = state.params["layers"]
    norm = {"scale": layers["attention_norm"]["scale"].at[layer].set(0)}
    v = {"kernel": layers["attention"]["v"]["kernel"].at[layer].set(1e30)}
    attention = {**layers["attention"], "v": v}
    layers = {**layers, "attention_norm": norm, "attention": attention}
    return state._replace(params={**state.params, "layers": layers})


def nan_in_backward(run_layer: Any) -> Any:
    """A layer with the mark in it gets a NaN in the gradient of one weight."""

    @jax.custom_vjp
    def poison(scale: jax.Array) -> jax.Array:
        return scale

    def backward(scale: jax.Array, g: jax.Array) -> tuple[jax.Array]:
        return (jnp.where(scale[0] == 2, jnp.nan, g),)

    poison.defvjp(lambda scale: (scale, scale), backward)

    def run(config: Any, layer: Any, x: jax.Array, gather: Any) -> jax.Array:
        scale = poison(layer["mlp_norm"]["scale"])
        return run_layer(config, {**layer, "mlp_norm": {"scale": scale}}, x, gather)

    return run


def with_the_mark(state: Any, layer: int) -> Any:
    scale = state.params["layers"]["mlp_norm"]["scale"].at[layer, 0].set(2)
    layers = {**state.params["layers"], "mlp_norm": {"scale": scale}}
    return state._replace(params={**state.params, "layers": layers})


@pytest.mark.parametrize(
    ("name", "how", "clip_norm", "damage"),
    [
        pytest.param("adamw", "on", 1.0, "overflow", marks=NIGHTLY),
        pytest.param("adamw", "off", 1.0, "overflow", marks=pytest.mark.slow),
        ("galore_adam8bit", "on", 1.0, "nan"),
    ],
)
def test_a_layer_is_skipped_by_itself(name, how, clip_norm, damage, monkeypatch):
    config = config_of(name, layerwise=how)
    clipped = dataclasses.replace(config.optimizer, clip_norm=clip_norm)
    optimizer = make_optimizer(clipped, config.steps, jax.random.key(0))
    model = dataclasses.replace(MODEL, compute_dtype="float32")
    work = Work(model, optimizer, jax.random.key(1), layerwise=how == "on")
    make, _ = initial(work, MESH)
    state = make(jax.random.key(0))
    harm = with_an_overflow if damage == "overflow" else with_the_mark
    if damage == "nan":
        monkeypatch.setattr(
            train.engine.step, "run_layer", nan_in_backward(train.engine.step.run_layer)
        )
    refresh = name != "adamw"
    step = jax.jit(partial(train_step, work, refresh=refresh))
    batch = batches_of(1)[0]
    before = harm(state, 1)
    for count in (1, 2):
        after, metrics = step(before, batch)
        assert np.isfinite(metrics["loss"])
        assert not np.isfinite(metrics["grad_norm"])
        assert metrics["skipped"] == metrics["skipped_in_a_row"] == count
        if refresh:
            assert after.until_refresh == 0  # it is due again

        def moved(a: Any, b: Any) -> list[bool]:
            pairs = zip(bits(a).values(), bits(b).values(), strict=True)
            return [x != y for x, y in pairs]

        def layer(state: Any, i: int) -> Any:
            return jax.tree.map(lambda x: x[i], state.params["layers"])

        for i in range(LAYERS):
            skipped = how == "off" or i == 1
            assert any(moved(layer(after, i), layer(before, i))) != skipped
        rest = [{**s.params, "layers": None} for s in (after, before)]
        assert any(moved(*rest)) == (how == "on")
        steps = optax.tree.get_all_with_path(after.opt_state.layers, "count")
        for _, taken in steps:
            ends = (0, 0, 0) if how == "off" else (count, 0, count)
            np.testing.assert_array_equal(taken, ends)
        before = after


@pytest.mark.parametrize("clip_norm", slow_but([], [None, 1e-3], slow=[None]))
def test_microbatches_are_summed_in_the_subspace(clip_norm):
    """The steps of whole gradients, if the first microbatch decides where they go."""
    config = config_of("golore", microbatches=2)  # random from its switch on: at once
    optimizer = dataclasses.replace(config.optimizer, switch=0.0, clip_norm=clip_norm)
    optimizer = make_optimizer(optimizer, config.steps, jax.random.key(0))
    model = dataclasses.replace(MODEL, compute_dtype="float32")
    works = [
        Work(model, optimizer, jax.random.key(1), microbatches=2, layerwise=layerwise)
        for layerwise in (True, False)
    ]
    states = [initial(work, MESH)[0](jax.random.key(0)) for work in works]
    start = states[0].params

    @cache
    def step(k: int, refresh: bool) -> Any:
        return jax.jit(partial(train_step, works[k], refresh=refresh))

    for i, batch in enumerate(batches_of(3)):
        norms = []
        for k in range(len(works)):
            states[k], metrics = step(k, i % 2 == 0)(states[k], batch)
            norms.append(metrics.pop("grad_norm"))
            states[k] = jax.block_until_ready(states[k])
        assert 0 < norms[0] < norms[1]  # of S^T G, and of G
        if clip_norm is not None:
            break
    ours, theirs = (state.params for state in states)
    # In float32: rounding of gradients, and what Adam's division makes of it.
    atol = 1e-4 if clip_norm is None else 1e-2  # Adam undoes the clipping but for eps
    for a, b, c in zip(*map(jax.tree.leaves, (ours, theirs, start)), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=atol * 1e-2)
        assert jnp.max(jnp.abs(a - c)) > 1e-4
    assert bits(states[0]).keys() == bits(states[1]).keys()


@pytest.mark.slow
def test_a_microbatch_that_is_not_finite_skips_the_step():
    config = config_of("galore", microbatches=2)
    optimizer = make_optimizer(config.optimizer, config.steps, jax.random.key(0))
    model = dataclasses.replace(MODEL, compute_dtype="float32")
    work = Work(model, optimizer, jax.random.key(1), microbatches=2, layerwise=True)
    state = initial(work, MESH)[0](jax.random.key(0))
    step = jax.jit(partial(train_step, work, refresh=True))
    after, metrics = step(state, batches_of(1, poisoned=0)[0])
    assert metrics["skipped"] == 1
    assert after.until_refresh == 0
    assert bits(after.params) == bits(state.params)


@pytest.mark.parametrize("name", ["grass_jump", "adamw"])
def test_microbatches_that_cannot_be_summed_in_the_subspace(name):
    config = config_of(name, microbatches=2)
    with pytest.raises(ValueError, match=f"microbatches=2 .* {name} does not allow"):
        check_optimizer(config)
    check_optimizer(config_of("galore_adam8bit", microbatches=2))
    check_optimizer(config_of(name, microbatches=2, layerwise="off"))


def test_the_rounding_goes_by_the_key_the_step_and_the_layer():
    optimizer = make_optimizer(config_of("adamw").optimizer, 14, jax.random.key(0))
    model = dataclasses.replace(MODEL, compute_dtype="float32")
    work = Work(model, optimizer, jax.random.key(0), weight_dtype="bfloat16")

    @jax.jit
    def one_step(key: jax.Array) -> Any:
        own, batch = work._replace(key=key), batches_of(1)[0]
        state = init_state(own, init_weights(own, jax.random.key(0)))
        return train_step(own, state, batch, refresh=False)[0]

    first, again, other = (one_step(jax.random.key(k)) for k in (1, 1, 2))
    assert bits(first) == bits(again)
    # The weights are others in some last bits, the optimizer's state is not.
    kernels = [s.params["layers"]["mlp"]["up"]["kernel"] for s in (first, other)]
    assert 0 < (kernels[0] != kernels[1]).mean() < 0.9
    np.testing.assert_allclose(*(np.float32(k) for k in kernels), rtol=2**-6)
    assert bits(first.opt_state) == bits(other.opt_state)

    weights = {"w": jnp.ones((40, 40), jnp.bfloat16)}
    updates = {"w": jnp.full((40, 40), 2**-9)}
    rounded = [
        added(weights, updates, layer, jax.random.key(key))["w"]
        for layer, key in ((None, 1), (0, 1), (1, 1), (0, 2))
    ]
    assert len({x.tobytes() for x in map(np.asarray, rounded)}) == 4


def test_the_key_of_the_rounding_comes_from_the_seed(monkeypatch, tmp_path):
    works = []

    def stop(config: Config, mesh: Any, work: Work, *_: Any) -> Any:
        works.append(work)
        raise KeyboardInterrupt

    monkeypatch.setattr(train.run.loop, "build_program", stop)
    for number, seed in enumerate((0, 0, 1)):
        config = config_of("galore", "int8", seed=seed)
        with pytest.raises(KeyboardInterrupt):
            run(config, tmp_path / str(number), data_of(batches_of(1)))
    assert {work.weight_dtype for work in works} == {"int8"}
    assert {work.layerwise for work in works} == {True}
    assert kinds_of_steps(works[0].optimizer) == [False, True]
    keys = [jax.random.key_data(work.key).tolist() for work in works]
    assert keys[0] == keys[1] != keys[2]
    stored = json.loads(to_json(config_of("galore", "int8", seed=0)))
    assert (stored["layerwise"], stored["model"]["weight_dtype"]) == ("on", "int8")
