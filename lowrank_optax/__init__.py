"""Low-rank gradient optimizers as composable optax transformations.

low_rank(optax.chain(
    sara_sample(key=0),                        # where: the basis S
    project(),                                 # in:    G~ = S^T G
    rotate_moments(optax.scale_by_adam()),     # step:  on G~, moments follow S
    recover_residual(limit=1.01),              # back:  S G~^O + rescaled residual
), rank=128, refresh_every=200)

Examples use `import jax, jax.numpy as jnp, optax, lowrank_optax as lro`.
"""

from lowrank_optax import (
    bases,
    full_rank,
    measuring,
    recipes,
    recovery,
    stages,
    steps,
    training,
    weights,
)
from lowrank_optax.bases.follow import basis_rule
from lowrank_optax.bases.grassmann import grassmann_walk
from lowrank_optax.bases.random import grassmann_jump
from lowrank_optax.bases.singular import dominant_svd, sara_sample
from lowrank_optax.bracket.bracket import low_rank
from lowrank_optax.bracket.extend import add_stage
from lowrank_optax.core.dimensions import print_rules
from lowrank_optax.core.layout import LAYERS, STACKED
from lowrank_optax.measuring.memory import memory_report
from lowrank_optax.measuring.subspace import measure_subspace, measurements
from lowrank_optax.methods import METHODS
from lowrank_optax.optimizers.apollo import apollo, apollo_mini
from lowrank_optax.optimizers.assemble import low_rank_optimizer, static_args
from lowrank_optax.optimizers.fira import fira
from lowrank_optax.optimizers.frugal import frugal
from lowrank_optax.optimizers.galore import galore
from lowrank_optax.optimizers.grass import grass_jump, grass_walk
from lowrank_optax.optimizers.ldadam import ldadam
from lowrank_optax.optimizers.spectral_adam import spectral_adam
from lowrank_optax.recovery.compensation import compensate_columns
from lowrank_optax.recovery.feedback import error_feedback
from lowrank_optax.recovery.projection import project, project_back
from lowrank_optax.recovery.residual import recover_residual, sign_residual
from lowrank_optax.recovery.scaling import scale_gradient
from lowrank_optax.recovery.spectral import spectral_residual
from lowrank_optax.steps.quantize import quantize_moments
from lowrank_optax.steps.rotation import rotate_moments
from lowrank_optax.steps.subspace import in_subspace, reset_moments
from lowrank_optax.training.state_sharding import state_shardings

__version__ = "0.2.0"

__all__ = [
    "LAYERS",
    "METHODS",
    "STACKED",
    "add_stage",
    "apollo",
    "apollo_mini",
    "bases",
    "basis_rule",
    "compensate_columns",
    "dominant_svd",
    "error_feedback",
    "fira",
    "frugal",
    "full_rank",
    "galore",
    "grass_jump",
    "grass_walk",
    "grassmann_jump",
    "grassmann_walk",
    "in_subspace",
    "ldadam",
    "low_rank",
    "low_rank_optimizer",
    "measure_subspace",
    "measurements",
    "measuring",
    "memory_report",
    "print_rules",
    "project",
    "project_back",
    "quantize_moments",
    "recipes",
    "recover_residual",
    "recovery",
    "reset_moments",
    "rotate_moments",
    "sara_sample",
    "scale_gradient",
    "sign_residual",
    "spectral_adam",
    "spectral_residual",
    "stages",
    "state_shardings",
    "static_args",
    "steps",
    "training",
    "weights",
]
