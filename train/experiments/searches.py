"""Our own experiments: which settings, and which parts, are best.

See train/experiments/runs.py for how they are written.
"""

import itertools

from train.experiments.runs import (
    HOUR,
    LARGER,
    MINUTES,
    Experiment,
    Run,
    around,
    grid,
    with_all,
)

OVERLAP = grid(
    optimizer=("galore",), basis=("svd", "sara", "jump"), measure=("overlap",)
)

# Seven tries for each method, around the best that was known.
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
# And seven around AdamW's best of these, which lay at an edge, and around the winner.
AGAIN = [
    *around(
        {
            "optimizer": "adamw",
            "learning_rate": 2e-3,
            "b2": 0.98,
            "clip_norm": 1.0,
            "warmup": 0.2,
        },
        b1=(0.8,),
        warmup=(0.3,),
        learning_rate=(1e-3, 3e-3),
        b2=(0.95, 0.99),
    ),
    *around(
        {"optimizer": "spectral_adam", "learning_rate": 4.5e-3, "refresh_every": 10},
        warmup=(0.05, 0.2),
        learning_rate=(6e-3,),
        b2=(0.98,),
        residual_scale=(0.3, 1.0),
    ),
]
# The winners of these, at three rates each, for a larger model.
WINNERS = [
    *grid(
        optimizer=("adamw",),
        learning_rate=(2e-3, 1e-3, 5e-4),
        b2=(0.98,),
        clip_norm=(1.0,),
        warmup=(0.2,),
    ),
    *grid(
        optimizer=("spectral_adam",),
        learning_rate=(4.5e-3, 3e-3, 2e-3),
        refresh_every=(10,),
    ),
    *grid(
        optimizer=("grass_jump",),
        basis=("sara",),
        learning_rate=(3e-3, 2e-3, 1e-3),
        b1=(0.908,),
        b2=(0.99,),
        clip_norm=(1.0,),
        refresh_every=(100,),
    ),
]
# Newer methods: three rates of each, a factor of two apart.
NEWER = [
    *grid(optimizer=("alice_0",), learning_rate=(1e-2, 5e-3, 2.5e-3)),
    *grid(optimizer=("racs",), learning_rate=(4e-2, 2e-2, 1e-2)),
    *grid(optimizer=("sumo",), learning_rate=(2e-3, 1e-3, 5e-4)),
    *grid(
        optimizer=("dct_adamw",),
        learning_rate=(2e-3, 1e-3, 5e-4),
        refresh_every=(1,),
    ),
    *grid(optimizer=("scale_sgd",), learning_rate=(1e-3, 5e-4, 2.5e-4)),
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


def often(rank: int) -> list[Run]:
    """Which basis, where the rest comes back by its polar factor.

    The walk is of one direction, its default, and of all, which are `rank`.
    """
    bases = grid(basis=("power", "svd", "sara", "jump", "walk"))
    bases += [{"basis": "walk", "walk_rank": rank}]
    return with_all(
        [{**basis, "rotate": rotate} for rotate in ("on", "off") for basis in bases],
        **{**LIKE_LDADAM, "optimizer": "subspace_adam", "back": "spectral"},
        refresh_every=10,
        residual_scale=0.5,
    )


# Whether rotation pays for a random basis at another rate, or with a shorter memory.
ROTATION = with_all(
    grid(
        rotate=("off", "first", "on"),
        learning_rate=(1e-3, 2e-3, 4e-3),
        b2=(0.999, 0.99, 0.95),
    ),
    optimizer="subspace_adam",
    basis="jump",
    back="rescale",
)

SEARCHES: dict[str, Experiment] = {
    "best": Experiment(
        "Ours: seven tries for each method, and the best of each again",
        minutes=[run for tries in BY_METHOD for run in tries[:2]],
        small=TRIES,
        full=with_all(TRIES, **HOUR | LARGER),
        best_of="optimizer",
    ),
    "second-round": Experiment(
        "Ours: seven tries more for AdamW and for the winner of best",
        small=AGAIN,
        full=with_all(AGAIN, **HOUR | LARGER),
        best_of="optimizer",
    ),
    "larger": Experiment(
        "Ours: the winners of best at 130M, beside AdamW",
        small=WINNERS,
        full=with_all(WINNERS, **HOUR | LARGER),
        at_hour={**LARGER, "steps": 1200},
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
        minutes=often(MINUTES["rank"]),
        small=often(HOUR["rank"]),
        full=with_all(often(LARGER["rank"]), **HOUR | LARGER),
        seeds=1,
        against={"rotate": "off"},
    ),
    "rotation": Experiment(
        "Ours: at which rate and b2 rotation pays for a random basis",
        minutes=[run for run in ROTATION if run["b2"] != 0.99],
        small=ROTATION,
        full=with_all(ROTATION, **HOUR | LARGER),
        at_hour={"batch_size": 32, "refresh_every": 40},
        seeds=1,
        against={"rotate": "off"},
    ),
    "subspaces": Experiment(
        "Ours: overlap and rank of what moved, from dominant to sampled to random",
        small=OVERLAP,
        full=with_all(OVERLAP, **HOUR | LARGER),
        at_hour={"refresh_every": 40},
        measured=("overlap",),
        weights_over=10,
    ),
}
