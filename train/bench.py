"""The cost of a training step beside AdamW's: `python -m train.bench --help`."""

import dataclasses
import gc
import itertools
import json
import statistics
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, TypeVar

import jax
import tyro
from jax.sharding import Mesh

from models import LlamaConfig
from train.config.command_line import check_numbers, parse
from train.config.config import (
    Config,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    Size,
    model_config,
)
from train.config.named import named
from train.config.resolve import resolve
from train.engine.flops import flops_per_token, peak_flops
from train.engine.memory import GIB, device_peak
from train.engine.mesh import by_row, make_mesh
from train.engine.optimizer import check_meant, check_optimizer, make_optimizer
from train.engine.step import TrainState
from train.engine.timing import Steps, median_seconds, print_profile, seconds
from train.engine.update_alone import update_alone
from train.host.errors import usage_errors
from train.records.markdown import Row, append, check_out, rounded
from train.records.step_table import table
from train.run.first_state import initial
from train.run.loop import Program, build_program, kinds_of_steps, work_of

DESCRIPTION = """Time and measure whole training steps on random tokens, as the trainer
compiles them, for every optimizer in one process: milliseconds of an ordinary step, of
a refresh, and of both in the mean at the optimizer's own interval; the memory that the
compiler counts, and the device's own peak; beside AdamW's. A row with an error makes
the exit status 1.

Examples:
  python -m train.bench --size 60m --batch-size 128 --rank 128
  python -m train.bench --size 1b --rank 512 --layerwise off on
  python -m train.bench --size 7b --rank 1024 --compile-only
  python -m train.bench --size 1b --rank 512 --update-alone --profile
  python -m train.bench --size 7b --rank 1024 --batch-size 32 --fsdp 8

With --update-alone only the optimizer's update and the addition to the weights are
timed, on random gradients. --profile also prints an ordinary step and a refresh by
their kernels. The share of the peak rate counts 6 N + 6 L D T operations a token (N
numbers in the matrices of layers and head, L layers of width D, T tokens in a window,
half of which causal attention sees) against the device's dense bfloat16 rate in its
vendor's data sheet, where that is known. Run it on an accelerator."""

PROFILED_STEPS = 5

T = TypeVar("T")
Layerwise = Literal["off", "on"]


@dataclasses.dataclass(frozen=True)
class BenchConfig:
    """The steps to measure.

    Attributes:
      size: the LLaMA.
      batch_size: windows in a step.
      seq_len: tokens in a window.
      rank: dimension of the subspaces, as the trainer takes it.
      refresh_every: steps from one refresh to the next, in the mean. Default: the
        optimizer's own.
      optimizers: which, beside adamw; galore+sara is GaLore with SARA's basis.
      layerwise: off, on, or both in turn.
      weight_dtype: how weights are stored.
      basis_dtype: dtype of a basis that an optimizer's name has (galore+svd).
      remat: what the backward pass recomputes.
      precision: of the products with the basis, as the trainer takes it.
      mesh: over which devices weights are sharded; memory is that of one device.
      stagger: spread refreshes over the interval, and report the slowest of `steps`
        steps, each timed alone.
      steps: ordinary steps in a timing; the median of three timings counts.
      skip_refreshes: leave out the timing of a refresh (with an SVD it can take long).
      compile_only: memory alone, from the compiled programs.
      update_alone: the optimizer's update alone, no model.
      profile: print an ordinary step and a refresh by their kernels; the traces are
        kept in a folder that is named.
      out: file to append the results to, one JSON line each.
    """

    size: Size = "tiny"
    batch_size: int = 16
    seq_len: int = 256
    rank: int | float | str = 32
    refresh_every: int | None = None
    optimizers: tuple[str, ...] = ("galore", "galore+sara", "fira", "grass_jump")
    layerwise: tuple[Layerwise, ...] = ("off",)
    weight_dtype: Literal["float32", "bfloat16", "int8"] = "float32"
    basis_dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["auto", "none", "dots", "full"] = "auto"
    precision: str = "default"
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    stagger: bool = False
    steps: int = 20
    skip_refreshes: bool = False
    compile_only: bool = False
    update_alone: bool = False
    profile: Annotated[tuple[Path, ...] | None, tyro.conf.arg(metavar="[FOLDER]")] = (
        None
    )
    out: Path | None = None

    def __post_init__(self) -> None:
        check_numbers(
            self, positive=("batch_size", "seq_len", "steps", "refresh_every")
        )
        if not self.layerwise:
            raise ValueError("layerwise: name off, on, or both")
        base = OptimizerConfig(rank=self.rank, basis_dtype=self.basis_dtype)
        check_meant(
            dataclasses.replace(base, rank=None),
            [named(name, base) for name in self.names],
        )
        if self.profile is not None and self.compile_only:
            raise ValueError("compile_only runs no step: leave out profile")
        if len(self.profile or ()) > 1:
            raise ValueError("profile: name one folder, or none")
        untouched = {f: getattr(BenchConfig, f) for f in ("layerwise", "weight_dtype")}
        untouched |= {"remat": "auto", "compile_only": False, "mesh": MeshConfig()}
        for field, value in untouched.items():
            if self.update_alone and getattr(self, field) != value:
                raise ValueError(f"update_alone has no model: leave out {field}")

    @property
    def names(self) -> tuple[str, ...]:
        """Of all optimizers, adamw first, each once."""
        return tuple(dict.fromkeys(("adamw", *self.optimizers)))


def run_of(config: BenchConfig, name: str, layerwise: Layerwise) -> Config:
    """A resolved run of the trainer without clipping."""
    optimizer = OptimizerConfig(
        rank=config.rank,
        basis_dtype=config.basis_dtype,
        refresh_every=config.refresh_every,
        clip_norm=None,
        precision=config.precision,
        stagger=config.stagger,
        learning_rate=1e-3,
    )
    model = ModelConfig(
        size=config.size, weight_dtype=config.weight_dtype, remat=config.remat
    )
    return resolve(
        Config(
            steps=10_000,  # many subspaces, whatever the interval
            batch_size=config.batch_size,
            seq_len=config.seq_len,
            layerwise=layerwise,
            model=model,
            mesh=config.mesh,
            optimizer=named(name, optimizer),
        )
    )


class Compiled(NamedTuple):
    """A training step that is ready to be timed.

    Attributes:
      row: its results so far, memory in GiB.
      mesh: the mesh it runs on.
      model: the model.
      make: the first state, from a key.
      program: the step.
      kinds: whether steps are refreshes (`kinds_of_steps`).
      every: steps from one refresh to the next; None without refreshes.
    """

    row: Row
    mesh: Mesh
    model: LlamaConfig
    make: Callable[[jax.Array], TrainState]
    program: Program
    kinds: list[bool]
    every: int | None

    @property
    def peak(self) -> int:
        """The most that a step of either kind needs, in bytes."""
        return max(memory.peak or 0 for memory in self.program.memory.values())


def compile_step(config: BenchConfig, name: str, layerwise: Layerwise) -> Compiled:
    run = run_of(config, name, layerwise)
    mesh = make_mesh(run)
    work = work_of(run, jax.random.key(0))
    kinds = kinds_of_steps(work.optimizer)
    if config.compile_only:
        kinds = kinds[:1]
    with jax.set_mesh(mesh):
        make, like = initial(work, mesh)
        program = build_program(run, mesh, work, like, kinds)
    memory = program.memory[kinds[0]]
    row: Row = {
        "optimizer": name,
        "layerwise": layerwise,
        "weights": memory.weights / GIB,
        "state": memory.state / GIB,
        "gradients": memory.gradients / GIB,
        "temporaries": (memory.temporaries or 0) / GIB,
        "peak": (memory.peak or 0) / GIB,
        "compile_s": program.compile_s,
    }
    every = work.optimizer.refresh_every
    return Compiled(row, mesh, work.model, make, program, kinds, every)


def whole_steps(config: BenchConfig, compiled: Compiled) -> Steps:
    """Steps on one batch of random tokens, from the first state on."""
    program, shape = compiled.program, (config.batch_size, config.seq_len)
    state = compiled.make(jax.random.key(0))
    vocabulary = compiled.model.vocab_size
    tokens = jax.random.randint(jax.random.key(2), shape, 0, vocabulary)
    batch = {"tokens": jax.device_put(tokens, by_row(compiled.mesh))}

    def take(refresh: bool) -> object:
        nonlocal state
        state, metrics = program.step(state, batch, refresh)
        return metrics

    return Steps(take, compiled.kinds, compiled.every)


def times(config: BenchConfig, steps: Steps) -> Row:
    """Times an ordinary step, a refresh, and the mean of both, in ms."""
    jax.block_until_ready(steps.take(steps.kinds[-1]))  # bases first
    row: Row = {"step_ms": 1e3 * median_seconds(steps.ordinary, config.steps)}
    row["mean_ms"] = row["step_ms"]
    if config.stagger:
        each = [1e3 * seconds(steps.ordinary) for _ in range(config.steps)]
        row["slowest"] = max(each) / statistics.median(each)
    if steps.interval and not config.skip_refreshes:
        row["refresh_ms"] = 1e3 * seconds(partial(steps.take, True))
        row["mean_ms"] += (row["refresh_ms"] - row["step_ms"]) / steps.interval
    return row


def profiled(config: BenchConfig, row: Row, steps: Steps) -> Row:
    """Prints an ordinary step and a refresh by their kernels, if that is asked for."""
    if config.profile is None:
        return {}
    name, way = row["optimizer"], row["layerwise"]
    folder = config.profile[0] / f"{name}-{way}".rstrip("-") if config.profile else None
    title = f"{name}, layer by layer" if way == "on" else name
    found = print_profile(title, steps.ordinary, PROFILED_STEPS, folder)
    if steps.interval and not config.skip_refreshes:
        again = folder and folder.with_name(f"{folder.name}-refresh")
        print_profile(f"{title}, refresh", partial(steps.take, True), 1, again)
    kinds = {kind.name: kind.ms for kind in found.kinds}
    return {"busy_ms": found.busy_ms, "kinds_ms": kinds}


def rates(config: BenchConfig, compiled: Compiled, step_ms: float) -> Row:
    """Tokens a second on all devices, and the share of these devices' peak rate."""
    tokens = 1e3 * config.batch_size * config.seq_len / step_ms
    flops = tokens * flops_per_token(compiled.model, config.seq_len)
    devices = compiled.mesh.devices
    peak = peak_flops(devices.flat[0].device_kind)
    share = {} if peak is None else {"peak_rate": 100 * flops / (peak * devices.size)}
    return {"tokens_per_s": tokens, **share}


def bench_step(config: BenchConfig, row: Row, compiled: Compiled) -> Row:
    """Times, rates, and the device's peak if no step before had a higher one."""
    before = device_peak()
    with jax.set_mesh(compiled.mesh):
        steps = whole_steps(config, compiled)
        found = times(config, steps)
        found |= rates(config, compiled, found["step_ms"])
        after = device_peak()
        if after is not None and after != before:
            found["device_peak"] = after / GIB
        return found | profiled(config, row, steps)


def bench_update(config: BenchConfig, row: Row) -> Row:
    """Times of an update alone, and its temporaries without the gradients."""
    run = run_of(config, row["optimizer"], "off")
    optimizer = make_optimizer(run.optimizer, run.steps, jax.random.key(0))
    kinds = kinds_of_steps(optimizer)
    update = update_alone(optimizer, model_config(run.model), kinds)
    found: Row = {"temporaries": update.temporaries / GIB}
    found |= {"compile_s": update.compile_s, **times(config, update.steps)}
    return found | profiled(config, row, update.steps)


def attempt(row: Row, run: Callable[[], T]) -> T | None:
    """Runs; an error of the device goes into the row."""
    try:
        return run()
    except jax.errors.JaxRuntimeError as error:
        row["error"] = str(error).splitlines()[0]
        return None


def measure(config: BenchConfig, row: Row, step: Compiled | None) -> None:
    """Fills a row in and prints it; `step` is None for one that is not compiled."""
    if config.update_alone:
        row.update(attempt(row, lambda: bench_update(config, row)) or {})
    elif step is not None:
        row.update(step.row)
        if not config.compile_only:
            row.update(attempt(row, lambda: bench_step(config, row, step)) or {})
    print(json.dumps(rounded(row)), flush=True)


def bench(config: BenchConfig) -> list[Row]:
    """One row for AdamW and one for each optimizer, and for each way to take a step.

    Rows are printed as they come, by their peaks, the lowest first: the process has one
    peak of the device's own, which is then each row's in turn.
    """
    ways = ("-",) if config.update_alone else config.layerwise
    cases = [*itertools.product(config.names, dict.fromkeys(ways))]
    rows: list[Row] = [{"optimizer": name, "layerwise": way} for name, way in cases]

    def prepare(row: Row) -> Compiled | None:
        name, way = row["optimizer"], row["layerwise"]
        return attempt(row, lambda: compile_step(config, name, way))

    steps: list[Compiled | None] = [None] * len(rows)
    if not config.update_alone:
        with ThreadPoolExecutor(8) as pool:  # compiling holds no lock of Python's
            steps = [*pool.map(prepare, rows)]
    peaks = [0 if step is None else step.peak for step in steps]
    for i in sorted(range(len(rows)), key=peaks.__getitem__):
        measure(config, rows[i], steps[i])
        steps[i] = None
        gc.collect()
    for row in rows:
        for ratio, ms in (("ratio", "step_ms"), ("mean_ratio", "mean_ms")):
            if ms in row and "step_ms" in rows[0]:
                row[ratio] = row[ms] / rows[0]["step_ms"]
    return rows


def check(config: BenchConfig) -> None:
    """Checks what is known before anything is compiled.

    Raises:
      OSError: the file for the results cannot be written to.
      ValueError: an optimizer cannot be built, or the batch does not divide.
    """
    for name in config.names:
        work = run_of(config, name, "off")
        check_optimizer(work)
        make_mesh(work)
    if config.out is not None:
        check_out(config.out)


def main() -> None:
    config = parse(BenchConfig, DESCRIPTION, None, "python -m train.bench")
    with usage_errors():
        check(config)
    device = jax.devices()[0].device_kind
    print(
        f"LLaMA-{config.size}, {config.batch_size} x {config.seq_len}, "
        f"{jax.device_count()} x {device}"
    )
    try:
        rows = bench(config)
    except KeyboardInterrupt:
        print("stopped: the rows above are all that was measured", file=sys.stderr)
        sys.exit(130)
    print("\n" + table(rows))
    if config.out is not None:
        append(config.out, rows, {**dataclasses.asdict(config), "device": device})
    failed = [row for row in rows if "error" in row]
    for row in failed:
        print(f"{row['optimizer']}: {row['error']}", file=sys.stderr)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
