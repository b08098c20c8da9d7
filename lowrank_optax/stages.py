"""For authors of new stages: the Frame, its helpers, and linear algebra."""

from lowrank_optax.bracket.bracket import LowRankState
from lowrank_optax.core import linalg
from lowrank_optax.core.frame import Frame
from lowrank_optax.core.keys import sample_indices
from lowrank_optax.core.singular import left_singular
from lowrank_optax.core.stage import Clock
from lowrank_optax.core.trees import map_frames, update_frames

__all__ = [
    "Clock",
    "Frame",
    "LowRankState",
    "left_singular",
    "linalg",
    "map_frames",
    "sample_indices",
    "update_frames",
]
