"""Fine-tunes one set of weights by LoRA and by the trainer's methods."""

import dataclasses
import gc
import itertools
import json
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
from jax.sharding import Mesh

import lowrank_optax as lro
from models import Params
from tests.lora.methods import Method, of_lora, of_trainer
from tests.lora.table import table
from train.bench import attempt
from train.config.command_line import check_numbers, check_seed, parse
from train.config.config import Config, ModelConfig, OptimizerConfig, resolved
from train.config.named import Shared, named
from train.config.resolve import resolve
from train.config.shape import published_folder
from train.data.dataset import Data, DataConfig
from train.engine.memory import MIB, device_peak
from train.engine.mesh import make_mesh, replicated
from train.engine.optimizer import check_meant, check_optimizer
from train.host.atomic import Appender
from train.host.errors import usage_errors
from train.records.markdown import Row, check_out, rounded
from train.records.progress import Progress
from train.run.loop import evaluate
from train.run.start import check_start, open_text, pinned, weights_for
from train.run.stored import read_config, run_and_step

DESCRIPTION = """Fine-tune the same weights by LoRA and by methods of the trainer: the
same batches in the same order, the same schedule and clipping, on one device.

Examples:
  python -m tests.lora --init-from runs/tiny-grass_jump --source more.txt --steps 50
  python -m tests.lora --init-from hf:FOLDER --source chat.jsonl --windows examples \\
    --methods lora@3e-4 lora@1e-3 adamw@1e-4 galore@1e-3 --rank 16 --seeds 0 1 2

Every run prints a line of JSON; a Markdown table ends the output. Memory is what the
compiler counts for a step. The device's own peak is that of the whole process, so runs
go by their memory, the lowest first, and a run that did not raise it has none. The time
of a step is the mean of all but the first two, refreshes included. A run with an error
makes the exit status 1."""

WARM = 2  # steps that are not timed: a refresh, and the first without one


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """The weights, the methods, and the work.

    Attributes:
      init_from: RUN_FOLDER, RUN_FOLDER@STEP or hf:FOLDER, as the trainer takes it.
      methods: lora@RATE, or NAME@RATE or NAME+BASIS@RATE of the trainer. Each name is
        compiled once, whatever its rates are.
      alpha: the adapters' outputs are multiplied by alpha / rank.
      seeds: of the batches' order, of the adapters, and of random subspaces.
      steps: of each run.
      batch_size: windows in a step.
      seq_len: tokens in a window.
      weight_dtype: how weights are stored, those under the adapters too; adapters are
        float32.
      remat: what the backward pass recomputes, as the trainer takes it.
      out: file to append the results to, one JSON line for each run.
    """

    init_from: str
    methods: tuple[str, ...] = (
        "lora@1e-3",
        "adamw@6e-4",
        "galore@3e-3",
        "grass_jump@2e-3",
        "apollo@3e-3",
    )
    alpha: float = 32.0
    seeds: tuple[int, ...] = (0,)
    steps: int = 300
    batch_size: int = 16
    seq_len: int = 128
    weight_dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["auto", "none", "dots", "full"] = "auto"
    out: Path | None = None
    optimizer: OptimizerConfig = dataclasses.field(
        default_factory=lambda: Shared(rank=8)
    )
    data: DataConfig = dataclasses.field(default_factory=DataConfig)

    def __post_init__(self) -> None:
        check_numbers(self, positive=("alpha", "steps", "batch_size"))
        for seed in self.seeds:
            check_seed(seed)
        if not self.methods or not self.seeds:
            raise ValueError("methods, seeds: name at least one")
        chosen = [self.optimizer_of(name) for name in self.methods]
        # The rank is that of adapters too, and has a default here.
        check_meant(dataclasses.replace(self.optimizer, rank=None), chosen)
        rank = self.optimizer.rank
        if "lora" in map(method_of, self.methods) and not isinstance(rank, int):
            raise ValueError(f"rank={rank}: lora needs a whole number, --rank 8")

    def optimizer_of(self, name: str) -> OptimizerConfig:
        """The trainer's optimizer of a name; AdamW is that of adapters."""
        method, at, rate = name.partition("@")
        if method == "lora" and not at and self.optimizer.learning_rate is None:
            raise ValueError("lora has no rate of its own: give one, lora@1e-3")
        return named("adamw" + at + rate if method == "lora" else name, self.optimizer)


def method_of(name: str) -> str:
    return name.partition("@")[0]


def run_of(config: LoraConfig, name: str) -> Config:
    """A resolved run of the trainer on the same work.

    Raises:
      FileNotFoundError: there are no such weights.
      ValueError: they cannot be read.
    """
    model = ModelConfig()
    if published_folder(config.init_from) is None:
        model = read_config(run_and_step(config.init_from)[0]).model
    model = dataclasses.replace(
        model,
        weight_dtype=config.weight_dtype,
        compute_dtype="auto",
        remat=config.remat,
    )
    run = Config(
        init_from=config.init_from,
        steps=config.steps,
        batch_size=config.batch_size,
        seq_len=config.seq_len,
        model=model,
        optimizer=config.optimizer_of(name),
        data=config.data,
    )
    return pinned(resolve(run))


def host_weights(run: Config, mesh: Mesh) -> Params:
    """The weights that a pinned run begins with, in the host's memory."""

    def everywhere(tree: Any) -> Any:
        return jax.tree.map(lambda _: replicated(mesh), tree)

    weights = lro.weights.dense(weights_for(run, everywhere), "float32")
    return jax.device_get(weights)


def prepared(config: LoraConfig, mesh: Mesh, weights: Params, name: str) -> Method:
    """Compiles a method."""
    run = run_of(config, name)
    with jax.set_mesh(mesh):
        if method_of(name) == "lora":
            rank: Any = config.optimizer.rank
            return of_lora(run, mesh, weights, rank, config.alpha)
        return of_trainer(run, mesh, weights)


def fine_tune(
    method: Method,
    title: str,
    batches: Sequence[Any],
    data: Data,
    seed: int,
    rate: float,
) -> Row:
    """Takes a step for each batch. Returns losses, the time, and the device's peak.

    Raises:
      FloatingPointError: the held-out loss is not finite.
    """
    program, before, begin = method.program, device_peak(), time.perf_counter()
    every, losses = program.refresh_every, []
    state = method.start(seed, rate)
    with Progress(title, 0, len(batches)) as progress:
        for step, rows in enumerate(batches):
            if step == WARM:
                jax.block_until_ready(losses)
                begin = time.perf_counter()
            refresh = every is not None and step % every == 0
            state, metrics = program.step(state, program.put(rows), refresh)
            losses.append(metrics["loss"])
            progress.step(metrics)
        jax.block_until_ready(losses)
    seconds, after = time.perf_counter() - begin, device_peak()
    found = evaluate(program, method.weights(state), data.evaluation)
    row: Row = {"eval_loss": found["eval_loss"], "train_loss": float(losses[-1])}
    if len(batches) > WARM:
        row["step_ms"] = 1e3 * seconds / (len(batches) - WARM)
    if after is not None and after != before:
        row["device_peak"] = after / MIB
    return row


def rows_of(
    config: LoraConfig, names: Sequence[str], method: Method, data: Data
) -> list[Row]:
    """A row for each rate and seed of a method, printed and appended as it comes."""
    rows = []
    memory = method.program.memory[min(method.program.memory)]
    for seed, name in itertools.product(config.seeds, names):
        run = dataclasses.replace(run_of(config, name), seed=seed)
        rate = resolved(run.optimizer, "learning_rate")
        row: Row = {"method": method_of(name), "rate": rate, "seed": seed}
        row |= {"trained": method.trained, "compile_s": method.program.compile_s}
        row |= {"weights": memory.weights / MIB, "state": memory.state / MIB}
        row["peak"] = method.peak / MIB
        data = data if seed == config.seeds[0] else open_text(run)
        batches = [*itertools.islice(data.train, config.steps)]
        go = partial(fine_tune, method, name, batches, data, seed, rate)
        try:
            row |= attempt(row, go) or {}
        except FloatingPointError as error:
            row["error"] = str(error)
        line = rounded(row) | {"rate": rate}
        print(json.dumps(line), flush=True)
        if config.out is not None:
            line = json.dumps(dataclasses.asdict(config) | line, default=str)
            Appender(config.out).append(f"{line}\n".encode())
        rows.append(row)
        gc.collect()
    return rows


def compare(config: LoraConfig, run: Config, data: Data) -> list[Row]:
    """All rows, in the order of `config.methods`."""
    mesh = make_mesh(run, jax.devices()[:1])
    weights = host_weights(run, mesh)
    groups: dict[str, list[str]] = {}
    for name in dict.fromkeys(config.methods):
        groups.setdefault(method_of(name), []).append(name)
    with ThreadPoolExecutor() as pool:  # compiling holds no lock of Python's
        prepare = partial(prepared, config, mesh, weights)
        firsts = [names[0] for names in groups.values()]
        methods = dict(zip(groups, pool.map(prepare, firsts), strict=True))
    rows: dict[str, list[Row]] = {}
    with jax.set_mesh(mesh):
        for key in sorted(groups, key=lambda key: methods[key].peak):
            rows[key] = rows_of(config, groups[key], methods.pop(key), data)
            gc.collect()
    return [row for key in groups for row in rows[key]]


def main(argv: Sequence[str] | None = None) -> None:
    """Compare as the command line says; None reads it from `sys.argv`."""
    config = parse(LoraConfig, DESCRIPTION, argv, "python -m tests.lora")
    with usage_errors():
        for name in config.methods:
            check_optimizer(run_of(config, name))
        run = run_of(config, config.methods[0])
        data = open_text(run)
        check_start(run, data.tokenizer)
        if config.out is not None:
            check_out(config.out)
    rows = compare(config, run, data)
    print("\n" + table(rows))
    failed = [row for row in rows if "error" in row]
    for row in failed:
        print(f"{row['method']}@{row['rate']:g}: {row['error']}", file=sys.stderr)
    if failed:
        sys.exit(1)
