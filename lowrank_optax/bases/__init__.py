"""Where: rules that choose the basis S of each matrix, and wrappers of such rules."""

from lowrank_optax.bases.adaptive import AdaptiveRefreshState, adaptive_refresh
from lowrank_optax.bases.dct import dct_columns
from lowrank_optax.bases.folded import fold
from lowrank_optax.bases.follow import basis_rule
from lowrank_optax.bases.grassmann import grassmann_track, grassmann_walk
from lowrank_optax.bases.iterate import orthogonal_iterate
from lowrank_optax.bases.lazy import LazyRefreshState, frozen, lazy_refresh
from lowrank_optax.bases.momentum import correlation_aware, power_iterate
from lowrank_optax.bases.pca import OnlinePCAState, online_pca
from lowrank_optax.bases.random import gaussian, grassmann_jump, random_after
from lowrank_optax.bases.recorded import replay
from lowrank_optax.bases.rows import coordinates, sample_rows
from lowrank_optax.bases.rule import BasisRule, BasisState
from lowrank_optax.bases.singular import dominant_svd, sara_sample
from lowrank_optax.bases.storage import QuantizedBasis, cast_basis, quantize_basis
from lowrank_optax.bases.switching import TrackingState, switch_basis, track_gram

__all__ = [
    "AdaptiveRefreshState",
    "BasisRule",
    "BasisState",
    "LazyRefreshState",
    "OnlinePCAState",
    "QuantizedBasis",
    "TrackingState",
    "adaptive_refresh",
    "basis_rule",
    "cast_basis",
    "coordinates",
    "correlation_aware",
    "dct_columns",
    "dominant_svd",
    "fold",
    "frozen",
    "gaussian",
    "grassmann_jump",
    "grassmann_track",
    "grassmann_walk",
    "lazy_refresh",
    "online_pca",
    "orthogonal_iterate",
    "power_iterate",
    "quantize_basis",
    "random_after",
    "replay",
    "sample_rows",
    "sara_sample",
    "switch_basis",
    "track_gram",
]
