"""Around the optimizer: layer by layer, microbatches, devices, sharded state."""

from lowrank_optax.training.data_parallel import average_gradients
from lowrank_optax.training.layerwise import (
    Layers,
    per_layer,
    update_in_backward,
    update_layers,
)
from lowrank_optax.training.microbatches import LayerSums, sum_in_backward
from lowrank_optax.training.projected import (
    Projected,
    project_gradient,
    update_projected,
)
from lowrank_optax.training.state_sharding import square_sides, state_shardings

__all__ = [
    "LayerSums",
    "Layers",
    "Projected",
    "average_gradients",
    "per_layer",
    "project_gradient",
    "square_sides",
    "state_shardings",
    "sum_in_backward",
    "update_in_backward",
    "update_layers",
    "update_projected",
]
