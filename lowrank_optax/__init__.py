"""Low-rank gradient optimizers as composable optax transformations.

low_rank(optax.chain(
    sara_sample(key=0),                        # where: the basis S
    project(),                                 # in:    G~ = S^T G
    rotate_moments(optax.scale_by_adam()),     # step:  on G~, moments follow S
    recover_residual(limit=1.01),              # back:  S G~^O + rescaled residual
), rank=128, refresh_every=200)
"""

from lowrank_optax.assemble import static_args
from lowrank_optax.basis import BasisState, basis_rule, replay
from lowrank_optax.fira import fira
from lowrank_optax.frame import Clock, Frame, map_frames, update_frames
from lowrank_optax.galore import galore
from lowrank_optax.grass import grass_jump, grass_walk
from lowrank_optax.grassmann import grassmann_jump, grassmann_walk
from lowrank_optax.layout import STACKED, TRANSFORMER_MATRICES
from lowrank_optax.low_rank import LowRankState, low_rank
from lowrank_optax.moments import (
    Rotation,
    in_subspace,
    register_rotation,
    rotate_moments,
)
from lowrank_optax.project import project, project_back
from lowrank_optax.report import MemoryReport, MemoryRow, memory_report
from lowrank_optax.residual import RecoverState, recover_residual
from lowrank_optax.singular import dominant_svd, sara_sample

__all__ = [
    "STACKED",
    "TRANSFORMER_MATRICES",
    "BasisState",
    "Clock",
    "Frame",
    "LowRankState",
    "MemoryReport",
    "MemoryRow",
    "RecoverState",
    "Rotation",
    "basis_rule",
    "dominant_svd",
    "fira",
    "galore",
    "grass_jump",
    "grass_walk",
    "grassmann_jump",
    "grassmann_walk",
    "in_subspace",
    "low_rank",
    "map_frames",
    "memory_report",
    "project",
    "project_back",
    "recover_residual",
    "register_rotation",
    "replay",
    "rotate_moments",
    "sara_sample",
    "static_args",
    "update_frames",
]
