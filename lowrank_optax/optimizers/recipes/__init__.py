"""More named optimizers: another one with other parts, or a short chain of stages."""

from lowrank_optax.optimizers.recipes import bases, full_rank, recovery, steps
from lowrank_optax.optimizers.recipes.bases import *  # noqa: F403
from lowrank_optax.optimizers.recipes.full_rank import *  # noqa: F403
from lowrank_optax.optimizers.recipes.recovery import *  # noqa: F403
from lowrank_optax.optimizers.recipes.steps import *  # noqa: F403

__all__: list[str] = []
__all__ += bases.__all__
__all__ += full_rank.__all__
__all__ += recovery.__all__
__all__ += steps.__all__
