"""Runs the papers' experiments: `python -m train.experiment --help`."""

import os
import shlex
import shutil
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from train.config.command_line import parse
from train.config.config import Config
from train.config.presets import with_flags
from train.experiments.cells import (
    Cell,
    ExperimentConfig,
    axes_of,
    best_tries,
    expand,
    name_of,
    tries,
)
from train.experiments.launch import Command, run_all, slots
from train.experiments.papers import EXPERIMENTS
from train.host.atomic import check_writable, write_text
from train.host.errors import usage_errors
from train.records.metrics import read_metrics
from train.records.plots import (
    draw_by_time,
    draw_losses,
    draw_measured,
    draw_memory,
    draw_runs,
    draw_spectra,
    styles_of,
)
from train.records.tables import Row, table, to_csv
from train.run.spectra import spectra, weights_of
from train.run.stored import read_config

_LISTED = "\n".join(f"  {name:19}{e.about}" for name, e in EXPERIMENTS.items())

DESCRIPTION = f"""Run an experiment: every run of it, one table and its pictures.

{_LISTED}

Examples:
  python -m train.experiment grass-figure-3 --at-once 2       minutes, on a CPU
  python -m train.experiment grass-figure-3 --scale hour --source train.u16 \\
      --eval-source valid.u16                                 an hour of one GPU
  python -m train.experiment sara-table-1 --scale full --source 'c4/*.json.gz' \\
      --tokenizer t5.model --windows documents                as the paper has it
  python -m train.experiment sara-table-1 --list              its runs, as commands

Runs are spread over the GPUs that are there, one device each, and what is compiled for
one seed is there for the next. The same command goes on with what is left of an
experiment that was stopped. In the folder --out: a folder for each run, results.csv (a
line for each), table.md (means over seeds, with 95 % confidence intervals) and the
pictures."""

# Of a run's summary.
COLUMNS = (
    "eval_loss",
    "ppl",
    "ppl_published",
    "steps",
    "ms_per_step",
    "tokens_per_s",
    "train_s",
    "state_bytes",
    "step_bytes",
    "skipped",
)


def row_of(cell: Cell) -> Row:
    """The table row of a run: its axes, its numbers, or why there are none."""
    row: Row = {**cell.axes, "seed": cell.flags["seed"]}
    if not cell.done:
        return {**row, "error": last_words(log_of(cell))}
    summary = cell.summary
    records = read_metrics(cell.folder)
    measured = {k: v for k, v in records[-1].items() if "/" in k} if records else {}
    overlaps = [v for k, v in measured.items() if k.startswith("overlap/")]
    row |= {k: summary[k] for k in COLUMNS} | measured
    return row | ({"overlap": statistics.fmean(overlaps)} if overlaps else {})


def moved_spectra(
    config: ExperimentConfig, cells: Sequence[Cell], rows: Sequence[Row]
) -> dict[str, Sequence[float]]:
    """Spectra of the weights' last change, the mean over all matrices, by run.

    Adds the effective rank to the rows. Empty if the experiment does not ask.
    """
    if config.experiment.weights_over is None:
        return {}
    means: dict[str, Sequence[float]] = {}
    for cell, row in zip(cells, rows, strict=True):
        if cell.done:
            last = row["steps"]
            steps = last - cell.flags["checkpoint_every"], last
            before, after = (weights_of(f"{cell.folder}@{s}")[1] for s in steps)
            found = spectra(before, after).values()
            values = np.concatenate([x.values for x in found]).mean(axis=0)
            row["effective_rank"] = float(
                np.concatenate([x.ranks for x in found]).mean()
            )
            means.setdefault(name_of(cell.axes), values.tolist())
    return means


def short_names(cells: Sequence[Cell]) -> dict[str, str]:
    """Each run's optimizer and basis, where these tell all runs apart."""
    short = {
        name_of(cell.axes): name_of(
            {k: v for k, v in cell.axes.items() if k in ("optimizer", "basis")}
        )
        for cell in cells
    }
    return short if len({*short.values()}) == len(short) else {k: k for k in short}


def log_of(cell: Cell) -> Path:
    return cell.folder.parent / "logs" / f"{cell.folder.name}.txt"


def programs_of(config: ExperimentConfig) -> Path:
    return config.folder / "compiled"


def shared_programs(config: ExperimentConfig) -> dict[str, str]:
    """Where runs share compiled programs, unless the environment names a folder."""
    name = "JAX_COMPILATION_CACHE_DIR"
    return {name: os.environ.get(name, str(programs_of(config).absolute()))}


def last_words(log: Path) -> str:
    """The last line of a log: why the run ended."""
    lines = log.read_text(errors="replace").split("\n") if log.exists() else []
    return next((line for line in reversed(lines) if line.strip()), "not run")


def check_same(cells: Sequence[Cell]) -> None:
    """ValueError if a folder has a run with other flags.

    (`--resume-or-start` checks that too, but not for a finished run.)
    """
    for cell in cells:
        path = cell.folder / "config.json"
        if not path.exists():
            continue
        stored = read_config(cell.folder)
        wanted = with_flags(Config(), cell.flags)
        if changed := differences(stored, wanted):
            raise ValueError(
                f"{cell.folder} has a run with other settings ({changed}): give "
                "another --out, or delete it"
            )


def differences(stored: Config, wanted: Config) -> str:
    """Names the requested settings that differ from the stored (resolved) config."""
    default, parts = Config(), []
    for part in ("optimizer", "model", "data"):
        old, new, own = (vars(getattr(c, part)) for c in (stored, wanted, default))
        parts += [k for k in new if new[k] != own[k] and new[k] != old[k]]
    work = ("steps", "batch_size", "seq_len", "seed")
    parts += [k for k in work if getattr(stored, k) != getattr(wanted, k)]
    return ", ".join(parts)


def conclude(config: ExperimentConfig, cells: Sequence[Cell]) -> bool:
    """Writes tables and pictures of the finished runs; returns whether all are."""
    rows = [row_of(cell) for cell in cells]
    moved = moved_spectra(config, cells, rows)
    axes = axes_of([cell.axes for cell in cells])
    experiment = config.experiment
    text = table(rows, axes, experiment.against)
    write_text(config.folder / "results.csv", to_csv(rows))
    about = experiment.about
    if config.only is not None:  # what is left out is not in the pictures
        source = about.partition(":")[0]
        about = f"{source}: {config.name}, the runs named {config.only!r}"
    heading = f"{about}\n(scale: {config.scale})"
    styles = styles_of(name_of(cell.axes) for cell in cells)
    write_text(config.folder / "table.md", f"{heading}\n\n{text}\n")
    runs = {
        name_of(cell.axes): read_metrics(cell.folder)
        for cell in reversed(best_tries(config, cells))  # of several seeds, the first
        if cell.done
    }
    if runs:
        draw_runs(runs, config.folder / "losses.png", heading, styles)
        draw_by_time(runs, config.folder / "time.png", heading, styles)
        losses: dict[str, list[float]] = {}
        state: dict[str, float] = {}  # in MB
        for cell, row in zip(cells, rows, strict=True):
            if cell.done:
                losses.setdefault(name_of(cell.axes), []).append(row["eval_loss"])
                state[name_of(cell.axes)] = row["state_bytes"] / 1e6
        draw_losses(losses, config.folder / "final.png", heading, styles)
        draw_memory(
            losses, state, config.folder / "memory.png", heading, short_names(cells)
        )
        for prefix in experiment.measured:
            draw_measured(runs, prefix, config.folder / f"{prefix}.png", heading)
    if moved:
        draw_spectra(moved, config.folder / "spectrum.png", heading, styles)
    print(text)
    return all(cell.done for cell in cells)


def carry_out(config: ExperimentConfig, cells: Sequence[Cell]) -> None:
    """Makes the runs that are not done, and prints how each ended."""
    left = {cell.folder.name: cell for cell in cells if not cell.done}
    with usage_errors():
        check_same(cells)
        found = slots(config.at_once) if left else []
    # Runs that differ by their seed alone are one program.
    environments = [{**slot, **shared_programs(config)} for slot in found]
    commands = [
        Command(
            name,
            [sys.executable, "-m", "train", *cell.words, "--resume-or-start"],
            log_of(cell),
        )
        for name, cell in left.items()
    ]
    # Not `say`, which asks JAX for processes, and would take a GPU's memory here.
    print(
        f"{len(left)} of {len(cells)} runs to do, {len(environments)} at a time",
        flush=True,
    )
    with tqdm(total=len(left), unit="run", disable=None) as bar:
        for ended in run_all(commands, environments):
            row = row_of(left[ended.name])
            outcome = row.get("error") or f"held-out loss {row['eval_loss']:.4f}"
            bar.write(f"{ended.name}: {outcome}", file=sys.stderr)
            bar.update()


def main(argv: Sequence[str] | None = None) -> None:
    """Run an experiment as the command line says; None reads it from `sys.argv`."""
    config = parse(ExperimentConfig, DESCRIPTION, argv, "python -m train.experiment")
    with usage_errors():
        possible = expand(config)
        cells = tries(config, possible)
        if config.list:
            for cell in cells:
                print("python -m train", shlex.join(cell.words))
            return
        check_writable(config.folder)
    try:
        carry_out(config, cells)
        if again := [c for c in best_tries(config, possible) if c not in cells]:
            cells += again
            carry_out(config, again)
    except KeyboardInterrupt:
        conclude(config, cells)
        print("stopped: the same command goes on", file=sys.stderr)
        sys.exit(130)
    if not conclude(config, cells):
        sys.exit(f"error: some runs failed; see {config.folder / 'logs'}")
    shutil.rmtree(programs_of(config), ignore_errors=True)


if __name__ == "__main__":
    main()
