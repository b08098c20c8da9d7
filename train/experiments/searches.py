"""Our own experiments: which settings, and which parts, are best.

See train/experiments/runs.py for how they are written.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import lowrank_optax as lro
from train.config.methods import METHODS
from train.experiments.runs import (
    HOUR,
    LARGER,
    MINUTES,
    Experiment,
    Flags,
    around,
    flags,
    grid,
    with_all,
)

# Seven tries for each method, around the best that was known.
LIKE_LDADAM = "learning_rate=3e-3 b1=0.908 b2=0.99"
BY_METHOD = [
    around(
        "optimizer=adamw learning_rate=2e-3 b2=0.98 clip_norm=1.0",
        "learning_rate=1e-3,4e-3 b1=0.8 b2=0.999 clip_norm=None warmup=0.2",
    ),
    around(
        "optimizer=muon learning_rate=3e-3",
        "learning_rate=2e-3,4.5e-3 b2=0.98 scale=0.1,0.4 clip_norm=1.0",
    ),
    around(
        "optimizer=galore learning_rate=1e-2",
        "learning_rate=5e-3,2e-2 refresh_every=50 scale=0.5 b2=0.99 clip_norm=1.0",
    ),
    around(
        "optimizer=ldadam learning_rate=3e-3",
        "learning_rate=2e-3,4.5e-3 b1=0.95 b2=0.98,0.999 clip_norm=1.0",
    ),
    around(
        f"optimizer=grass_jump basis=sara refresh_every=100 {LIKE_LDADAM}",
        "learning_rate=2e-3,4.5e-3 refresh_every=10 basis=default,walk clip_norm=1.0",
    ),
    around(
        "optimizer=alice learning_rate=1e-2",
        "learning_rate=5e-3,2e-2 refresh_every=10 b2=0.99 residual_scale=1.0 "
        "clip_norm=1.0",
    ),
    around(
        "optimizer=spectral_adam learning_rate=3e-3 refresh_every=10",
        "learning_rate=2e-3,4.5e-3 refresh_every=50 residual_scale=0.3,1.0 "
        "clip_norm=1.0",
    ),
]
TRIES = [*itertools.chain(*BY_METHOD)]
# And seven around AdamW's best of these, which lay at an edge, and around the winner.
AGAIN = [
    *around(
        "optimizer=adamw learning_rate=2e-3 b2=0.98 clip_norm=1.0 warmup=0.2",
        "b1=0.8 warmup=0.3 learning_rate=1e-3,3e-3 b2=0.95,0.99",
    ),
    *around(
        "optimizer=spectral_adam learning_rate=4.5e-3 refresh_every=10",
        "warmup=0.05,0.2 learning_rate=6e-3 b2=0.98 residual_scale=0.3,1.0",
    ),
]
# The winners of these, at three rates each, for a larger model.
WINNERS = [
    *grid(
        "optimizer=adamw learning_rate=2e-3,1e-3,5e-4 b2=0.98 clip_norm=1.0 warmup=0.2"
    ),
    *grid("optimizer=spectral_adam learning_rate=4.5e-3,3e-3,2e-3 refresh_every=10"),
    *grid(
        "optimizer=grass_jump basis=sara learning_rate=3e-3,2e-3,1e-3 b1=0.908 b2=0.99 "
        "clip_norm=1.0 refresh_every=100"
    ),
]
# Newer methods: three rates of each, a factor of two apart.
NEWER = [
    *grid("optimizer=alice_0 learning_rate=1e-2,5e-3,2.5e-3"),
    *grid("optimizer=racs learning_rate=4e-2,2e-2,1e-2"),
    *grid("optimizer=sumo learning_rate=2e-3,1e-3,5e-4"),
    *grid("optimizer=dct_adamw learning_rate=2e-3,1e-3,5e-4 refresh_every=1"),
    *grid("optimizer=scale_sgd learning_rate=1e-3,5e-4,2.5e-4"),
]
# LDAdam with each of its parts taken away, or replaced by another's.
LDADAM_PARTS = with_all(
    around(
        "basis=power back=feedback refresh_every=1 b2=0.99",
        "refresh_every=10 basis=sketch rotate=off back=project,rescale,spectral "
        "b2=0.999",
    ),
    **flags(f"{LIKE_LDADAM} optimizer=subspace_adam residual_scale=0.5"),
)
# Whether rotation pays for a random basis at another rate, or with a shorter memory.
ROTATION = with_all(
    grid("rotate=off,first,on learning_rate=1e-3,2e-3,4e-3 b2=0.999,0.99,0.95"),
    **flags("optimizer=subspace_adam basis=jump back=rescale"),
)
# Every method as the library recommends it, SARA's basis where it gained, and the best
# AdamW of the tries above.
RECOMMENDED = [
    flags("optimizer=adamw learning_rate=2e-3 b1=0.8 b2=0.98 clip_norm=1.0 warmup=0.2"),
    flags("optimizer=muon"),
    *({"optimizer": name} for name, row in lro.METHODS.items() if row.measured),
    *grid("optimizer=grass_jump,fira basis=sara"),
    flags("optimizer=fira_adam8bit"),
]
# GrassWalk's Table 1, with AdamW, SARA and spectral_adam: half of the best rate at 60M,
# and a quarter, since the best rates fall as models grow.
BILLION = [
    *grid("optimizer=galore basis=default,sara learning_rate=5e-3,2.5e-3"),
    *grid("optimizer=apollo,ldadam learning_rate=1.5e-3,7.5e-4"),
    *grid("optimizer=fira basis=sara learning_rate=1.5e-3,7.5e-4"),
    *grid("optimizer=frugal learning_rate=5e-4,2.5e-4"),
    *grid("optimizer=subtrack,grass_walk,grass_jump learning_rate=1e-3,5e-4"),
    *grid("optimizer=spectral_adam learning_rate=2e-3,1e-3"),
    *grid(
        "optimizer=adamw learning_rate=1e-3,5e-4 b1=0.8 b2=0.98 clip_norm=1.0 "
        "warmup=0.2"
    ),
]
# Fine-tuning: parts of the rate that is best from the start.
FINE_TUNED = [
    {"optimizer": name, "learning_rate": float(f"{part * METHODS[name].rate:.2g}")}
    for name in (
        "adamw",
        "galore",
        "galore_adam8bit",
        "fira",
        "grass_jump",
        "spectral_adam",
        "apollo_mini",
    )
    for part in (0.1, 0.3, 1.0)
]
OVERLAP = grid("optimizer=galore basis=svd,sara,jump measure=overlap")


def often(rank: int) -> list[Flags]:
    """Which basis, where the polar factor of the residual is added to the step.

    The walk takes one direction, its default, or all `rank` of them.
    """
    bases = grid("basis=power,svd,sara,jump,walk") + grid(
        f"basis=walk walk_rank={rank}"
    )
    return with_all(
        [{**basis, "rotate": rotate} for rotate in ("on", "off") for basis in bases],
        **flags(f"{LIKE_LDADAM} optimizer=subspace_adam back=spectral"),
        refresh_every=10,
        residual_scale=0.5,
    )


def search(about: str, runs: Sequence[Flags], **fields: Any) -> Experiment:
    """Runs at 60M, and at the scale full the same at 130M."""
    full = with_all(runs, **HOUR | LARGER)
    return Experiment(f"Ours: {about}", **{"small": runs, "full": full, **fields})


SEARCHES: dict[str, Experiment] = {
    "recommended": search(
        "every method at the settings that the library recommends",
        RECOMMENDED,
        at_hour={"refresh_every": None},
        seeds=1,
    ),
    "fine-tuning": search(
        "from the weights of --init-from, three rates of each method",
        FINE_TUNED,
        at_hour=flags("steps=300 batch_size=32 refresh_every=50 clip_norm=1.0"),
        best_of="optimizer",
    ),
    "best": search(
        "seven tries for each method, and the best of each again",
        TRIES,
        minutes=[run for tries in BY_METHOD for run in tries[:2]],
        best_of="optimizer",
    ),
    "second-round": search(
        "seven tries more for AdamW and for the winner of best",
        AGAIN,
        best_of="optimizer",
    ),
    "larger": search(
        "the winners of best at 130M, beside AdamW",
        WINNERS,
        at_hour={**LARGER, "steps": 1200},
        best_of="optimizer",
    ),
    "billion": search(
        "GrassWalk's Table 1 at 1B on 4.9 M tokens, two rates of each method",
        BILLION,
        full=with_all(BILLION, **flags("size=1b batch_size=16 seq_len=256 rank=512")),
        minutes=BILLION[::2],
        at_hour=flags("size=1b batch_size=32 steps=600 rank=512 refresh_every=None"),
        seeds=1,
    ),
    "newer": search(
        "newer methods, three rates of each", NEWER, best_of="optimizer", seeds=1
    ),
    "ldadam-parts": search(
        "what LDAdam's lead comes from, each of its parts taken away",
        LDADAM_PARTS,
        seeds=1,
    ),
    "often": search(
        "which basis, where a new one comes every 10 steps",
        often(LARGER["rank"]),
        minutes=often(MINUTES["rank"]),
        small=often(HOUR["rank"]),
        seeds=1,
        against={"rotate": "off"},
    ),
    "rotation": search(
        "at which rate and b2 rotation pays for a random basis",
        ROTATION,
        minutes=[run for run in ROTATION if run["b2"] != 0.99],
        at_hour={"batch_size": 32, "refresh_every": 40},
        seeds=1,
        against={"rotate": "off"},
    ),
    "subspaces": search(
        "overlap and rank of what moved, from dominant to sampled to random",
        OVERLAP,
        at_hour={"refresh_every": 40},
        measured=("overlap",),
        weights_over=10,
    ),
}
