"""Step: transformations of the low-rank gradient, and how their moments are stored."""

from lowrank_optax.core.moments import SubspaceState, register_moments
from lowrank_optax.steps.adafactor import scale_by_adafactor
from lowrank_optax.steps.adam_mini import (
    ADAM_MINI_RULES,
    AdamMiniState,
    adam_mini_blocks,
    check_heads,
    scale_by_adam_mini,
)
from lowrank_optax.steps.factor import FactoredState, factor_moments
from lowrank_optax.steps.full_momentum import (
    FullMomentumState,
    scale_by_full_momentum,
)
from lowrank_optax.steps.orthogonal import scale_by_polar_factor
from lowrank_optax.steps.quantize import (
    QuantizedArray,
    QuantizedState,
    quantize_moments,
)
from lowrank_optax.steps.rest import RestState, with_rest
from lowrank_optax.steps.restart import RestartState, restart_every
from lowrank_optax.steps.rotation import rotate_moments
from lowrank_optax.steps.subspace import (
    in_full_space,
    in_subspace,
    per_matrix,
    reset_moments,
)

__all__ = [
    "ADAM_MINI_RULES",
    "AdamMiniState",
    "FactoredState",
    "FullMomentumState",
    "QuantizedArray",
    "QuantizedState",
    "RestState",
    "RestartState",
    "SubspaceState",
    "adam_mini_blocks",
    "check_heads",
    "factor_moments",
    "in_full_space",
    "in_subspace",
    "per_matrix",
    "quantize_moments",
    "register_moments",
    "reset_moments",
    "restart_every",
    "rotate_moments",
    "scale_by_adafactor",
    "scale_by_adam_mini",
    "scale_by_full_momentum",
    "scale_by_polar_factor",
    "with_rest",
]
