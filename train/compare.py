"""Several optimizers on the same work: `python -m train.compare --help`."""

import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro
from jax.sharding import Mesh

from train.config.command_line import parse
from train.config.config import (
    Config,
    OptimizerConfig,
    Preset,
    ReportConfig,
    resolved,
    title,
)
from train.config.named import Shared, named
from train.config.resolve import resolve
from train.data.dataset import Data
from train.engine.mesh import make_mesh
from train.engine.optimizer import check_meant, check_optimizer
from train.host.atomic import Appender, check_writable, write_text
from train.host.errors import StoppedError, usage_errors
from train.host.paths import AnyPath, RunFolder
from train.host.processes import join_processes
from train.records.markdown import Row, markdown
from train.records.metrics import read_metrics
from train.records.plots import draw_runs
from train.records.trackers import check_installed
from train.run.errors import run_errors
from train.run.folder import check_folder, own_folder
from train.run.loop import train
from train.run.report import draw_run_subspaces, summarize, work_title
from train.run.start import check_start, open_text, pinned

DESCRIPTION = """Train with several optimizers: the same weights at the start, the same
batches in the same order, the same schedule.

Examples:
  python -m train.compare --optimizers adamw galore+sara grass_jump --steps 200
  python -m train.compare --optimizers grass_jump@1e-3 grass_jump@2e-3 --rank 16

An optimizer is NAME, NAME+BASIS, NAME@RATE or NAME+BASIS@RATE, where RATE is the peak
learning rate. All other flags are those of "python -m train" and hold for every one
that has the option.

The folder --out (default: runs/compare) gets results.jsonl, a line for each optimizer
as it ends, then table.md and losses.png, and a folder for each run, without
checkpoints."""

Result = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Watched(ReportConfig):
    """Intervals of the output. There are no checkpoints and no text."""

    checkpoint_every: Annotated[int, tyro.conf.Fixed] = 0
    keep: Annotated[int, tyro.conf.Fixed] = 1
    prompt: Annotated[str, tyro.conf.Fixed] = ""
    sample_tokens: Annotated[int, tyro.conf.Fixed] = 0


@dataclasses.dataclass(frozen=True)
class SharedWork(Config):
    """The work: what is trained, on how much, and where it is stored.

    Attributes:
      out: folder of the comparison. Default: runs/compare.
    """

    out: RunFolder | None = None
    preset: Annotated[Preset | None, tyro.conf.Fixed] = None
    resume: Annotated[bool, tyro.conf.Fixed] = False
    resume_or_start: Annotated[bool, tyro.conf.Fixed] = False
    resume_from: Annotated[int | None, tyro.conf.Fixed] = None
    optimizer: OptimizerConfig = dataclasses.field(default_factory=Shared)
    report: ReportConfig = dataclasses.field(default_factory=Watched)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The optimizers to compare, and the work.

    Attributes:
      work: the work.
      optimizers: what to compare, in this order.
    """

    work: Config = dataclasses.field(default_factory=SharedWork)
    optimizers: tuple[str, ...] = (
        "adamw",
        "galore",
        "fira",
        "galore+sara",
        "grass_walk",
        "grass_jump",
    )

    def __post_init__(self) -> None:
        chosen = [named(name, self.work.optimizer) for name in self.optimizers]
        if not chosen:
            raise ValueError("optimizers: name at least one")
        check_meant(self.work.optimizer, chosen)


def expand(comparison: Comparison, folder: AnyPath) -> list[Config]:
    """A resolved config for each optimizer; only optimizer and folder differ.

    Raises:
      ValueError: two of them are the same.
    """
    report = dataclasses.replace(comparison.work.report, checkpoint_every=0)
    configs = {}
    for name in comparison.optimizers:
        optimizer = named(name, comparison.work.optimizer)
        work = dataclasses.replace(comparison.work, optimizer=optimizer, report=report)
        config = resolve(work)
        key = title(config.optimizer)
        if key in configs:
            raise ValueError(f"{name!r}: {key} is already compared; name it once")
        configs[key] = dataclasses.replace(config, out=folder / key)
    return list(configs.values())


def run(config: Config, data: Data, mesh: Mesh) -> Result:
    """Trains; one result in the form of a published-optimizer benchmark line.

    `wall_s` is the time of the training steps alone, without compilation, `peak_gib` is
    what the compiled step needs on one device, and `curve` holds (steps done, training
    loss since the point before).
    """
    name = title(config.optimizer)
    try:
        trained = train(config, data, mesh)
    except FloatingPointError as error:
        return {"optimizer": name, "steps": config.steps, "error": str(error)}
    summary = summarize(config, trained)
    peak = summary["step_bytes"]
    return {
        "optimizer": name,
        "steps": summary["steps"],
        "eval_loss": round(summary["eval_loss"], 4),
        "ppl": round(summary["ppl"], 2),
        "wall_s": summary["train_s"] and round(summary["train_s"], 1),
        "ms_per_step": summary["ms_per_step"] and round(summary["ms_per_step"], 1),
        "peak_gib": peak and round(peak / 2**30, 2),
        "state_bytes": summary["state_bytes"],
        "curve": [[step, round(loss, 4)] for step, loss in summary["curve"]],
    }


def table(results: Sequence[Result]) -> str:
    """The results as Markdown, best first; runs that were given up come last."""

    def row(result: Result) -> Row:
        name = {"optimizer": result["optimizer"].replace("@", " @ ")}
        if "error" in result:
            return {**name, "eval_loss": "not finite", "ppl": "-", "ms_per_step": "-"}
        digits = {"eval_loss": 3, "ppl": 1, "ms_per_step": 1}
        numbers = {key: result[key] for key in digits}
        return name | {
            key: "-" if x is None else f"{x:.{digits[key]}f}"
            for key, x in numbers.items()
        }

    best_first = sorted(results, key=lambda r: r.get("eval_loss", math.inf))
    columns = {
        "optimizer": "optimizer @ peak lr",
        "eval_loss": "eval loss",
        "ppl": "ppl",
        "ms_per_step": "ms / step",
    }
    return markdown([row(result) for result in best_first], columns)


def main(argv: Sequence[str] | None = None) -> None:
    """Compare as the command line says; None reads it from `sys.argv`."""
    comparison = parse(Comparison, DESCRIPTION, argv, "python -m train.compare")
    folder = comparison.work.out or Path("runs/compare")
    with usage_errors():
        join_processes(comparison.work.processes)
        configs = [pinned(config) for config in expand(comparison, folder)]
        check_writable(folder)
        check_installed(comparison.work.report.track)
        for config in configs:
            check_folder(config)
            check_optimizer(config)
        mesh = make_mesh(configs[0])
        data = open_text(configs[0])
        check_start(configs[0], data.tokenizer)
    results: list[Result] = []
    try:
        for config in configs:
            with ExitStack() as stack:
                with usage_errors():
                    stack.enter_context(own_folder(config, data.fingerprint))
                with run_errors():
                    results.append(run(config, data, mesh))
            if jax.process_index() == 0:
                line = json.dumps(results[-1]) + "\n"
                Appender(folder / "results.jsonl").append(line.encode())
    except (KeyboardInterrupt, StoppedError):
        done = f"{len(results)} of {len(configs)} optimizers are done"
        if results:
            conclude(configs[: len(results)], results, folder)
            done += f", and in {folder}"
        print(f"stopped: {done}", file=sys.stderr)
        sys.exit(130)
    conclude(configs, results, folder)


def conclude(configs: Sequence[Config], results: list[Result], folder: AnyPath) -> None:
    """Writes and prints the table, and draws the losses, of finished runs."""
    if jax.process_index() == 0:
        runs = {title(c.optimizer): read_metrics(resolved(c, "out")) for c in configs}
        draw_runs(runs, folder / "losses.png", work_title(configs[0]))
        for config in configs:
            draw_run_subspaces(config)
        write_text(folder / "table.md", table(results) + "\n")
        print(table(results))


if __name__ == "__main__":
    main()
