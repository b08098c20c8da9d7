"""Methods without a subspace: stages on matrices of full rank."""

from lowrank_optax.bracket.bracket import full_matrices
from lowrank_optax.full_rank.normalize import (
    MomentumState,
    normalize_by_output_rms,
    trace_matching,
)
from lowrank_optax.full_rank.row_column import RowColumnState, scale_by_racs

__all__ = [
    "MomentumState",
    "RowColumnState",
    "full_matrices",
    "normalize_by_output_rms",
    "scale_by_racs",
    "trace_matching",
]
