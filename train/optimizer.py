"""The optimizer of a run: gradient clipping, the method, its schedule."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lowrank_optax as lro
from train.config import OptimizerConfig, resolved

# The kernels of attention and MLP are (layers, in, out): the last two axes are the
# matrix, the layers a batch of them. A parameter that no rule names is an error.
MATRICES = (
    (r"^layers/(attention|mlp)/\w+/kernel$", lro.STACKED),
    (r"^(embed|head|norm)/|^layers/\w+_norm/", None),
)

METHODS = {
    "galore": (lro.galore, "svd"),
    "fira": (lro.fira, "svd"),
    "grass_walk": (lro.grass_walk, "walk"),
    "grass_jump": (lro.grass_jump, "jump"),
}


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """A gradient transformation, and what can be read off its state.

    Attributes:
      tx: clipping and the method; skips a step whose gradient is not finite.
      schedule: step, from 0, to learning rate.
      refresh_every: steps between two bases; None for adamw, which has none.
    """

    tx: optax.GradientTransformation
    schedule: optax.Schedule
    refresh_every: int | None

    def skipped(self, opt_state: Any) -> jax.Array:
        """() int32: steps refused so far."""
        if self.refresh_every is None:
            return _only(optax.ApplyIfFiniteState, opt_state).total_notfinite
        return _only(lro.LowRankState, opt_state).skipped

    def refreshes(self, opt_state: Any) -> jax.Array:
        """() int32: how often the bases have been chosen so far."""
        if self.refresh_every is None:
            return jnp.zeros([], jnp.int32)
        return -(-_only(lro.LowRankState, opt_state).count // self.refresh_every)

    def learning_rate(self, opt_state: Any) -> jax.Array:
        """() float32: that of the next step."""
        count = _only(optax.ScaleByScheduleState, opt_state).count
        return jnp.asarray(self.schedule(count))


def _only(kind: type, opt_state: Any) -> Any:
    """The one state of this kind inside an optimizer's state."""

    def is_kind(x: Any) -> bool:
        return isinstance(x, kind)

    (state,) = filter(is_kind, jax.tree.leaves(opt_state, is_leaf=is_kind))
    return state


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear warm-up to the peak, then cosine to `final` of it.

    The first step (count 0) already has a learning rate above 0, the last warm-up step
    has the peak, and the last step of all exactly `final` of the peak.
    """
    peak = resolved(config, "learning_rate")
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=peak,
        warmup_steps=round(config.warmup * steps),
        decay_steps=steps,
        end_value=config.final * peak,
    )
    return lambda count: schedule(count + 1)


def make_optimizer(config: OptimizerConfig, steps: int, key: jax.Array) -> Optimizer:
    """The optimizer that a resolved config names, for the models' parameters.

    `key` decides every random basis.
    """
    schedule = make_schedule(config, steps)
    clip = (
        optax.identity()
        if config.clip_norm is None
        else optax.clip_by_global_norm(config.clip_norm)
    )
    adam: dict[str, Any] = {
        "b1": config.b1,
        "b2": config.b2,
        "weight_decay": config.weight_decay,
        "mask": decayed,
    }
    if config.name == "adamw":
        # The loop stops after max_skipped; this wrapper itself must never give in.
        never = np.iinfo(np.int32).max
        adamw = optax.chain(clip, optax.adamw(schedule, **adam))
        return Optimizer(optax.apply_if_finite(adamw, never), schedule, None)
    method, own_basis = METHODS[config.name]
    basis = own_basis if config.basis == "default" else config.basis
    low_rank = method(
        schedule,
        rank=resolved(config, "rank"),
        refresh_every=config.refresh_every,
        basis=make_basis(basis, config.step_size, key),
        scale=resolved(config, "scale"),
        dimension_numbers=MATRICES,
        **adam,
    )
    return Optimizer(optax.chain(clip, low_rank), schedule, config.refresh_every)


def make_basis(
    name: str, step_size: float, key: jax.Array
) -> optax.GradientTransformation:
    """A basis rule by its name on the command line."""
    rules = {
        "svd": lro.dominant_svd,
        "sara": lambda: lro.sara_sample(key),
        "walk": lambda: lro.grassmann_walk(key, step_size),
        "jump": lambda: lro.grassmann_jump(key),
    }
    return rules[name]()


def decayed(params: Any) -> Any:
    """True for the weights that decay: matrices and the embedding, no norm scales."""

    def decays(path: Any, _: Any) -> bool:
        return not jax.tree_util.keystr(path, simple=True).endswith("scale")

    return jax.tree_util.tree_map_with_path(decays, params)
