"""Methods without a subspace: stages on matrices of full rank."""

from lowrank_optax.bracket.bracket import full_matrices
from lowrank_optax.full_rank.lora_pre import LoraPreState, scale_by_lora_pre
from lowrank_optax.full_rank.mofasgd import MomentumFactorsState, scale_by_mofasgd
from lowrank_optax.full_rank.normalize import (
    MomentumState,
    normalize_by_output_rms,
    trace_matching,
)
from lowrank_optax.full_rank.row_column import RowColumnState, scale_by_racs
from lowrank_optax.full_rank.sinkhorn import normalize_by_sinkhorn
from lowrank_optax.full_rank.stabilize import StabilizerState, stabilize_gradient
from lowrank_optax.full_rank.step import full_step

__all__ = [
    "LoraPreState",
    "MomentumFactorsState",
    "MomentumState",
    "RowColumnState",
    "StabilizerState",
    "full_matrices",
    "full_step",
    "normalize_by_output_rms",
    "normalize_by_sinkhorn",
    "scale_by_lora_pre",
    "scale_by_mofasgd",
    "scale_by_racs",
    "stabilize_gradient",
    "trace_matching",
]
