"""The experiments that `python -m train.experiment` runs: the papers', and ours.

`runs.py` says how they are written; `searches.py` has ours.
"""

from train.experiments.runs import (
    LARGER,
    Experiment,
    Flags,
    flags,
    grid,
    presets,
    with_all,
)
from train.experiments.searches import SEARCHES

SARA_OR_NOT = "basis=svd,sara"
SARA_PAIRS = [
    *grid(
        "optimizer=galore,galore_adafactor,galore_adam_mini,galore_adam8bit "
        + SARA_OR_NOT
    ),
    *grid(f"optimizer=fira {SARA_OR_NOT}"),
]
ADAMW = flags("optimizer=adamw")


def sara_at(*sizes: str) -> list[Flags]:
    """SARA's Table 1 with its own settings."""
    of_galore = presets(*(f"galore-sara-{size}" for size in sizes))
    return [
        *presets(*(f"adamw-{size}" for size in sizes)),
        *(run for pair in SARA_PAIRS for run in with_all(of_galore, **pair)),
    ]


# GrassWalk's ablation, section 5. A frozen basis has nothing to rotate with.
ABLATION = with_all(
    [
        *grid("basis=track,walk,jump,svd rotate=off,on back=project,rescale"),
        *grid("basis=frozen rotate=off back=project,rescale"),
    ],
    optimizer="subspace_adam",
)
# Its Table 1: 10,000 steps of LLaMA-1B on one GPU, a basis every 100 steps; batch, rank
# and rate are SubTrack++'s scripts', which it follows (the paper names none).
GRASS_1B = flags(
    "size=1b batch_size=16 seq_len=256 steps=10000 rank=512 refresh_every=100 "
    "learning_rate=1e-4 clip_norm=None"
)
GRASS_7B = GRASS_1B | flags("size=7b rank=1024")
GRASS_METHODS = grid(
    "optimizer=galore,apollo,ldadam,frugal,subtrack,grass_walk,grass_jump"
)
FIGURES_1_2 = flags("optimizer=subtrack measure=all")  # the method of section 3
GALORE_PAIR = grid(f"optimizer=galore {SARA_OR_NOT}")
GALORE_SMALL = ("galore-sara-60m", "galore-sara-130m")

EXPERIMENTS: dict[str, Experiment] = {
    **SEARCHES,
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
        full=[*presets("adamw-1b"), *presets("galore-sara-1b", axes=SARA_OR_NOT)],
        at_hour=LARGER,
        seeds=1,
        against={"basis": "svd"},
    ),
    "sara-table-3": Experiment(
        "SARA, Table 3: GoLore and online PCA beside GaLore with SARA",
        small=[
            ADAMW,
            *grid("optimizer=golore,online_subspace_descent"),
            flags("optimizer=galore basis=sara"),
        ],
        full=[
            *presets("adamw-60m", "adamw-130m"),
            *presets(
                *GALORE_SMALL,
                axes="optimizer=golore,online_subspace_descent basis=default",
            ),
            *presets(*GALORE_SMALL),
        ],
    ),
    "sara-table-4": Experiment(
        "SARA, Table 4: SlimPajama, which --source names",
        small=[ADAMW, *GALORE_PAIR],
        full=[
            *presets("adamw-60m", "adamw-130m"),
            *presets(*GALORE_SMALL, axes=SARA_OR_NOT),
        ],
        against={"basis": "svd"},
    ),
    "sara-figures-2-3": Experiment(
        "SARA, Figures 2 and 3: overlap with the subspace before, and with an anchor",
        small=with_all(GALORE_PAIR, measure="overlap", anchor=2),
        full=with_all(
            presets("galore-60m", axes=SARA_OR_NOT),
            measure="overlap",
            anchor=10,  # at step 2,000
        ),
        seeds=1,
        measured=("overlap", "anchor"),
    ),
    "sara-figure-4": Experiment(
        "SARA, Figure 4: the spectrum of what weights move late in training",
        small=GALORE_PAIR,
        full=presets("galore-60m", axes=SARA_OR_NOT),
        at_hour={"refresh_every": 40},
        seeds=1,
        weights_over=10,  # 2,000 steps
    ),
    "grass-figures-1-2": Experiment(
        "GrassWalk, Figures 1 and 2: energy in the subspace, derivative of the error",
        small=[FIGURES_1_2],
        full=[GRASS_1B | FIGURES_1_2],
        seeds=1,
        measured=("energy", "layer_energy", "derivative"),
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
        small=[ADAMW, *GRASS_METHODS],
        full=with_all(GRASS_METHODS, **GRASS_1B),
        at_hour={"refresh_every": 100},
    ),
    "grass-table-2": Experiment(
        "GrassWalk, Table 2 and Figure 4b: SubTrack++, GrassWalk and GrassJump at 7B",
        small=GRASS_METHODS[-3:],
        full=with_all(GRASS_METHODS[-3:], **GRASS_7B),
        at_hour={**LARGER, "refresh_every": 100},
        seeds=1,
    ),
}
