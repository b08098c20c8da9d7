"""The low-rank methods by the names that the command line gives them."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import optax

import lowrank_optax as lro

Method = Callable[..., optax.GradientTransformationExtraArgs]


def _fira_with(step: optax.GradientTransformation) -> Method:
    return functools.partial(lro.fira, step=step)


METHODS: dict[str, Method] = {
    "galore": lro.galore,
    "galore_adafactor": lro.galore_adafactor,
    "galore_adam_mini": lro.galore_adam_mini,
    "galore_adam8bit": lro.galore_adam8bit,
    "q_galore": lro.q_galore,
    "golore": lro.golore,
    "msgd": lro.msgd,
    "fira": lro.fira,
    "fira_adafactor": _fira_with(
        lro.in_subspace(lro.scale_by_adafactor(), per_matrix=True)
    ),
    "fira_adam_mini": _fira_with(lro.in_subspace(lro.scale_by_adam_mini())),
    "fira_adam8bit": _fira_with(
        lro.in_subspace(lro.quantize_moments(optax.scale_by_adam()))
    ),
    "grass_walk": lro.grass_walk,
    "grass_jump": lro.grass_jump,
    "subtrack": lro.subtrack,
    "ldadam": lro.ldadam,
    "apollo": lro.apollo,
    "apollo_mini": lro.apollo_mini,
    "frugal": lro.frugal,
    "grass_sparse": lro.grass_sparse,
    "flora": lro.flora,
    "coap": lro.coap,
    "online_subspace_descent": lro.online_subspace_descent,
}
# What these methods decide for themselves.
OWN = {"ldadam": {"refresh_every"}, "apollo_mini": {"rank"}}


def options_of(name: str) -> dict[str, Any]:
    """The options that a method takes, with their defaults; None where it has none."""
    method = METHODS[name]
    options = {
        key: None if option.default is option.empty else option.default
        for key, option in inspect.signature(method).parameters.items()
    }
    if isinstance(method, functools.partial):  # the step's own affair
        options = {k: v for k, v in options.items() if k not in ("b1", "b2")}
    return options
