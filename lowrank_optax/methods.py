"""The named optimizers and their recommended settings."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import optax

from lowrank_optax import recipes
from lowrank_optax.optimizers.apollo import apollo, apollo_mini
from lowrank_optax.optimizers.fira import fira
from lowrank_optax.optimizers.frugal import frugal
from lowrank_optax.optimizers.galore import galore
from lowrank_optax.optimizers.grass import grass_jump, grass_walk
from lowrank_optax.optimizers.ldadam import ldadam
from lowrank_optax.optimizers.spectral_adam import spectral_adam


@dataclasses.dataclass(frozen=True)
class Method:
    """A named optimizer with its recommended settings.

    Attributes:
      make: the optimizer, such as `lro.galore`.
      learning_rate: the best peak rate of those tried, or the only one, on LLaMA-60M,
        39 M tokens, rank 128, cosine schedule (docs/results/losses_60m.md).
      measured: False if no rate was tried on that work. The rate is that of a related
        method, of the source, or of runs on 9.8 M tokens.
      fine_tuning_rate: the best peak rate of those tried on trained weights
        (docs/results/fine_tuning.md); None if none was tried.

    Example:
      >>> method = lro.METHODS["grass_jump"]
      >>> method.learning_rate, method.rank, method.refresh_every
      (0.002, 0.25, 100)
      >>> tx = method.make(method.learning_rate, key=0)
    """

    make: Callable[..., optax.GradientTransformationExtraArgs]
    learning_rate: float
    measured: bool = True
    fine_tuning_rate: float | None = None

    @property
    def rank(self) -> Any:
        """The default rank, or fraction of the smaller side; None: no subspace."""
        return self._default("rank")

    @property
    def refresh_every(self) -> int | None:
        """The default number of steps between two refreshes; None: no refreshes."""
        return self._default("refresh_every")

    def _default(self, argument: str) -> Any:
        parameters = inspect.signature(self.make).parameters
        return parameters[argument].default if argument in parameters else None


METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "galore": Method(galore, 1e-2, fine_tuning_rate=3e-3),
        "galore_adafactor": Method(recipes.galore_adafactor, 1e-2),
        "galore_adam_mini": Method(recipes.galore_adam_mini, 5e-3),
        "galore_adam8bit": Method(recipes.galore_adam8bit, 1e-2, fine_tuning_rate=3e-3),
        "q_galore": Method(recipes.q_galore, 5e-3),
        "galore_2": Method(recipes.galore_2, 1e-2, measured=False),
        "golore": Method(recipes.golore, 1e-2),
        "msgd": Method(recipes.msgd, 1e-1, measured=False),
        "fira": Method(fira, 3e-3, fine_tuning_rate=3e-3),
        "grass_walk": Method(grass_walk, 2e-3),
        "grass_jump": Method(grass_jump, 2e-3, fine_tuning_rate=2e-3),
        "spectral_adam": Method(spectral_adam, 4.5e-3, fine_tuning_rate=1.3e-3),
        "subtrack": Method(recipes.subtrack, 2e-3),
        "ldadam": Method(ldadam, 3e-3),
        "apollo": Method(apollo, 3e-3),
        "apollo_mini": Method(apollo_mini, 3e-3, fine_tuning_rate=3e-3),
        "frugal": Method(frugal, 1e-3),
        "grass_sparse": Method(recipes.grass_sparse, 1e-2),
        "flora": Method(recipes.flora, 2e-3),
        "coap": Method(recipes.coap, 1e-2),
        "alice": Method(recipes.alice, 5e-3),
        "sumo": Method(recipes.sumo, 1e-3),
        "racs": Method(recipes.racs, 2e-2),
        "scale_sgd": Method(recipes.scale_sgd, 5e-4),
        "dct_adamw": Method(recipes.dct_adamw, 1e-3),
        "online_subspace_descent": Method(recipes.online_subspace_descent, 1e-2),
        "foam": Method(recipes.foam, 2e-3, measured=False),
        "gwt": Method(recipes.gwt, 2e-3, measured=False),
        "sink_gd": Method(recipes.sink_gd, 1e-2, measured=False),
        "mlorc": Method(recipes.mlorc, 2e-3, measured=False),
        "lora_pre": Method(recipes.lora_pre, 1e-3, measured=False),
        "mofasgd": Method(recipes.mofasgd, 1e-3, measured=False),
        "cosmos": Method(recipes.cosmos, 4.5e-3, measured=False),
        "stable_spam": Method(recipes.stable_spam, 1e-3, measured=False),
    }
)
"""The named optimizers by their names."""
