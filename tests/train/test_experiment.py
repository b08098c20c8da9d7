"""The papers' experiments: what is run, and that it can be stopped and gone on with."""

import csv
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from tests.helpers.marks import slow_but
from tests.helpers.workshop import write_text
from train.config.command_line import parse
from train.config.config import Config
from train.config.presets import with_flags
from train.config.resolve import resolve
from train.data.dataset import DataConfig
from train.engine.optimizer import check_meant, make_optimizer
from train.experiment import COLUMNS, conclude, main, short_names
from train.experiments.cells import (
    Cell,
    ExperimentConfig,
    best_tries,
    expand,
    meant,
    tries,
)
from train.experiments.launch import Command, Ended
from train.experiments.papers import EXPERIMENTS
from train.experiments.runs import Experiment, Scale, flags, with_all

NAMES = [*EXPERIMENTS]
FILES = DataConfig(source="train.u16", eval_source="valid.u16")


@pytest.mark.parametrize("scale", slow_but(["minutes"], ["minutes", "hour", "full"]))
@pytest.mark.parametrize("name", NAMES)
def test_every_run_of_every_experiment_is_one(name: str, scale: str) -> None:
    """Its command line parses to the flags that it says, and its optimizer is built."""
    cells = expand(ExperimentConfig(name, scale=scale, data=FILES))
    for cell in {str(c.axes): c for c in cells}.values():
        config = parse(Config, "", cell.words, "train")
        assert config.out == cell.folder
        check_meant(config.optimizer, [config.optimizer])
        optimizer = resolve(config).optimizer
        make_optimizer(optimizer, config.steps, jax.random.key(0))
        for flag, value in cell.axes.items():
            parts = (config, config.optimizer, config.model, config.report)
            key = "name" if flag == "optimizer" else flag
            assert any(getattr(part, key, None) == value for part in parts), flag


def test_the_ablation_is_the_papers() -> None:
    cells = expand(ExperimentConfig("grass-figure-3", scale="hour", data=FILES))
    axes = Counter(tuple(cell.axes.values()) for cell in cells)
    assert len(axes) == 4 * 2 * 2 + 2  # a frozen basis has no rotation
    assert set(axes.values()) == {3}
    assert [cell.flags["seed"] for cell in cells] == [0] * 18 + [1] * 18 + [2] * 18


@pytest.mark.parametrize(
    ("steps", "every", "window"),
    [(1200, 40, 400), (60, 10, 30), (2000, 200, 1000), (90, 4, 30), (7, 1, 1)],
)
def test_what_moved_is_of_ten_subspaces_and_a_part_of_the_steps(
    steps: int, every: int, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most half of them, and a run saves where it begins."""
    run = {"optimizer": "galore", "refresh_every": every}
    moved = Experiment("One run", small=[run], full=[], weights_over=10)
    monkeypatch.setitem(EXPERIMENTS, "subspaces", moved)
    (cell,) = expand(ExperimentConfig("subspaces", steps=steps))
    assert (cell.flags["checkpoint_every"], cell.flags["keep"]) == (window, 2)


@pytest.mark.parametrize(
    ("name", "scale", "often"),
    [
        ("best", "minutes", 2),
        ("best", "hour", 7),
        ("best", "full", 7),
        ("second-round", "hour", 7),
        ("larger", "hour", 3),
        ("newer", "hour", 3),
    ],
)
def test_methods_are_tried_equally_often(name: str, scale: Scale, often: int) -> None:
    config = ExperimentConfig(name, scale=scale, data=FILES)
    cells = tries(config, expand(config))
    assert {*Counter(cell.flags["optimizer"] for cell in cells).values()} == {often}
    assert {cell.flags["seed"] for cell in cells} == {0}


@pytest.mark.parametrize(("scale", "rank"), [("minutes", 32), ("hour", 128)])
def test_a_walk_turns_one_direction_or_all(scale: Scale, rank: int) -> None:
    """One is the walk's own default: to name it would be the same run again."""
    cells = expand(ExperimentConfig("often", scale=scale, only="walk", data=FILES))
    assert {cell.flags["rank"] for cell in cells} == {rank}
    assert {cell.flags.get("walk_rank") for cell in cells} == {None, rank}


def end(cell: Cell, loss: float) -> None:
    """What a run leaves."""
    cell.folder.mkdir(parents=True)
    zeros = dict.fromkeys(COLUMNS, 0)
    summary = json.dumps({**zeros, "eval_loss": loss})
    (cell.folder / "summary.json").write_text(summary)


def test_the_best_of_each_method_is_run_again(tmp_path: Path) -> None:
    config = ExperimentConfig("best", scale="hour", data=FILES, out=tmp_path)
    cells = expand(config)
    assert best_tries(config, cells) == []  # nothing is known yet
    losses = {"adamw": [4.0, 3.9, math.nan], "muon": [3.7, math.inf]}
    for name, values in losses.items():
        of_method = [c for c in cells if c.flags["optimizer"] == name]
        for cell, loss in zip(of_method, values, strict=False):
            end(cell, loss)
    best = best_tries(config, cells)
    assert [(c.flags["optimizer"], c.flags["seed"]) for c in best] == [
        ("adamw", 0),
        ("muon", 0),
        ("adamw", 1),
        ("muon", 1),
        ("adamw", 2),
        ("muon", 2),
    ]
    assert {c.flags["learning_rate"] for c in best} == {1e-3, 3e-3}
    others = ExperimentConfig("often", scale="hour", data=FILES, out=tmp_path)
    assert best_tries(others, expand(others)) == expand(others)


def test_what_a_method_has_no_use_for_is_left_out() -> None:
    flags = {"optimizer": "adamw", "rank": 8, "refresh_every": 10, "steps": 5}
    assert meant(flags) == {"optimizer": "adamw", "steps": 5}
    of_preset = meant({"preset": "galore-60m", "optimizer": "adamw"})
    config = with_flags(Config(), of_preset)
    check_meant(config.optimizer, [config.optimizer])
    with pytest.raises(ValueError, match="no run has the options"):
        meant({"optimiser": "adamw"})


def test_more_text_is_asked_for() -> None:
    with pytest.raises(ValueError, match="needs more text"):
        expand(ExperimentConfig("sara-table-1", scale="hour"))
    with pytest.raises(ValueError, match=r"only='sarah' leaves no run of adamw, "):
        expand(ExperimentConfig("sara-table-1", only="sarah"))


@pytest.fixture
def one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs are processes with one device."""
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")


ABLATION = "grass-figure-3"
TINY = ("--steps", "4", "--only", "walk.*rescale")


def make_small() -> None:
    """The ablation's runs have little to do."""
    given = EXPERIMENTS[ABLATION]
    small = with_all(given.small, batch_size=8, seq_len=16)
    EXPERIMENTS[ABLATION] = dataclasses.replace(given, small=small)


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_it_stops_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EXPERIMENTS, ABLATION, EXPERIMENTS[ABLATION])  # put back
    make_small()
    out = tmp_path / "runs"
    write_text(tmp_path / "text.jsonl")
    text = ("--source", str(tmp_path / "text.jsonl"))
    argv = (ABLATION, *TINY, *text, "--out", str(out))
    do = (
        "from tests.train.test_experiment import main, make_small; make_small(); main()"
    )
    process = subprocess.Popen([sys.executable, "-c", do, *argv])
    first = out / "walk,rotate=off,back=rescale-0"
    while not (first / "summary.json").exists():
        assert process.poll() is None
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=300) == 130
    losses = json.loads((first / "summary.json").read_text())["eval_loss"]
    written = os.stat(first / "summary.json").st_mtime_ns

    main(argv)
    rows = list(csv.DictReader((out / "results.csv").open()))
    assert [row["rotate"] for row in rows] == ["off", "on"]
    assert float(rows[0]["eval_loss"]) == losses
    assert os.stat(first / "summary.json").st_mtime_ns == written  # not run again
    assert float(rows[1]["ppl_published"]) < float(rows[1]["ppl"])
    text = (out / "table.md").read_text()
    assert text.startswith("GrassWalk, Figure 3")
    assert "| on |" in text
    assert (out / "losses.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "time.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "final.png").stat().st_size > 1000
    assert (out / "memory.png").stat().st_size > 1000

    with pytest.raises(SystemExit, match="other settings"):
        main((*argv, "--steps", "5"))


def test_short_names_tell_runs_apart(tmp_path: Path) -> None:
    def named(*runs: str) -> list[str]:
        cells = [Cell(flags(run), {}, tmp_path) for run in runs]
        return [*short_names(cells).values()]

    two = "optimizer=galore basis=sara b2=0.9", "optimizer=fira b2=0.9"
    assert named(*two) == ["galore,sara", "fira"]
    rates = "optimizer=fira learning_rate=1", "optimizer=fira learning_rate=2"
    assert named(*rates) == ["fira,learning_rate=1", "fira,learning_rate=2"]


def test_runs_begin_with_the_weights_of_a_run() -> None:
    config = ExperimentConfig("fine-tuning", scale="hour", init_from="runs/a")
    cells = expand(config)  # of the trainer's own text: no --source is needed
    assert len(cells) == 63
    assert {cell.flags["init_from"] for cell in cells} == {"runs/a"}
    with pytest.raises(ValueError, match="name it by --source"):
        expand(dataclasses.replace(config, init_from=None))


@pytest.mark.parametrize("own", [None, "/elsewhere"])
def test_seeds_share_compiled_programs(
    own: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the experiment's folder until all is done, or where the environment says."""
    name = "JAX_COMPILATION_CACHE_DIR"
    monkeypatch.delenv(name, raising=False)
    if own:
        monkeypatch.setenv(name, own)
    out = tmp_path / "runs"
    argv = ("often", "--only", "walk_rank", "--seeds", "2", "--out", str(out))
    cells = expand(parse(ExperimentConfig, "", argv, "train.experiment"))
    seen = []

    def run_all(commands: list[Command], places: list[dict]) -> Iterator[Ended]:
        seen.extend(place[name] for place in places)
        (out / "compiled").mkdir(parents=True)
        for command, cell in zip(commands, cells, strict=True):
            end(cell, 4.0)
            yield Ended(command.name, 0)

    monkeypatch.setattr("train.experiment.run_all", run_all)
    main(argv)
    assert seen == [own or str(out / "compiled")]
    assert not (out / "compiled").exists()


def test_a_picture_has_the_names_of_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the flags that a run has alone, and the losses of its seeds together."""
    config = ExperimentConfig("often", out=tmp_path, only="walk,rotate=on", seeds=2)
    cells = expand(config)
    for cell in cells:
        end(cell, 4.0 + cell.flags["seed"])
    drawn = {}
    titles = set()

    def draw(losses, path, title, styles):
        drawn.update(losses)
        titles.add(title)
        assert [*styles] == [*losses]

    monkeypatch.setattr("train.experiment.draw_losses", draw)
    conclude(config, cells)
    # Not what the whole experiment compares: most of that was left out.
    assert titles == {"Ours: often, the runs named 'walk,rotate=on'\n(scale: minutes)"}
    assert drawn == {
        "walk,rotate=on": [4.0, 5.0],
        "walk,rotate=on,walk_rank=32": [4.0, 5.0],
    }


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_a_run_that_fails_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text.jsonl"
    write_text(text)
    bad = Experiment(
        "One run of two is no good",
        small=[
            {"optimizer": "galore", "source": str(tmp_path / "no.txt")},
            {
                "optimizer": "galore",
                "source": str(text),
                "batch_size": 8,
                "seq_len": 16,
            },
        ],
        full=[],
    )
    monkeypatch.setitem(EXPERIMENTS, "sara-table-1", bad)
    with pytest.raises(SystemExit, match="some runs failed"):
        main(("sara-table-1", "--steps", "2", "--out", str(tmp_path / "out")))
    rows = list(csv.DictReader((tmp_path / "out" / "results.csv").open()))
    assert "no file matches" in rows[0]["error"]
    assert rows[1]["eval_loss"]
