"""Measurements of a run's subspaces, by kinds of layers as the papers group them."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

import lowrank_optax as lro
from train.config.config import OptimizerConfig, label
from train.config.methods import METHODS

# What each is called in the metrics; means over the layers.
MEANS = {"overlap": "overlap", "anchor_overlap": "anchor", "energy": "energy"}
SINGULAR_VALUES = 20  # as many as GrassWalk's Figure 2 has


def measures(config: OptimizerConfig) -> bool:
    """Whether anything is measured."""
    return config.measure != "none" or config.anchor is not None


def measured(
    tx: optax.GradientTransformation, config: OptimizerConfig
) -> optax.GradientTransformation:
    """Adds the measurements that the config asks for to the low-rank method `tx`."""
    if not measures(config):
        return tx
    everything = config.measure == "all"
    stage = lro.measure_subspace(
        energy=everything,
        overlap=config.measure != "none",
        anchor=config.anchor,
        spectrum=SINGULAR_VALUES if everything else 0,
    )
    return lro.add_stage(tx, stage)


def check_measured(given: OptimizerConfig, chosen: Sequence[OptimizerConfig]) -> None:
    """ValueError if no chosen optimizer has the subspace that is to be measured."""
    if measures(given) and not any(METHODS[c.name].projects for c in chosen):
        raise ValueError(
            f"{', '.join(map(label, chosen))} has no subspace to be measured: leave "
            "out --measure and --anchor"
        )


def kind_of(path: str) -> str:
    """ "up" of layers/mlp/up/kernel."""
    return path.split("/")[-2]


def layer_metrics(opt_state: Any) -> dict[str, jax.Array]:
    """Returns "overlap/q" and so on, () each: means over layers with a value, or NaN.

    The energy of each layer is "layer_energy/q/1", the layer at the input, and so on
    (GrassWalk paper, Figure 1). Singular values are "derivative/q/1", the largest, to
    "derivative/q/20": the largest i-th one of any layer (Figure 2 there).
    """
    means: dict[str, list[jax.Array]] = defaultdict(list)
    of_layers: dict[str, list[jax.Array]] = defaultdict(list)
    largest: dict[str, list[jax.Array]] = defaultdict(list)
    for path, measurement in sorted(lro.measurements(opt_state).items()):
        kind = kind_of(path)
        for field, name in MEANS.items():
            if (value := getattr(measurement, field)) is not None:
                means[f"{name}/{kind}"].append(jnp.ravel(value))
        if (energy := measurement.energy) is not None and energy.ndim:
            for i, value in enumerate(energy):
                of_layers[f"layer_energy/{kind}/{i + 1}"].append(jnp.ravel(value))
        if (spectrum := measurement.spectrum) is not None:
            for i in range(spectrum.shape[-1]):
                value = jnp.ravel(spectrum[..., i])
                largest[f"derivative/{kind}/{i + 1}"].append(value)
    return {
        **{name: jnp.nanmean(jnp.concatenate(x)) for name, x in sorted(means.items())},
        **{name: jnp.nanmean(jnp.concatenate(x)) for name, x in of_layers.items()},
        **{name: jnp.nanmax(jnp.concatenate(x)) for name, x in largest.items()},
    }
