"""The experiments that `python -m train.experiment` runs, as they are read.

Each is a list of runs, a run being the flags in which it differs; `grid` makes all
combinations. There are three scales of the same question: "minutes" for a laptop's CPU,
"hour" for one GPU, "full" as the paper has it.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

Scale = Literal["minutes", "hour", "full"]
Run = dict[str, Any]
"""Flags of a run by their names, as the command line has them."""

# The tiny model and the text that come with the trainer.
MINUTES: Run = {"steps": 60, "rank": 32, "refresh_every": 10, "log_every": 5}
# 39.3 M tokens: at a tenth of it LLaMA-60M's losses order as at its end.
HOUR: Run = {
    "size": "60m",
    "batch_size": 128,
    "seq_len": 256,
    "steps": 1200,
    "rank": 128,
    "refresh_every": 200,
    "clip_norm": None,
    "eval_every": 0,
}
SHARED: dict[Scale, Run] = {"minutes": MINUTES, "hour": HOUR, "full": {}}


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Runs that answer one question.

    Attributes:
      about: what it is, and where it is from.
      runs: for each scale, the flags of each run.
      seeds: how often each is run, with seeds 0, 1, ..., but for "full": once.
      against: a flag and its value: every run is compared with the one that has this
        value and is otherwise alike, seed by seed.
      measured: prefixes of metrics ("overlap") that are drawn over the steps.
      weights_between: two parts of the steps: the spectrum of what the weights moved
        between these is drawn.
    """

    about: str
    runs: Mapping[Scale, Sequence[Run]]
    seeds: int = 3
    against: tuple[str, Any] | None = None
    measured: tuple[str, ...] = ()
    weights_between: tuple[float, float] | None = None


def grid(**axes: Sequence[Any]) -> list[Run]:
    """Every combination of the values of some flags."""
    return [
        dict(zip(axes, values, strict=True))
        for values in itertools.product(*axes.values())
    ]


def with_all(runs: Sequence[Run], **flags: Any) -> list[Run]:
    """The runs with flags that they have in common; their own come first."""
    return [{**flags, **run} for run in runs]


def presets(*names: str, **axes: Sequence[Any]) -> list[Run]:
    """Published settings, each with every combination of the axes."""
    return grid(preset=names, **axes)


SARA_OR_NOT = ("svd", "sara")
SARA_PAIRS = grid(
    optimizer=("galore", "galore_adafactor", "galore_adam_mini", "galore_adam8bit"),
    basis=SARA_OR_NOT,
) + grid(optimizer=("fira",), basis=SARA_OR_NOT)
ADAMW: Run = {"optimizer": "adamw"}


def sara_at(*sizes: str) -> list[Run]:
    """SARA's Table 1 with its own settings."""
    of_galore = tuple(f"galore-sara-{size}" for size in sizes)
    return [
        *presets(*(f"adamw-{size}" for size in sizes)),
        *(run for pair in SARA_PAIRS for run in with_all(presets(*of_galore), **pair)),
    ]


# GrassWalk's ablation, section 5. A frozen basis has nothing to rotate with.
ABLATION = with_all(
    [
        *grid(
            basis=("track", "walk", "jump", "svd"),
            rotate=("off", "on"),
            back=("project", "rescale"),
        ),
        *grid(basis=("frozen",), rotate=("off",), back=("project", "rescale")),
    ],
    optimizer="subspace_adam",
)
# Its Table 1: 10,000 steps of LLaMA-1B on one GPU, a basis every 100 steps; batch, rank
# and rate are SubTrack++'s scripts', which it follows (the paper names none).
GRASS_1B: Run = {
    "size": "1b",
    "batch_size": 16,
    "seq_len": 256,
    "steps": 10_000,
    "rank": 512,
    "refresh_every": 100,
    "learning_rate": 1e-4,
    "clip_norm": None,
}
GRASS_METHODS = (
    "galore",
    "apollo",
    "ldadam",
    "frugal",
    "subtrack",
    "grass_walk",
    "grass_jump",
)
# What the search tries of every method: as many runs for one as for another.
RATES = (1e-3, 2e-3, 3e-3, 5e-3, 1e-2)

EXPERIMENTS: dict[str, Experiment] = {
    "sara-table-1": Experiment(
        "SARA, Table 1: sampled against dominant subspaces in five low-rank Adams",
        {
            "minutes": [ADAMW, *SARA_PAIRS],
            "hour": [ADAMW, *SARA_PAIRS],
            "full": sara_at("60m", "130m", "350m"),
        },
        against=("basis", "svd"),
    ),
    "sara-table-2": Experiment(
        "SARA, Table 2: GaLore with and without SARA at 1.1B",
        {
            "minutes": [ADAMW, *grid(optimizer=("galore",), basis=SARA_OR_NOT)],
            "hour": with_all(
                [ADAMW, *grid(optimizer=("galore",), basis=SARA_OR_NOT)],
                size="130m",
                steps=2000,
                rank=256,
            ),
            "full": [
                *presets("adamw-1b"),
                *presets("galore-sara-1b", basis=SARA_OR_NOT),
            ],
        },
        seeds=1,
        against=("basis", "svd"),
    ),
    "sara-table-3": Experiment(
        "SARA, Table 3: GoLore and online PCA beside GaLore with SARA",
        {
            scale: [
                ADAMW,
                {"optimizer": "golore"},
                {"optimizer": "online_subspace_descent"},
                {"optimizer": "galore", "basis": "sara"},
            ]
            for scale in ("minutes", "hour")
        }
        | {
            "full": [
                *presets("adamw-60m", "adamw-130m"),
                *presets(
                    "galore-sara-60m",
                    "galore-sara-130m",
                    optimizer=("golore", "online_subspace_descent"),
                    basis=("default",),
                ),
                *presets("galore-sara-60m", "galore-sara-130m"),
            ]
        },
    ),
    "sara-table-4": Experiment(
        "SARA, Table 4: SlimPajama; give it by --source",
        {
            scale: [ADAMW, *grid(optimizer=("galore",), basis=SARA_OR_NOT)]
            for scale in ("minutes", "hour")
        }
        | {
            "full": [
                *presets("adamw-60m", "adamw-130m"),
                *presets("galore-sara-60m", "galore-sara-130m", basis=SARA_OR_NOT),
            ]
        },
        against=("basis", "svd"),
    ),
    "sara-figures-2-3": Experiment(
        "SARA, Figures 2 and 3: overlap with the subspace before, and with an anchor",
        {
            scale: with_all(
                grid(optimizer=("galore",), basis=SARA_OR_NOT), measure="all"
            )
            for scale in ("minutes", "hour")
        }
        | {"full": with_all(presets("galore-60m", basis=SARA_OR_NOT), measure="all")},
        seeds=1,
        against=("basis", "svd"),
        measured=("overlap", "anchor_overlap"),
    ),
    "sara-figure-4": Experiment(
        "SARA, Figure 4: the spectrum of what weights move late in training",
        {
            scale: grid(optimizer=("galore",), basis=SARA_OR_NOT)
            for scale in ("minutes", "hour")
        }
        | {"full": presets("galore-60m", basis=SARA_OR_NOT)},
        seeds=1,
        against=("basis", "svd"),
        weights_between=(28 / 30, 1.0),
    ),
    "grass-figures-1-2": Experiment(
        "GrassWalk, Figures 1 and 2: energy in the subspace, derivative of the error",
        {
            scale: [{"optimizer": "galore", "measure": "all"}]
            for scale in ("minutes", "hour")
        }
        | {"full": [{**GRASS_1B, "optimizer": "galore", "measure": "all"}]},
        seeds=1,
        measured=("energy", "error_spectrum"),
    ),
    "grass-figure-3": Experiment(
        "GrassWalk, Figure 3: {track, walk, jump, svd, frozen} x rotation x recovery",
        {
            "minutes": ABLATION,
            "hour": with_all(ABLATION, refresh_every=100, learning_rate=2e-3),
            "full": with_all(ABLATION, **GRASS_1B),
        },
    ),
    "grass-table-1": Experiment(
        "GrassWalk, Table 1 and Figure 4a: the methods at 1B, with memory and time",
        {
            "minutes": [ADAMW, *grid(optimizer=GRASS_METHODS)],
            "hour": with_all(
                [ADAMW, *grid(optimizer=GRASS_METHODS)], refresh_every=100
            ),
            "full": with_all(grid(optimizer=GRASS_METHODS), **GRASS_1B),
        },
    ),
    "grass-table-2": Experiment(
        "GrassWalk, Table 2 and Figure 4b: SubTrack++, GrassWalk and GrassJump at 7B",
        {
            "minutes": grid(optimizer=GRASS_METHODS[-3:]),
            "hour": with_all(
                grid(optimizer=GRASS_METHODS[-3:]),
                size="130m",
                steps=2000,
                rank=256,
                refresh_every=100,
            ),
            "full": with_all(
                grid(optimizer=GRASS_METHODS[-3:]),
                **{**GRASS_1B, "size": "7b", "rank": 1024},
            ),
        },
        seeds=1,
    ),
}
