"""Back: from the low-rank step to full space, with or without the residual."""

from lowrank_optax.recovery.compensation import CompensationState, compensate_columns
from lowrank_optax.recovery.feedback import ErrorFeedbackState, error_feedback
from lowrank_optax.recovery.limiter import LimiterState, clip_step_growth
from lowrank_optax.recovery.neurons import NeuronState
from lowrank_optax.recovery.normalized import normalized_spectral_residual
from lowrank_optax.recovery.projection import project, project_back
from lowrank_optax.recovery.residual import recover_residual, sign_residual
from lowrank_optax.recovery.scaling import scale_by_shape, scale_gradient
from lowrank_optax.recovery.spectral import spectral_residual
from lowrank_optax.recovery.unfold import (
    DetailState,
    UnfoldState,
    scale_details,
    unfold_moments,
)

__all__ = [
    "CompensationState",
    "DetailState",
    "ErrorFeedbackState",
    "LimiterState",
    "NeuronState",
    "UnfoldState",
    "clip_step_growth",
    "compensate_columns",
    "error_feedback",
    "normalized_spectral_residual",
    "project",
    "project_back",
    "recover_residual",
    "scale_by_shape",
    "scale_details",
    "scale_gradient",
    "sign_residual",
    "spectral_residual",
    "unfold_moments",
]
