"""The experiments that `python -m train.experiment` runs, as they are read.

Each is a list of runs, a run being the flags in which it differs; `grid` makes all
combinations. There are three scales of the same question: "minutes" for a laptop's CPU,
"hour" for one GPU, "full" as the paper has it (ours: LLaMA-130M).
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, Literal

Scale = Literal["minutes", "hour", "full"]
Run = dict[str, Any]
"""Flags of a run by their names, as the command line has them."""

# The tiny model and the text that come with the trainer.
MINUTES: Run = {"steps": 60, "rank": 32, "refresh_every": 10, "log_every": 5}
# 39.3 M tokens: the work of the README's tables.
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
      small: the flags of each run at the scales minutes and hour.
      full: the same as the paper has it.
      at_hour: what all runs have at the scale hour besides.
      minutes: the flags of each run at the scale minutes, where `small` has too many.
      best_of: a flag, where the runs are tries: each is made with seed 0, and the best
        of each value of the flag with the other seeds too.
      seeds: how often each is run at the scale hour, with seeds 0, 1, ...
      against: flags and their values: every run is compared with the one that has
        these values and is otherwise alike, seed by seed.
      measured: prefixes of metrics ("overlap") that are drawn over the steps.
      weights_over: so many subspaces at the end of a run, at most half of its steps;
        the spectrum of what the weights move meanwhile is drawn.
    """

    about: str
    small: Sequence[Run]
    full: Sequence[Run]
    at_hour: Run = dataclasses.field(default_factory=dict)
    minutes: Sequence[Run] = ()
    best_of: str | None = None
    seeds: int = 3
    against: Run | None = None
    measured: tuple[str, ...] = ()
    weights_over: int | None = None

    def runs(self, scale: Scale) -> list[Run]:
        """The flags of each run, but for those that all runs of a scale share."""
        if scale == "hour":
            return with_all(self.small, **self.at_hour)
        if scale == "minutes":
            return [*(self.minutes or self.small)]
        return [*self.full]


def grid(**axes: Sequence[Any]) -> list[Run]:
    """Every combination of the values of some flags."""
    return [
        dict(zip(axes, values, strict=True))
        for values in itertools.product(*axes.values())
    ]


def around(center: Run, **axes: Sequence[Any]) -> list[Run]:
    """A run, and those that differ from it in one flag."""
    moved = [{flag: value} for flag, values in axes.items() for value in values]
    return [center, *(center | flag for flag in moved)]


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
SIZE_7B: Run = {"size": "7b", "rank": 1024}
GRASS_METHODS = (
    "galore",
    "apollo",
    "ldadam",
    "frugal",
    "subtrack",
    "grass_walk",
    "grass_jump",
)
GALORE_PAIR = grid(optimizer=("galore",), basis=SARA_OR_NOT)
LARGER: Run = {"size": "130m", "steps": 2000, "rank": 256}  # for what is large in full

OVERLAP = grid(
    optimizer=("galore",), basis=("svd", "sara", "jump"), measure=("overlap",)
)

# Ours: seven tries for each method, around the best that was known.
LIKE_LDADAM: Run = {"learning_rate": 3e-3, "b1": 0.908, "b2": 0.99}
BY_METHOD = [
    around(
        {"optimizer": "adamw", "learning_rate": 2e-3, "b2": 0.98, "clip_norm": 1.0},
        learning_rate=(1e-3, 4e-3),
        b1=(0.8,),
        b2=(0.999,),
        clip_norm=(None,),
        warmup=(0.2,),
    ),
    around(
        {"optimizer": "muon", "learning_rate": 3e-3},
        learning_rate=(2e-3, 4.5e-3),
        b2=(0.98,),
        scale=(0.1, 0.4),
        clip_norm=(1.0,),
    ),
    around(
        {"optimizer": "galore", "learning_rate": 1e-2},
        learning_rate=(5e-3, 2e-2),
        refresh_every=(50,),
        scale=(0.5,),
        b2=(0.99,),
        clip_norm=(1.0,),
    ),
    around(
        {"optimizer": "ldadam", "learning_rate": 3e-3},
        learning_rate=(2e-3, 4.5e-3),
        b1=(0.95,),
        b2=(0.98, 0.999),
        clip_norm=(1.0,),
    ),
    around(
        {"optimizer": "grass_jump", "basis": "sara", "refresh_every": 100}
        | LIKE_LDADAM,
        learning_rate=(2e-3, 4.5e-3),
        refresh_every=(10,),
        basis=("default", "walk"),
        clip_norm=(1.0,),
    ),
    around(
        {"optimizer": "alice", "learning_rate": 1e-2},
        learning_rate=(5e-3, 2e-2),
        refresh_every=(10,),
        b2=(0.99,),
        residual_scale=(1.0,),
        clip_norm=(1.0,),
    ),
    around(
        {"optimizer": "spectral_adam", "learning_rate": 3e-3, "refresh_every": 10},
        learning_rate=(2e-3, 4.5e-3),
        refresh_every=(50,),
        residual_scale=(0.3, 1.0),
        clip_norm=(1.0,),
    ),
]
TRIES = [*itertools.chain(*BY_METHOD)]
# The winners of these, at two rates each.
WINNERS = [
    *grid(
        optimizer=("adamw",),
        learning_rate=(2e-3, 1e-3),
        b2=(0.98,),
        clip_norm=(1.0,),
        warmup=(0.2,),
    ),
    *grid(
        optimizer=("spectral_adam",), learning_rate=(4.5e-3, 3e-3), refresh_every=(10,)
    ),
    *grid(
        optimizer=("grass_jump",),
        basis=("sara",),
        learning_rate=(3e-3, 2e-3),
        b1=(0.908,),
        b2=(0.99,),
        clip_norm=(1.0,),
        refresh_every=(100,),
    ),
]
# Newer methods: the default rate, a half of it, and twice.
NEWER = [
    *grid(optimizer=("alice_0",), learning_rate=(5e-3, 2.5e-3, 1e-2)),
    *grid(
        optimizer=("dct_adamw",),
        learning_rate=(2e-3, 1e-3, 4e-3),
        refresh_every=(1,),
    ),
    *grid(optimizer=("sumo",), learning_rate=(2e-3, 1e-3, 4e-3)),
    *grid(optimizer=("racs",), learning_rate=(2e-2, 1e-2, 4e-2)),
    *grid(optimizer=("scale_sgd",), learning_rate=(1e-3, 5e-4, 2e-3)),
]
# What LDAdam's lead comes from: its parts taken away, or put in another's place.
LDADAM_PARTS = with_all(
    around(
        {"basis": "power", "back": "feedback", "refresh_every": 1, "b2": 0.99},
        refresh_every=(10,),
        basis=("sketch",),
        rotate=("off",),
        back=("project", "rescale", "spectral"),
        b2=(0.999,),
    ),
    **{**LIKE_LDADAM, "optimizer": "subspace_adam", "residual_scale": 0.5},
)
# Which basis, where the rest comes back by its polar factor.
OFTEN = with_all(
    [
        *around({"basis": "power"}, basis=("svd", "sara", "jump", "walk")),
        {"basis": "walk", "walk_rank": 1},
        {"basis": "power", "rotate": "off"},
    ],
    **{**LIKE_LDADAM, "optimizer": "subspace_adam", "back": "spectral"},
    refresh_every=10,
    residual_scale=0.5,
)

EXPERIMENTS: dict[str, Experiment] = {
    "best": Experiment(
        "Ours: seven tries for each method, and the best of each again",
        minutes=[run for tries in BY_METHOD for run in tries[:2]],
        small=TRIES,
        full=with_all(TRIES, **HOUR | LARGER),
        best_of="optimizer",
    ),
    "larger": Experiment(
        "Ours: the winners of these at 130M, beside AdamW",
        small=WINNERS,
        full=with_all(WINNERS, **HOUR | LARGER),
        at_hour={"size": "130m", "rank": 192},
        best_of="optimizer",
    ),
    "newer": Experiment(
        "Ours: newer methods, three rates of each",
        small=NEWER,
        full=with_all(NEWER, **HOUR | LARGER),
        best_of="optimizer",
        seeds=1,
    ),
    "ldadam-parts": Experiment(
        "Ours: what LDAdam's lead comes from, each of its parts taken away",
        small=LDADAM_PARTS,
        full=with_all(LDADAM_PARTS, **HOUR | LARGER),
        seeds=1,
    ),
    "often": Experiment(
        "Ours: which basis, where a new one comes every 10 steps",
        small=OFTEN,
        full=with_all(OFTEN, **HOUR | LARGER),
        seeds=1,
    ),
    "subspaces": Experiment(
        "Ours: overlap and rank of what moved, from dominant to sampled to random",
        small=OVERLAP,
        full=with_all(OVERLAP, **HOUR | LARGER),
        at_hour={"refresh_every": 40},
        measured=("overlap",),
        weights_over=10,
    ),
    "sara-table-1": Experiment(
        "SARA, Table 1: sampled against dominant subspaces in five low-rank Adams",
        small=[ADAMW, *SARA_PAIRS],
        full=sara_at("60m", "130m", "350m"),
        at_hour={"refresh_every": 40},  # 30 subspaces; the paper's 60M has 29
        against={"basis": "svd"},
    ),
    "sara-table-2": Experiment(
        "SARA, Table 2: GaLore with and without SARA at 1.1B",
        small=[ADAMW, *GALORE_PAIR],
        full=[*presets("adamw-1b"), *presets("galore-sara-1b", basis=SARA_OR_NOT)],
        at_hour=LARGER,
        seeds=1,
        against={"basis": "svd"},
    ),
    "sara-table-3": Experiment(
        "SARA, Table 3: GoLore and online PCA beside GaLore with SARA",
        small=[
            ADAMW,
            *grid(optimizer=("golore", "online_subspace_descent")),
            {"optimizer": "galore", "basis": "sara"},
        ],
        full=[
            *presets("adamw-60m", "adamw-130m"),
            *presets(
                "galore-sara-60m",
                "galore-sara-130m",
                optimizer=("golore", "online_subspace_descent"),
                basis=("default",),
            ),
            *presets("galore-sara-60m", "galore-sara-130m"),
        ],
    ),
    "sara-table-4": Experiment(
        "SARA, Table 4: SlimPajama, which --source names",
        small=[ADAMW, *GALORE_PAIR],
        full=[
            *presets("adamw-60m", "adamw-130m"),
            *presets("galore-sara-60m", "galore-sara-130m", basis=SARA_OR_NOT),
        ],
        against={"basis": "svd"},
    ),
    "sara-figures-2-3": Experiment(
        "SARA, Figures 2 and 3: overlap with the subspace before, and with an anchor",
        small=with_all(GALORE_PAIR, measure="overlap", anchor=2),
        full=with_all(
            presets("galore-60m", basis=SARA_OR_NOT),
            measure="overlap",
            anchor=10,  # at step 2,000
        ),
        seeds=1,
        measured=("overlap", "anchor"),
    ),
    "sara-figure-4": Experiment(
        "SARA, Figure 4: the spectrum of what weights move late in training",
        small=GALORE_PAIR,
        full=presets("galore-60m", basis=SARA_OR_NOT),
        at_hour={"refresh_every": 40},
        seeds=1,
        weights_over=10,  # 2,000 steps
    ),
    "grass-figures-1-2": Experiment(
        "GrassWalk, Figures 1 and 2: energy in the subspace, derivative of the error",
        small=[{"optimizer": "galore", "measure": "all"}],
        full=[{**GRASS_1B, "optimizer": "galore", "measure": "all"}],
        seeds=1,
        measured=("energy", "derivative"),
    ),
    "grass-figure-3": Experiment(
        "GrassWalk, Figure 3: {track, walk, jump, svd, frozen} x rotation x recovery",
        small=ABLATION,
        full=with_all(ABLATION, **GRASS_1B),
        # As the paper's steps are: many, of small batches, with many subspaces.
        at_hour={"batch_size": 32, "refresh_every": 40},
        against={"rotate": "off", "back": "project"},
    ),
    "grass-table-1": Experiment(
        "GrassWalk, Table 1 and Figure 4a: the methods at 1B, with memory and time",
        small=[ADAMW, *grid(optimizer=GRASS_METHODS)],
        full=with_all(grid(optimizer=GRASS_METHODS), **GRASS_1B),
        at_hour={"refresh_every": 100},
    ),
    "grass-table-2": Experiment(
        "GrassWalk, Table 2 and Figure 4b: SubTrack++, GrassWalk and GrassJump at 7B",
        small=grid(optimizer=GRASS_METHODS[-3:]),
        full=with_all(grid(optimizer=GRASS_METHODS[-3:]), **GRASS_1B | SIZE_7B),
        at_hour={**LARGER, "refresh_every": 100},
        seeds=1,
    ),
}
