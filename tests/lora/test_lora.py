"""LoRA as a baseline: what it computes, what it trains, and beside the trainer's."""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from models import (
    LlamaConfig,
    bind,
    forward,
    init_params,
    load_pretrained,
    save_pretrained,
)
from tests.lora.adapters import adapt
from tests.lora.compare import LoraConfig, host_weights, main, prepared, run_of
from tests.lora.table import table
from train.config.config import model_config
from train.config.named import Shared
from train.data.dataset import DataConfig
from train.engine.mesh import make_mesh
from train.run.first_state import initial
from train.run.loop import build_program, kinds_of_steps, work_of

# Grouped heads, and an MLP whose width is padded (27 to 32).
SHAPE = LlamaConfig(
    64,
    16,
    27,
    num_heads=4,
    num_kv_heads=2,
    num_layers=2,
    max_positions=32,
    compute_dtype="float32",
)
RANK, ALPHA = 3, 12.0


def adapted(remat: Any = "none") -> Any:
    config = dataclasses.replace(SHAPE, remat=remat)
    params = init_params(SHAPE, jax.random.key(0))
    return adapt(bind(config, params), RANK, ALPHA, jax.random.key(1))


def with_outputs(model: Any) -> Any:
    """B drawn too, so that the adapters do something; normal(0, 0.1)."""
    lora = nnx.state(model, nnx.LoRAParam)
    drawn = [
        0.1 * jax.random.normal(jax.random.key(i), x.shape) if not x.any() else x
        for i, x in enumerate(jax.tree.leaves(lora))
    ]
    nnx.update(model, jax.tree.unflatten(jax.tree.structure(lora), drawn))
    return model


TOKENS = jax.random.randint(jax.random.key(2), (2, 8), 0, 64)


def test_adapters_change_nothing_at_the_start() -> None:
    base = forward(SHAPE, init_params(SHAPE, jax.random.key(0)), TOKENS)
    np.testing.assert_array_equal(adapted()(TOKENS), base)


def test_they_add_their_product_to_each_kernel() -> None:
    model, params = with_outputs(adapted()), init_params(SHAPE, jax.random.key(0))
    count = 0
    for part in ("attention", "mlp"):
        for name, kernel in params["layers"][part].items():
            lora = getattr(getattr(model.layers, part), name).lora
            product = jnp.einsum("lir,lro->lio", lora.lora_a[...], lora.lora_b[...])
            kernel["kernel"] += ALPHA / RANK * product
            count += 1
    assert count == 7
    # float32; x A B here, x (A B) there: some roundings of numbers around 1.
    np.testing.assert_allclose(
        model(TOKENS), forward(SHAPE, params, TOKENS), atol=2e-5, rtol=1e-4
    )


def test_the_gradient_does_not_depend_on_what_is_recomputed() -> None:
    def gradient(remat: str) -> Any:
        model = with_outputs(adapted(remat))
        graph, lora, rest = nnx.split(model, nnx.LoRAParam, ...)

        def loss(lora: Any) -> jax.Array:
            return jnp.mean(nnx.merge(graph, lora, rest)(TOKENS) ** 2)

        return jax.tree.leaves(jax.jit(jax.grad(loss))(lora))

    stored, recomputed = gradient("none"), gradient("dots")
    assert len(stored) == 14
    for x, y in zip(stored, recomputed, strict=True):
        assert np.abs(x).max() > 0
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-8)  # float32's rounding


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Published weights, and a text in which each token follows from the last."""
    folder = tmp_path_factory.mktemp("lora")
    # As of a trained model, the head is not small: adapters alone get nowhere with it.
    params = init_params(SHAPE, jax.random.key(0))
    params["head"]["kernel"] *= 20
    save_pretrained(folder / "base", SHAPE, params)
    params["embed"]["embedding"] = params.pop("head")["kernel"].T
    save_pretrained(
        folder / "tied", dataclasses.replace(SHAPE, tie_embeddings=True), params
    )
    tokens = np.cumsum(np.random.default_rng(0).integers(1, 3, 20_000)) % 8
    tokens.astype("<u2").tofile(folder / "text.u16")
    return folder


def config_of(
    folder: Path, method: str, steps: int, base: str = "base", **given: Any
) -> LoraConfig:
    every = 3 if method.startswith("galore") else None
    return LoraConfig(
        init_from=f"hf:{folder / base}",
        methods=(method,),
        steps=steps,
        alpha=ALPHA,
        batch_size=8,
        seq_len=16,
        optimizer=Shared(rank=RANK, refresh_every=every),
        data=DataConfig(source=str(folder / "text.u16")),
        **given,
    )


def batches_of(config: LoraConfig, count: int) -> list[Any]:
    tokens = np.fromfile(config.data.source, "<u2").astype(np.int32)
    return [{"tokens": x} for x in tokens[: count * 128].reshape(count, 8, 16)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("base", "dtype"), [("base", "float32"), ("base", "bfloat16"), ("tied", "float32")]
)
def test_only_adapters_are_trained_and_they_lower_the_loss(
    folder: Path, base: str, dtype: Any
) -> None:
    config = config_of(folder, "lora@3e-2", 40, base, weight_dtype=dtype)
    run = run_of(config, "lora@3e-2")
    mesh = make_mesh(run, jax.devices()[:1])
    method = prepared(config, mesh, host_weights(run, mesh), "lora@3e-2")
    begin = method.start(0, 3e-2)
    before = jax.device_get(begin.frozen)
    state, losses = begin, []
    with jax.set_mesh(mesh):
        for batch in batches_of(config, 40):
            state, metrics = method.program.step(
                state, method.program.put(batch), False
            )
            losses.append(float(metrics["loss"]))
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(state.frozen))
    assert {x.dtype.name for x in jax.tree.leaves(before)} == {dtype}
    trained = jax.tree.leaves(state.lora)
    assert {x.dtype.name for x in trained} == {"float32"}
    assert all(np.abs(x).max() > 0 for x in trained)
    # A and B of 2 layers: q and o (16, 16), k and v (16, 8), three of the MLP (16, 27).
    numbers = 2 * RANK * (2 * (16 + 16) + 2 * (16 + 8) + 3 * (16 + 27))
    assert method.trained == sum(x.size for x in trained) == numbers
    tokens = batches_of(config, 1)[0]["tokens"]
    weights = load_pretrained(folder / base, dtype=dtype)
    logits = forward(model_config(run.model), weights, tokens)[:, :-1]
    first = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    np.testing.assert_allclose(losses[0], first.mean(), rtol=1e-5)  # float32
    assert np.mean(losses[-5:]) < losses[0] - 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw@1e-2", "galore@1e-2"])
def test_a_rate_in_the_state_is_that_of_the_trainer(folder: Path, name: str) -> None:
    config = config_of(folder, name, steps=6)
    run = run_of(config, name)
    mesh = make_mesh(run, jax.devices()[:1])
    weights = host_weights(run, mesh)
    method = prepared(config, mesh, weights, name)
    work = work_of(run, jax.random.key(0))
    with jax.set_mesh(mesh):
        make, like = initial(work, mesh, lambda _: jax.device_put(weights))
        theirs = build_program(run, mesh, work, like, kinds_of_steps(work.optimizer))
        ours, own = make(jax.random.key(0)), method.start(0, 1e-2)
        for i, batch in enumerate(batches_of(config, 6)):
            refresh = theirs.refresh_every is not None and i % 3 == 0
            ours, _ = theirs.step(ours, theirs.put(batch), refresh)
            own, _ = method.program.step(own, method.program.put(batch), refresh)
    for x, y, begin in zip(
        *map(jax.tree.leaves, (ours.params, own.params, weights)), strict=True
    ):
        assert np.abs(np.asarray(x) - begin).max() > 1e-3
        # The rate is multiplied later: some roundings of steps of 1e-2.
        np.testing.assert_allclose(x, y, atol=1e-5)


@pytest.mark.slow
def test_the_command_prints_one_table(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = folder / "results.jsonl"
    names = ["lora@3e-4", "lora@3e-2", "galore@1e-2"]
    argv = f"--init-from hf:{folder / 'base'} --source {folder / 'text.u16'}"
    argv += f" --steps 6 --batch-size 8 --seq-len 16 --rank 3 --out {out} --seeds 0 1"
    main([*argv.split(), "--refresh-every", "3", "--methods", *names])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    rates = ("lora", 3e-4), ("lora", 3e-2), ("galore", 1e-2)
    assert {((row["method"], row["rate"]), row["seed"]) for row in rows} == {
        *itertools.product(rates, (0, 1))
    }
    for row in rows:
        assert 0 < row["eval_loss"] < 10
        assert row["peak"] > row["weights"] > 0
        assert row["step_ms"] > 0
    printed = capsys.readouterr().out
    assert printed.count("| lora |") == 2
    assert printed.count(" ± ") == len(names)


def test_a_table_has_the_mean_of_the_seeds_and_the_best_rate_in_bold() -> None:
    shared = {"trained": 1234, "state": 0.5, "peak": 1500.0, "step_ms": 2.0}
    rows = [
        {"method": "lora", "rate": rate, "seed": seed, "eval_loss": loss, **shared}
        for rate, seed, loss in ((1e-3, 0, 2.0), (1e-3, 1, 2.2), (1e-2, 0, 3.0))
    ]
    rows += [{"method": "adamw", "rate": 1e-3, "seed": 0, "error": "nan", **shared}]
    lines = table(rows).splitlines()
    assert (
        lines[2] == "| lora | 0.001 | **2.100 ± 0.100** | 1,234 | 0.5 | 1,500.0 | 2.0 |"
    )
    assert "| 0.01 | 3.000 |" in lines[3]
    assert "| adamw | 0.001 | failed |" in lines[4]


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        (("lora",), "no rate of its own"),
        (("lorra@1e-3",), "NAME"),
        (("lora@fast",), "no number"),
        ((), "name at least one"),
    ],
)
def test_methods_that_are_none_are_refused(
    methods: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        LoraConfig(init_from="hf:base", methods=methods)
    with pytest.raises(ValueError, match="whole number"):
        LoraConfig("hf:base", ("lora@1e-3",), optimizer=Shared(rank=0.25))
