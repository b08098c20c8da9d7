"""What a run measures of its subspaces, by kinds of layers as the papers group them."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

import lowrank_optax as lro
from train.config import OptimizerConfig, label
from train.methods import METHODS

# What each is called in the metrics, and how it is drawn together from the layers: the
# mean, and of singular values the largest (GrassWalk paper, Figure 2).
METRICS = {
    "overlap": ("overlap", jnp.nanmean),
    "anchor_overlap": ("anchor", jnp.nanmean),
    "energy": ("energy", jnp.nanmean),
    "spectrum": ("derivative", jnp.nanmax),
}


def measures(config: OptimizerConfig) -> bool:
    """Whether anything is measured."""
    return config.measure != "none" or config.anchor is not None


def measured(
    tx: optax.GradientTransformation, config: OptimizerConfig
) -> optax.GradientTransformation:
    """The low-rank method `tx`, and what the config asks to be measured of it."""
    if not measures(config):
        return tx
    everything = config.measure == "all"
    stage = lro.measure_subspace(
        energy=everything,
        overlap=config.measure != "none",
        anchor=config.anchor,
        spectrum=int(everything),
    )
    return lro.add_stage(tx, stage)


def check_measured(given: OptimizerConfig, chosen: Sequence[OptimizerConfig]) -> None:
    """ValueError if something is to be measured, and no chosen optimizer has it."""
    if measures(given) and not any(METHODS[c.name].low_rank for c in chosen):
        raise ValueError(
            f"{', '.join(map(label, chosen))} has no subspace to be measured: leave "
            "out --measure and --anchor"
        )


def kind_of(path: str) -> str:
    """ "up" of layers/mlp/up/kernel."""
    return path.split("/")[-2]


def layer_metrics(opt_state: Any) -> dict[str, jax.Array]:
    """ "overlap/q" and so on, () each, over all layers that have a value; else NaN."""
    found: dict[str, list[jax.Array]] = defaultdict(list)
    for path, measurement in lro.measurements(opt_state).items():
        for field, (name, _) in METRICS.items():
            if (value := getattr(measurement, field)) is not None:
                found[f"{name}/{kind_of(path)}"].append(jnp.ravel(value))
    join = dict(METRICS.values())
    return {
        name: join[name.split("/")[0]](jnp.concatenate(values))
        for name, values in sorted(found.items())
    }
