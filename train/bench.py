"""What an update costs beside AdamW's: `python -m train.bench --size 1b --rank 512`.

Times optimizer update and weight step alone, jitted and donated, on random gradients of
a LLaMA's shapes, for every optimizer in one process: milliseconds a step, as a ratio to
`optax.adamw`'s, and the seconds of one refresh of all bases. Run it on an accelerator.
"""

import dataclasses
import functools
import json
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import optax

import lowrank_optax as lro
from models import SIZES, init_params
from train.compare import named
from train.config import OptimizerConfig, Size, parse
from train.optimizer import make_method

NEVER = 2**30


@dataclasses.dataclass(frozen=True)
class BenchConfig:
    """What is timed.

    Attributes:
      size: the LLaMA whose weights' shapes are taken, all layers.
      rank: dimension of the subspaces.
      precision: of the products with the basis: JAX's default for the device, highest,
        or a dot algorithm that it knows, such as BF16_BF16_F32 (bfloat16 operands,
        float32 sums).
      optimizers: which; galore+sara is GaLore with SARA's basis.
      steps: steps in a timing; the median of three timings counts.
      skip_refreshes: leave out the timing of a refresh (with an SVD it can take long).
      out: file to append the results to, one JSON line each.
    """

    size: Size = "tiny"
    rank: int = 32
    precision: str = "default"
    optimizers: tuple[str, ...] = (
        "galore",
        "galore+sara",
        "fira",
        "grass_walk",
        "grass_jump",
    )
    steps: int = 20
    skip_refreshes: bool = False
    out: Path | None = None

    def __post_init__(self) -> None:
        for name in self.optimizers:
            named(name, OptimizerConfig())


def timed_steps(
    tx: optax.GradientTransformation, size: Size, steps: int, repeats: int = 3
) -> float:
    """Seconds per step of update and weight step, after compiling and one step.

    The median of `repeats` timings of `steps` steps each.
    """
    key_w, key_g = jax.random.split(jax.random.key(0))
    params = jax.jit(lambda k: init_params(SIZES[size], k))(key_w)
    grads = jax.jit(lambda k: init_params(SIZES[size], k))(key_g)

    def step(
        params: optax.Params, state: optax.OptState, grads: optax.Updates
    ) -> tuple[optax.Params, optax.OptState]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    run = jax.jit(step, donate_argnums=(0, 1))
    params, state = run(params, jax.jit(tx.init)(params), grads)
    seconds = []
    for _ in range(repeats):
        jax.block_until_ready(params)
        start = time.perf_counter()
        for _ in range(steps):
            params, state = run(params, state, grads)
        jax.block_until_ready(params)
        seconds.append((time.perf_counter() - start) / steps)
    return statistics.median(seconds)


def bench(config: BenchConfig) -> list[dict[str, Any]]:
    """One row for AdamW and one for each optimizer."""
    llama = SIZES[config.size]
    shapes = jax.eval_shape(lambda k: init_params(llama, k), jax.random.key(0))
    adamw = timed_steps(optax.adamw(1e-3), config.size, config.steps)
    rows = [{"optimizer": "adamw", "update_ms": adamw * 1e3, "ratio": 1.0}]
    precision = None if config.precision == "default" else config.precision
    for name in config.optimizers:
        optimizer = named(name, OptimizerConfig())
        build = functools.partial(
            make_method,
            name=optimizer.name,
            learning_rate=1e-3,
            basis=optimizer.basis,
            key=0,
            rank=config.rank,
            switch_step=0,
            precision=precision,
        )
        tx = build(refresh_every=NEVER)
        seconds = timed_steps(tx, config.size, config.steps)
        row = {
            "optimizer": name,
            "update_ms": seconds * 1e3,
            "ratio": seconds / adamw,
            "state_share": lro.memory_report(tx, shapes).ratio,
        }
        if not config.skip_refreshes:
            refreshing = build(refresh_every=1)
            row["refresh_s"] = timed_steps(refreshing, config.size, 2, 1) - seconds
        rows.append(row)
        print(row, flush=True)
    return rows


def main() -> None:
    config = parse(BenchConfig, __doc__ or "", None, "python -m train.bench")
    device = jax.devices()[0].device_kind
    print(f"LLaMA-{config.size}, rank {config.rank}, {config.precision}, {device}")
    rows = bench(config)
    print("\n| optimizer | update, ms | of AdamW's | state | refresh, s |")
    print("|---|---|---|---|---|")
    for row in rows:
        share = f"{row.get('state_share', 1.0):.0%}"
        refresh = f"{row['refresh_s']:.3f}" if "refresh_s" in row else "-"
        print(
            f"| {row['optimizer']} | {row['update_ms']:.2f} | {row['ratio']:.2f} "
            f"| {share} | {refresh} |"
        )
    if config.out is not None:
        settings = {"size": config.size, "rank": config.rank, "device": device}
        with config.out.open("a") as file:
            for row in rows:
                line = {**settings, "precision": config.precision, **row}
                file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
