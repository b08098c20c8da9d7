"""Low-rank gradient optimizers as composable optax transformations.

low_rank(optax.chain(
    sara_sample(key=0),                        # where: the basis S
    project(),                                 # in:    G~ = S^T G
    rotate_moments(optax.scale_by_adam()),     # step:  on G~, moments follow S
    recover_residual(limit=1.01),              # back:  S G~^O + rescaled residual
), rank=128, refresh_every=200)
"""

from lowrank_optax.bases.dct import dct_columns
from lowrank_optax.bases.follow import basis_rule
from lowrank_optax.bases.given import replay
from lowrank_optax.bases.grassmann import grassmann_track, grassmann_walk
from lowrank_optax.bases.momentum import correlation_aware, power_iterate
from lowrank_optax.bases.pca import OnlinePCAState, online_pca
from lowrank_optax.bases.random import gaussian, grassmann_jump, random_after
from lowrank_optax.bases.refresh import LazyRefreshState, frozen, lazy_refresh
from lowrank_optax.bases.rows import coordinates, sample_rows
from lowrank_optax.bases.rule import BasisRule, BasisState
from lowrank_optax.bases.singular import dominant_svd, sara_sample
from lowrank_optax.bases.storage import QuantizedBasis, cast_basis, quantize_basis
from lowrank_optax.bases.switching import TrackingState, switch_basis, track_gram
from lowrank_optax.bracket.bracket import LowRankState, low_rank, whole_matrices
from lowrank_optax.bracket.extend import add_stage
from lowrank_optax.core import linalg
from lowrank_optax.core.frame import Frame
from lowrank_optax.core.keys import sample_indices
from lowrank_optax.core.layout import LAYERS, STACKED, TRANSFORMER_MATRICES
from lowrank_optax.core.linalg import left_singular
from lowrank_optax.core.moments import register_moments
from lowrank_optax.core.stage import Clock
from lowrank_optax.core.trees import map_frames, update_frames
from lowrank_optax.full_rank.normalize import (
    MomentumState,
    momentum_of,
    normalize_outputs,
)
from lowrank_optax.full_rank.row_column import RowColumnState, scale_rows_and_columns
from lowrank_optax.measuring.memory import MemoryReport, MemoryRow, memory_report
from lowrank_optax.measuring.subspace import (
    Measurement,
    MeasureState,
    measure_subspace,
    measurements,
)
from lowrank_optax.optimizers.alice import alice
from lowrank_optax.optimizers.apollo import apollo, apollo_mini
from lowrank_optax.optimizers.assemble import low_rank_optimizer, static_args
from lowrank_optax.optimizers.coap import coap
from lowrank_optax.optimizers.dct_adamw import dct_adamw
from lowrank_optax.optimizers.fira import fira
from lowrank_optax.optimizers.flora import flora
from lowrank_optax.optimizers.frugal import frugal
from lowrank_optax.optimizers.galore import galore
from lowrank_optax.optimizers.galore_steps import (
    galore_adafactor,
    galore_adam8bit,
    galore_adam_mini,
)
from lowrank_optax.optimizers.golore import golore
from lowrank_optax.optimizers.grass import grass_jump, grass_walk
from lowrank_optax.optimizers.grass_sparse import grass_sparse
from lowrank_optax.optimizers.ldadam import ldadam
from lowrank_optax.optimizers.msgd import msgd
from lowrank_optax.optimizers.online import online_subspace_descent
from lowrank_optax.optimizers.q_galore import q_galore
from lowrank_optax.optimizers.racs import racs
from lowrank_optax.optimizers.scale_sgd import scale_sgd
from lowrank_optax.optimizers.spectral_adam import spectral_adam
from lowrank_optax.optimizers.subtrack import subtrack
from lowrank_optax.optimizers.sumo import sumo
from lowrank_optax.recovery.compensation import CompensationState, compensate_columns
from lowrank_optax.recovery.feedback import ErrorFeedbackState, error_feedback
from lowrank_optax.recovery.limiter import LimiterState, limit_step
from lowrank_optax.recovery.projection import project, project_back
from lowrank_optax.recovery.residual import recover_residual, sign_residual
from lowrank_optax.recovery.scaling import scale_by_shape, scale_channels, scale_tensor
from lowrank_optax.recovery.spectral import spectral_residual
from lowrank_optax.steps.adafactor import scale_by_adafactor
from lowrank_optax.steps.adam_mini import (
    ADAM_MINI_RULES,
    AdamMiniState,
    adam_mini_blocks,
    check_heads,
    scale_by_adam_mini,
)
from lowrank_optax.steps.orthogonal import orthogonalize
from lowrank_optax.steps.quantize import (
    QuantizedArray,
    QuantizedState,
    quantize_moments,
)
from lowrank_optax.steps.rest import RestState, with_rest
from lowrank_optax.steps.rotation import rotate_moments
from lowrank_optax.steps.subspace import (
    in_full_space,
    in_subspace,
    per_matrix,
    reset_moments,
)
from lowrank_optax.training.data_parallel import average_gradients
from lowrank_optax.training.layerwise import (
    Layers,
    close_layers,
    open_layers,
    per_layer,
    update_in_backward,
    update_layers,
)
from lowrank_optax.training.microbatches import (
    LayerSums,
    Projected,
    close_sums,
    open_sums,
    project_gradient,
    sum_in_backward,
)
from lowrank_optax.training.state_sharding import square_sides, state_shardings
from lowrank_optax.training.weights import (
    QuantizedWeights,
    apply_updates,
    dense,
    quantize_weights,
    round_stochastically,
    store_weights,
)

__version__ = "0.2.0"

__all__ = [
    "ADAM_MINI_RULES",
    "LAYERS",
    "STACKED",
    "TRANSFORMER_MATRICES",
    "AdamMiniState",
    "BasisRule",
    "BasisState",
    "Clock",
    "CompensationState",
    "ErrorFeedbackState",
    "Frame",
    "LayerSums",
    "Layers",
    "LazyRefreshState",
    "LimiterState",
    "LowRankState",
    "MeasureState",
    "Measurement",
    "MemoryReport",
    "MemoryRow",
    "MomentumState",
    "OnlinePCAState",
    "Projected",
    "QuantizedArray",
    "QuantizedBasis",
    "QuantizedState",
    "QuantizedWeights",
    "RestState",
    "RowColumnState",
    "TrackingState",
    "adam_mini_blocks",
    "add_stage",
    "alice",
    "apollo",
    "apollo_mini",
    "apply_updates",
    "average_gradients",
    "basis_rule",
    "cast_basis",
    "check_heads",
    "close_layers",
    "close_sums",
    "coap",
    "compensate_columns",
    "coordinates",
    "correlation_aware",
    "dct_adamw",
    "dct_columns",
    "dense",
    "dominant_svd",
    "error_feedback",
    "fira",
    "flora",
    "frozen",
    "frugal",
    "galore",
    "galore_adafactor",
    "galore_adam8bit",
    "galore_adam_mini",
    "gaussian",
    "golore",
    "grass_jump",
    "grass_sparse",
    "grass_walk",
    "grassmann_jump",
    "grassmann_track",
    "grassmann_walk",
    "in_full_space",
    "in_subspace",
    "lazy_refresh",
    "ldadam",
    "left_singular",
    "limit_step",
    "linalg",
    "low_rank",
    "low_rank_optimizer",
    "map_frames",
    "measure_subspace",
    "measurements",
    "memory_report",
    "momentum_of",
    "msgd",
    "normalize_outputs",
    "online_pca",
    "online_subspace_descent",
    "open_layers",
    "open_sums",
    "orthogonalize",
    "per_layer",
    "per_matrix",
    "power_iterate",
    "project",
    "project_back",
    "project_gradient",
    "q_galore",
    "quantize_basis",
    "quantize_moments",
    "quantize_weights",
    "racs",
    "random_after",
    "recover_residual",
    "register_moments",
    "replay",
    "reset_moments",
    "rotate_moments",
    "round_stochastically",
    "sample_indices",
    "sample_rows",
    "sara_sample",
    "scale_by_adafactor",
    "scale_by_adam_mini",
    "scale_by_shape",
    "scale_channels",
    "scale_rows_and_columns",
    "scale_sgd",
    "scale_tensor",
    "sign_residual",
    "spectral_adam",
    "spectral_residual",
    "square_sides",
    "state_shardings",
    "static_args",
    "store_weights",
    "subtrack",
    "sum_in_backward",
    "sumo",
    "switch_basis",
    "track_gram",
    "update_frames",
    "update_in_backward",
    "update_layers",
    "whole_matrices",
    "with_rest",
]
