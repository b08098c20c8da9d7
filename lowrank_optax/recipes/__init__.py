"""More named optimizers: another one with other parts, or a short chain of stages."""

from lowrank_optax.recipes import (
    another_basis,
    another_recovery,
    another_step,
    low_rank_moments,
    no_subspace,
)

# A method is public by the `__all__` of its own file, and needs no entry here.
from lowrank_optax.recipes.another_basis import *  # noqa: F403
from lowrank_optax.recipes.another_recovery import *  # noqa: F403
from lowrank_optax.recipes.another_step import *  # noqa: F403
from lowrank_optax.recipes.low_rank_moments import *  # noqa: F403
from lowrank_optax.recipes.no_subspace import *  # noqa: F403

__all__: list[str] = []
__all__ += another_basis.__all__
__all__ += another_recovery.__all__
__all__ += another_step.__all__
__all__ += low_rank_moments.__all__
__all__ += no_subspace.__all__
