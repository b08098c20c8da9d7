"""Measures what an optimizer costs in memory, and what its subspaces capture."""

from lowrank_optax.measuring.memory import MemoryReport, MemoryRow, memory_report
from lowrank_optax.measuring.ranks import allocate_ranks
from lowrank_optax.measuring.subspace import (
    Measurement,
    MeasureState,
    measure_subspace,
    measurements,
)

__all__ = [
    "MeasureState",
    "Measurement",
    "MemoryReport",
    "MemoryRow",
    "allocate_ranks",
    "measure_subspace",
    "measurements",
    "memory_report",
]
