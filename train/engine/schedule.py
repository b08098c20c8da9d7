"""The learning rate of each step."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from train.config.config import Config, resolved
from train.config.optimizer import OptimizerConfig, steps_of


def last_stable_step(config: Config) -> int | None:
    """The step of wsd before the decay, from which a run can be made longer."""
    lengths = steps_of(config.optimizer, config.steps)
    return config.steps - lengths.decay if lengths.decay else None


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear warm-up to the peak, then what `config.schedule` names.

    The first step (count 0) has a learning rate above 0, the last warm-up step has the
    peak, and the last step exactly `final` of the peak, unless the rate is constant.
    """
    peak = resolved(config, "learning_rate")
    end = config.final * peak
    lengths = steps_of(config, steps)
    stable = optax.constant_schedule(peak)
    fall = optax.linear_schedule(peak, end, lengths.decay)

    def down(i: Any) -> jax.Array:
        # A compiled division by the length misses the end by rounding.
        return jnp.where(i < lengths.decay, fall(i), end)

    then: dict[str, tuple[list[optax.Schedule], list[int]]] = {
        "constant": ([stable], []),
        # From its second number on: the first is the peak to rounding only.
        "wsd": ([stable, lambda i: down(i + 1)], [steps - lengths.decay + 1]),
    }
    if config.schedule == "cosine":
        schedule = optax.warmup_cosine_decay_schedule(
            0.0, peak, lengths.warmup, steps, end
        )
    else:
        parts, borders = then[config.schedule]
        rise = optax.linear_schedule(0.0, peak, lengths.warmup)
        schedule = optax.join_schedules([rise, *parts], [lengths.warmup, *borders])
    return lambda count: schedule(count + 1)
