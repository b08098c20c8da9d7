"""What a training step costs beside AdamW's: `python -m train.bench --help`."""

import dataclasses
import gc
import itertools
import json
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from models import SIZES, init_params
from train.compare import named
from train.config import (
    Config,
    ModelConfig,
    OptimizerConfig,
    Size,
    model_config,
    parse,
    resolve,
)
from train.loop import build_program, initial, kinds_of_steps
from train.memory import GIB, device_peak
from train.mesh import make_mesh
from train.optimizer import make_optimizer
from train.step import Work

DESCRIPTION = """Time and measure whole training steps on random tokens, as the trainer
compiles them, for every optimizer in one process: milliseconds of an ordinary step and
of a refresh, and the memory that the compiler counts, beside AdamW's.

Examples:
  python -m train.bench --size 60m --batch-size 128 --rank 128
  python -m train.bench --size 1b --rank 512 --layerwise off on
  python -m train.bench --size 7b --rank 1024 --compile-only
  python -m train.bench --size 1b --rank 512 --update-alone

With --update-alone only the optimizer's update and the addition to the weights are
timed, on random gradients. Run it on an accelerator."""


Layerwise = Literal["off", "on"]


@dataclasses.dataclass(frozen=True)
class BenchConfig:
    """What is measured.

    Attributes:
      size: the LLaMA.
      batch_size: windows in a step.
      seq_len: tokens in a window.
      rank: dimension of the subspaces.
      optimizers: which, after adamw; galore+sara is GaLore with SARA's basis.
      layerwise: off, on, or both in turn.
      weight_dtype: how weights are kept.
      remat: what the backward pass recomputes.
      precision: of the products with the basis, as the trainer takes it.
      steps: ordinary steps in a timing; the median of three timings counts.
      skip_refreshes: leave out the timing of a refresh (with an SVD it can take long).
      compile_only: memory alone, from the compiled programs.
      update_alone: the optimizer's update alone, no model.
      out: file to append the results to, one JSON line each.
    """

    size: Size = "tiny"
    batch_size: int = 16
    seq_len: int = 256
    rank: int = 32
    optimizers: tuple[str, ...] = ("galore", "galore+sara", "fira", "grass_jump")
    layerwise: tuple[Layerwise, ...] = ("off",)
    weight_dtype: Literal["float32", "bfloat16", "int8"] = "float32"
    remat: Literal["auto", "none", "dots", "full"] = "auto"
    precision: str = "default"
    steps: int = 20
    skip_refreshes: bool = False
    compile_only: bool = False
    update_alone: bool = False
    out: Path | None = None

    def __post_init__(self) -> None:
        for name in self.optimizers:
            named(name, OptimizerConfig())


def work_of(config: BenchConfig, name: str, layerwise: Layerwise) -> Config:
    """A run of the trainer, resolved: no clipping, a refresh every 200 steps."""
    optimizer = OptimizerConfig(
        rank=config.rank,
        refresh_every=200,
        clip_norm=None,
        precision=config.precision,
        learning_rate=1e-3,
    )
    model = ModelConfig(
        size=config.size, weight_dtype=config.weight_dtype, remat=config.remat
    )
    return resolve(
        Config(
            steps=1000,
            batch_size=config.batch_size,
            seq_len=config.seq_len,
            layerwise=layerwise,
            model=model,
            optimizer=named(name, optimizer),
        )
    )


def median_seconds(run: Callable[[], Any], steps: int, repeats: int = 3) -> float:
    """Seconds of one `run`, which hands out work and returns what to wait for."""
    result = jax.block_until_ready(run())
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(steps):
            result = run()
        jax.block_until_ready(result)
        seconds.append((time.perf_counter() - start) / steps)
    return statistics.median(seconds)


def bench_step(config: BenchConfig, name: str, layerwise: Layerwise) -> dict[str, Any]:
    """One row: times in ms, memory in GiB."""
    run = work_of(config, name, layerwise)
    mesh = make_mesh(run)
    optimizer = make_optimizer(run.optimizer, run.steps, jax.random.key(0))
    work = Work(
        model_config(run.model),
        optimizer,
        jax.random.key(1),
        weight_dtype=run.model.weight_dtype,
        layerwise=layerwise == "on",
    )
    with jax.set_mesh(mesh):
        make, like = initial(work, mesh)
        kinds = kinds_of_steps(optimizer)
        if config.compile_only:
            kinds = kinds[:1]
        program = build_program(run, mesh, work, like, kinds)
        memory = program.memory[min(program.memory)]
        row: dict[str, Any] = {
            "optimizer": name,
            "layerwise": layerwise,
            "weights": memory.weights / GIB,
            "state": memory.state / GIB,
            "gradients": memory.gradients / GIB,
            "temporaries": (memory.temporaries or 0) / GIB,
            "peak": (memory.peak or 0) / GIB,
            "compile_s": program.compile_s,
        }
        if config.compile_only:
            return row
        state = make(jax.random.key(0))
        shape = (config.batch_size, config.seq_len)
        tokens = jax.random.randint(jax.random.key(2), shape, 0, work.model.vocab_size)
        batch = {"tokens": tokens}

        def step(refresh: bool) -> Callable[[], Any]:
            def run() -> Any:
                nonlocal state
                state, metrics = program.step(state, batch, refresh)
                return metrics

            return run

        jax.block_until_ready(step(kinds[-1])())  # bases first
        row["step_ms"] = 1e3 * median_seconds(step(kinds[0]), config.steps)
        if len(kinds) > 1 and not config.skip_refreshes:
            row["refresh_ms"] = 1e3 * median_seconds(step(True), 2, 1)
        row["device_peak"] = (device_peak() or 0) / GIB
    return row


def bench_update(config: BenchConfig, name: str) -> dict[str, Any]:
    """One row of the update alone: times in ms."""
    run = work_of(config, name, "off")
    optimizer = make_optimizer(run.optimizer, run.steps, jax.random.key(0))
    tx, every = optimizer.tx, optimizer.refresh_every
    key_w, key_g = jax.random.split(jax.random.key(0))
    params, grads = (
        jax.jit(lambda k: init_params(SIZES[config.size], k))(k) for k in (key_w, key_g)
    )
    state = jax.jit(tx.init)(params)

    def step(refresh: bool) -> Callable[[], Any]:
        def update(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
            updates, state = tx.update(
                grads, state, params, refresh=refresh, accept=jnp.bool_(True)
            )
            return optax.apply_updates(params, updates), state

        compiled = jax.jit(update, donate_argnums=(0, 1))

        def run() -> Any:
            nonlocal params, state
            params, state = compiled(params, state, grads)
            return params

        return run

    row: dict[str, Any] = {"optimizer": name, "layerwise": "-"}
    if every is not None:
        refresh = step(True)
        jax.block_until_ready(refresh())
        if not config.skip_refreshes:
            row["refresh_ms"] = 1e3 * median_seconds(refresh, 2, 1)
    row["step_ms"] = 1e3 * median_seconds(step(every == 1), config.steps)
    return row


def bench(config: BenchConfig) -> list[dict[str, Any]]:
    """One row for AdamW and one for each optimizer, and for each way to take a step."""

    def one(name: str, layerwise: Layerwise) -> dict[str, Any]:
        try:
            if config.update_alone:
                row = bench_update(config, name)
            else:
                row = bench_step(config, name, layerwise)
        except jax.errors.JaxRuntimeError as error:
            reason = str(error).splitlines()[0]
            row = {"optimizer": name, "layerwise": layerwise, "error": reason}
        print(json.dumps(rounded(row)), flush=True)
        return row

    ways = config.layerwise[:1] if config.update_alone else config.layerwise
    cases = [*itertools.product(("adamw", *config.optimizers), ways)]
    if config.compile_only:
        with ThreadPoolExecutor(8) as pool:  # compiling holds no lock of Python's
            return [*pool.map(lambda case: one(*case), cases)]
    rows: list[dict[str, Any]] = []
    for case in cases:
        rows.append(row := one(*case))
        if "step_ms" in row and "step_ms" in rows[0]:
            row["ratio"] = row["step_ms"] / rows[0]["step_ms"]
        gc.collect()
        jax.clear_caches()
    return rows


def rounded(row: dict[str, Any]) -> dict[str, Any]:
    return {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown; memory in GiB."""
    columns = {
        "optimizer": "optimizer",
        "layerwise": "layer by layer",
        "step_ms": "step, ms",
        "ratio": "of AdamW's",
        "refresh_ms": "refresh, ms",
        "weights": "weights",
        "state": "state",
        "gradients": "gradients",
        "temporaries": "all of the step alone",
        "peak": "peak, GiB",
    }
    shown = {k: title for k, title in columns.items() if any(k in row for row in rows)}

    def cell(row: dict[str, Any], key: str) -> str:
        value = row.get(key, "-")
        return f"{value:.2f}" if isinstance(value, float) else str(value)

    lines = [" | ".join(shown.values()), "|".join("---" for _ in shown)]
    lines += [" | ".join(cell(row, key) for key in shown) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


def main() -> None:
    config = parse(BenchConfig, DESCRIPTION, None, "python -m train.bench")
    device = jax.devices()[0].device_kind
    print(f"LLaMA-{config.size}, {config.batch_size} x {config.seq_len}, {device}")
    rows = bench(config)
    print("\n" + table(rows))
    if config.out is not None:
        settings = json.loads(json.dumps(dataclasses.asdict(config), default=str))
        with config.out.open("a") as file:
            for row in rows:
                line = {**settings, "device": device, **rounded(row)}
                file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
