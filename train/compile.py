"""Compiles the step for a TPU that is not here: `python -m train.compile --help`."""

import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import tyro
from jax.sharding import Mesh

from train.config.command_line import parse
from train.config.config import (
    Config,
    DataConfig,
    OptimizerConfig,
    Preset,
    ProcessConfig,
    ReportConfig,
    label,
)
from train.config.named import Shared, named
from train.config.resolve import resolve
from train.engine.memory import GIB, tree_bytes
from train.engine.mesh import make_mesh
from train.engine.optimizer import check_meant, check_optimizer
from train.engine.step import Work
from train.host.errors import usage_errors
from train.records.markdown import Row, append, check_out, markdown, rounded
from train.run.first_state import like_of
from train.run.loop import kinds_of_steps, lower_step, work_of
from train.tpu.collectives import KINDS, traffic_of
from train.tpu.topology import chips_of, memory_of, refusal, stay_on_cpu

DESCRIPTION = """Compile the trainer's own step for TPUs that are not here, on any
Linux machine (x86-64; pip install '.[tpu]'), and print what it needs of each chip:
arguments (weights, the optimizer's state, the batch), temporaries, their peak, the
program itself, whether that fits, and what the chips send each other: of an ordinary
step and of a refresh, of each optimizer in turn. No array is made, and nothing runs.

Examples:
  python -m train.compile --topology v5e:2x2 --size 60m --batch-size 16 --seq-len 256
  python -m train.compile --topology v5e:4x4 --size 1b --batch-size 64 --seq-len 512 \\
    --fsdp 16 --optimizers adamw galore+sara grass_jump --out runs/v5e.jsonl
  python -m train.compile --topology v5e:16x16 --size 7b --batch-size 256 \\
    --seq-len 2048 --fsdp 256 --optimizers adamw grass_jump

A topology is a generation and its chips: v5e:2x2, v5e:16x16, v5p:2x2x1, v5p:4x8x8,
v6e:16x16. An optimizer is NAME or NAME+BASIS. All other flags are those of "python -m
train". A step takes the compiler a minute or so, of LLaMA-7B several."""


@dataclasses.dataclass(frozen=True)
class CompiledWork(Config):
    """The work. Of a run only its step is compiled, so the data do not matter."""

    out: Annotated[Path | None, tyro.conf.Fixed] = None
    preset: Annotated[Preset | None, tyro.conf.Fixed] = None
    resume: Annotated[bool, tyro.conf.Fixed] = False
    resume_or_start: Annotated[bool, tyro.conf.Fixed] = False
    resume_from: Annotated[int | None, tyro.conf.Fixed] = None
    init_from: Annotated[str | None, tyro.conf.Fixed] = None
    seed: Annotated[int, tyro.conf.Fixed] = 0
    steps: Annotated[int, tyro.conf.Fixed] = 300
    optimizer: OptimizerConfig = dataclasses.field(default_factory=Shared)
    data: Annotated[DataConfig, tyro.conf.Fixed] = dataclasses.field(
        default_factory=DataConfig
    )
    report: Annotated[ReportConfig, tyro.conf.Fixed] = dataclasses.field(
        default_factory=ReportConfig
    )
    processes: Annotated[ProcessConfig, tyro.conf.Fixed] = dataclasses.field(
        default_factory=ProcessConfig
    )


@dataclasses.dataclass(frozen=True)
class CompileConfig:
    """The programs to compile, and their target.

    Attributes:
      topology: the TPU.
      work: the work.
      optimizers: which, in this order; galore+sara is GaLore with SARA's basis.
      rows: file to append the results to, a JSON line for each step.
    """

    topology: str = "v5e:2x2"
    work: Config = dataclasses.field(default_factory=CompiledWork)
    optimizers: Annotated[tuple[str, ...], tyro.conf.arg(aliases=("--optimizer",))] = (
        "adamw",
        "grass_jump",
    )
    rows: Annotated[Path | None, tyro.conf.arg(name="out")] = None

    def __post_init__(self) -> None:
        if not self.optimizers:
            raise ValueError("optimizers: name at least one")
        chosen = [named(name, self.work.optimizer) for name in self.optimizers]
        check_meant(self.work.optimizer, chosen)

    def configs(self) -> list[Config]:
        """A config for each optimizer, as the trainer resolves it on a TPU."""
        base = self.work.optimizer
        return [
            resolve(dataclasses.replace(self.work, optimizer=named(name, base)), "tpu")
            for name in self.optimizers
        ]


class Case(NamedTuple):
    """One optimizer's step on a mesh of chips."""

    config: Config
    mesh: Mesh
    work: Work
    like: Any

    @property
    def kinds(self) -> list[bool]:
        """Whether steps are refreshes (`kinds_of_steps`)."""
        return kinds_of_steps(self.work.optimizer)


def case_of(config: Config, chips: Sequence[Any]) -> Case:
    """The case of a resolved config; ValueError if it does not fit these chips."""
    # The precisions that this machine has say nothing of a TPU.
    optimizer = dataclasses.replace(config.optimizer, precision="default")
    check_optimizer(dataclasses.replace(config, optimizer=optimizer))
    mesh = make_mesh(config, chips)
    work = work_of(config, jax.random.key(0))
    # "auto" would look for the kernels of this machine.
    work = work._replace(model=dataclasses.replace(work.model, attention="xla"))
    return Case(config, mesh, work, like_of(work, mesh))


def compile_step(case: Case, refresh: bool, available: float) -> Row:
    """Memory in GiB of a step on a chip of `available` bytes, and its traffic.

    `peak` is arguments, results that do not take their place, and temporaries as they
    are packed into the chip's memory; `room` is what it leaves, and the program itself.
    (The compiler's own `peak_memory_in_bytes` leaves out gaps, and counts what stays
    within the core.)
    """
    row: Row = {"optimizer": label(case.config.optimizer)}
    row["step"] = "refresh" if refresh else "ordinary"
    row["weights"] = tree_bytes(case.like.params) / GIB
    row["state"] = tree_bytes(case.like.opt_state) / GIB
    start = time.perf_counter(), time.process_time()
    try:
        step = lower_step(case.config, case.mesh, case.work, case.like, refresh)
        compiled = step.compile()
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
        if refused := refusal(error):
            peak, room = refused.needed, refused.available - refused.needed
            row |= {"peak": peak / GIB, "fits": "no", "room": room / GIB}
        else:
            row["error"] = str(error).splitlines()[0]
        return {**row, **seconds_since(*start)}
    seconds = seconds_since(*start)
    needs, sends = memory_row(compiled, available), traffic_row(compiled)
    return {**row, **needs, **sends, **seconds}


def seconds_since(clock: float, cpu: float) -> Row:
    """Seconds that passed, and those that the cores worked for this process."""
    return {
        "compile_s": time.perf_counter() - clock,
        "cpu_s": time.process_time() - cpu,
    }


def memory_row(compiled: jax.stages.Compiled, available: float) -> Row:
    memory: Any = compiled.memory_analysis()
    arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    peak, code = arguments + results + temporaries, memory.generated_code_size_in_bytes
    return {
        "arguments": arguments / GIB,
        "temporaries": temporaries / GIB,
        "peak": peak / GIB,
        "code": code / GIB,
        "fits": "yes",
        "room": (available - peak - code) / GIB,
    }


def traffic_row(compiled: jax.stages.Compiled) -> Row:
    traffic = traffic_of(compiled.as_text() or "")
    row: Row = {
        kind: {"count": count, "sent": sent / GIB}
        for kind, (count, sent) in traffic.by_kind().items()
    }
    if traffic.unknown_loops:
        row["unknown_loops"] = len(traffic.unknown_loops)
    return {**row, "sent": traffic.sent / GIB}


def table(rows: Sequence[Row]) -> str:
    """Markdown; GiB a chip, and collectives as their count and the GiB sent."""
    columns = {
        "optimizer": "optimizer",
        "step": "step",
        "weights": "weights",
        "state": "state",
        "arguments": "arguments",
        "temporaries": "temporaries",
        "peak": "peak",
        "code": "code",
        "fits": "fits",
        "room": "room",
        **{kind: kind for kind in KINDS},
        "sent": "sent",
        "compile_s": "compile, s",
        "cpu_s": "CPU, s",
    }

    def cells(row: Row) -> Row:
        sends = {kind: row[kind] for kind in KINDS if kind in row}
        return row | {k: f"{x['count']}: {x['sent']:.2f}" for k, x in sends.items()}

    return markdown([cells(row) for row in rows], columns)


def main(argv: Sequence[str] | None = None) -> None:
    """Compile as the command line says; None reads it from `sys.argv`."""
    stay_on_cpu()
    config = parse(CompileConfig, DESCRIPTION, argv, "python -m train.compile")
    with usage_errors():
        chips = chips_of(config.topology)
        cases = [case_of(x, chips) for x in config.configs()]
        if config.rows is not None:
            check_out(config.rows)
        available = memory_of(chips[0])
    work, tpu = config.work, f"{len(chips)} {chips[0].device_kind}"
    print(
        f"{work.model.name}, {work.batch_size} x {work.seq_len} tokens, {tpu} "
        f"({config.topology}) of {available / GIB:.2f} GiB each"
    )
    rows: list[Row] = []
    steps = [(case, refresh) for case in cases for refresh in case.kinds]
    try:
        for case, refresh in steps:
            rows.append(compile_step(case, refresh, available))
            print(json.dumps(rounded(rows[-1])), flush=True)
            if config.rows is not None:
                full = dataclasses.asdict(case.config)
                settings = {"topology": config.topology, "config": full}
                append(config.rows, rows[-1:], settings)
    except KeyboardInterrupt:
        print("stopped: the rows above are all that was compiled", file=sys.stderr)
        sys.exit(130)
    print(
        f"\nGiB a chip; of collectives how many, and what a chip sends.\n{table(rows)}"
    )
    if any("unknown_loops" in row for row in rows):
        print("In loops whose length the data decide, one turn is counted.")


if __name__ == "__main__":
    main()
