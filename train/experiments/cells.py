"""The runs of an experiment: their flags and their folders."""

import dataclasses
import itertools
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from train.config.command_line import check_numbers
from train.config.config import Config, OptimizerConfig, resolved
from train.config.presets import PRESETS, with_flags
from train.config.unread import unread
from train.data.dataset import DataConfig
from train.experiments.papers import EXPERIMENTS
from train.experiments.runs import SHARED, Experiment, Flags, Scale

if TYPE_CHECKING:
    Name = str
else:
    Name = Literal[tuple(EXPERIMENTS)]

# What an experiment's runs have in common, whatever they try.
REPORT: Flags = {"checkpoint_every": 0, "sample_tokens": 0, "eval_every": 0}


@dataclasses.dataclass(frozen=True)
class ExperimentConfig:
    """The experiment to run, and its folder.

    Attributes:
      name: the experiment.
      scale: how large its runs are. minutes: the tiny model on the text that comes with
        the trainer; hour: LLaMA-60M, or 130M for some, name 39 M tokens by --source;
        full: the paper's models and steps, name its data.
      out: folder of the experiment. Default: runs/NAME-SCALE.
      seeds: how often each run is made, with seeds 0, 1, ...; of tries, the best ones.
        Default: at the scale hour the experiment's own, once at others.
      steps: optimizer steps of each run, if not the experiment's own.
      only: leave out runs whose name lacks this regular expression.
      init_from: RUN_FOLDER or RUN_FOLDER@STEP: all runs begin with the weights of that
        run's checkpoint, with its tokenizer and its size.
      at_once: runs at a time on each device, to fill it; a CPU's cores are shared out.
      list: print the runs as commands, and end.
    """

    name: Annotated[Name, tyro.conf.Positional]
    scale: Scale = "minutes"
    out: Path | None = None
    seeds: int | None = None
    steps: int | None = None
    only: str | None = None
    init_from: str | None = None
    at_once: int = 1
    list: bool = False
    data: DataConfig = dataclasses.field(default_factory=DataConfig)

    def __post_init__(self) -> None:
        check_numbers(self, positive=("seeds", "steps", "at_once"))

    @property
    def experiment(self) -> Experiment:
        return EXPERIMENTS[self.name]

    @property
    def folder(self) -> Path:
        return self.out or Path("runs") / f"{self.name}-{self.scale}"


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of an experiment.

    Attributes:
      axes: the flags in which it differs from others, and their values.
      flags: all of its flags, except for its folder.
      folder: of the run.
    """

    axes: Flags
    flags: Flags
    folder: Path

    @property
    def words(self) -> list[str]:
        """Formats the flags as a command line."""
        flags = {**self.flags, "out": self.folder}
        pairs = ((f"--{k.replace('_', '-')}", str(v)) for k, v in flags.items())
        return [word for pair in pairs for word in pair]

    @property
    def done(self) -> bool:
        return (self.folder / "summary.json").exists()

    @property
    def summary(self) -> dict[str, Any]:
        """The results of a finished run."""
        return json.loads((self.folder / "summary.json").read_text())


def expand(config: ExperimentConfig) -> list[Cell]:
    """The runs, all of a seed before those of the next.

    Raises:
      ValueError: a flag that no run has, two runs that are the same, or none left.
    """
    runs = config.experiment.runs(config.scale)
    own_text = config.data.source == DataConfig().source
    if config.scale != "minutes" and own_text and config.init_from is None:
        raise ValueError(
            f"scale={config.scale} needs more text than comes with the trainer: name "
            "it by --source"
        )
    given = {k: v for k, v in vars(config.data).items() if v != vars(DataConfig())[k]}
    if config.steps is not None:
        given["steps"] = config.steps
    if config.init_from is not None:
        given["init_from"] = config.init_from
    seeds = config.seeds or (config.experiment.seeds if config.scale == "hour" else 1)
    axes = axes_of(runs)
    cells: dict[Path, Cell] = {}
    for seed, run in itertools.product(range(seeds), runs):
        flags = {**SHARED[config.scale], **REPORT, **run, **given, "seed": seed}
        flags = meant(flags) | saved(config, flags)
        own = {k: run[k] for k in axes if k in run and k in flags}
        folder = config.folder / f"{name_of(own)}-{seed}"
        if folder in cells:
            raise ValueError(f"two runs are {folder.name}")
        cells[folder] = Cell(own, flags, folder)
    chosen = [c for c in cells.values() if re.search(config.only or "", c.folder.name)]
    if not chosen:
        names = ", ".join(dict.fromkeys(name_of(c.axes) for c in cells.values()))
        raise ValueError(f"only={config.only!r} leaves no run of {names}")
    return chosen


def tries(config: ExperimentConfig, cells: Sequence[Cell]) -> list[Cell]:
    """The runs that are made in any case."""
    return [c for c in cells if not (config.experiment.best_of and c.flags["seed"])]


def best_tries(config: ExperimentConfig, cells: Sequence[Cell]) -> list[Cell]:
    """Of an experiment of tries, the best one of each kind and its other seeds.

    A try that failed, or has no finite loss, is not among the best. All, of others.
    """
    flag = config.experiment.best_of
    if flag is None:
        return [*cells]
    best: dict[str, tuple[float, Flags]] = {}
    for cell in tries(config, cells):
        loss = cell.summary["eval_loss"] if cell.done else math.inf
        if loss < best.get(cell.flags[flag], (math.inf,))[0]:
            best[cell.flags[flag]] = loss, cell.axes
    chosen = [axes for _, axes in best.values()]
    return [cell for cell in cells if cell.axes in chosen]


def meant(flags: Flags) -> Flags:
    """Removes the options that its method does not read, but others' do.

    Raises:
      ValueError: a flag that no run has.
    """
    preset = PRESETS.get(flags.get("preset", ""), {})
    optimizer = with_flags(Config(), {**preset, **flags}).optimizer
    unused = unread(optimizer)
    # What a preset says is taken back by the default.
    return {k: v for k, v in flags.items() if k not in unused} | {
        k: getattr(OptimizerConfig, k) for k in unused if k in preset
    }


def saved(config: ExperimentConfig, flags: Flags) -> Flags:
    """Flags for checkpoints: to resume, or for the change of weights at the end."""
    run = with_flags(Config(), {**PRESETS.get(flags.get("preset", ""), {}), **flags})
    if subspaces := config.experiment.weights_over:
        interval = resolved(run.optimizer, "refresh_every")
        most = min(subspaces * interval, run.steps // 2)
        # A part of the steps, so that one of its multiples is where it begins.
        window = next(n for n in range(most, 0, -1) if run.steps % n == 0)
        return {"checkpoint_every": window, "keep": 2}
    return {"checkpoint_every": 1000} if config.scale == "full" else {}


def axes_of(runs: Sequence[Flags]) -> list[str]:
    """The flags in which runs differ; of a single one, its optimizer."""
    flags = dict.fromkeys(k for run in runs for k in run)
    differ = [k for k in flags if len({str(run.get(k, ...)) for run in runs}) > 1]
    return differ or ["optimizer"]


def name_of(axes: Flags) -> str:
    """A name for a folder: "galore,sara" of optimizer and basis, else "rank=64"."""
    words = (
        str(v) if k in ("optimizer", "basis", "preset") else f"{k}={v}"
        for k, v in axes.items()
    )
    return re.sub(r"[^\w=.+,-]", "_", ",".join(words))
