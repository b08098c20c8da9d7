"""The optimizer of a run: gradient clipping, the method, its schedule."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lowrank_optax as lro
from train.config import Config, OptimizerConfig, resolved
from train.methods import METHODS, OWN, options_of

# The kernels of attention and MLP are (layers, in, out): the last two axes are the
# matrix, the layers a batch of them. A parameter that no rule names is an error.
MATRICES = (
    (r"^layers/(attention|mlp)/\w+/kernel$", lro.STACKED),
    (r"^(embed|head|norm)/|^layers/\w+_norm/", None),
)


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
        """() int32: how often new bases were due so far; q_galore may take fewer."""
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
        known = {k: v for k, v in adam.items() if v is not None}
        # The loop stops after max_skipped; this wrapper itself must never give in.
        never = np.iinfo(np.int32).max
        adamw = optax.chain(clip, optax.adamw(schedule, **known))
        return Optimizer(optax.apply_if_finite(adamw, never), schedule, None)
    low_rank = make_low_rank(
        config.name,
        schedule,
        key,
        basis=config.basis,
        step_size=config.step_size,
        rank=resolved(config, "rank"),
        refresh_every=config.refresh_every,
        scale=config.scale,
        switch_step=round(config.switch * steps),
        **adam,
    )
    every_step = config.name in ("ldadam", "online_subspace_descent")
    refresh_every = 1 if every_step else config.refresh_every
    return Optimizer(optax.chain(clip, low_rank), schedule, refresh_every)


def check_optimizer(config: Config) -> None:
    """ValueError for a resolved config whose optimizer cannot be built."""
    make_optimizer(config.optimizer, config.steps, jax.random.key(0))


def make_low_rank(
    name: str,
    learning_rate: optax.ScalarOrSchedule,
    key: jax.Array | int,
    *,
    basis: str = "default",
    step_size: float = 0.3,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """A method by its name, with those of the options that it takes and are not None.

    Raises:
      ValueError: a basis for a method whose basis is its own, or a scale, b1 or b2 for
        one that has none.
    """
    method = METHODS[name]
    taken = options_of(name)
    for option in ("scale", "b1", "b2"):
        if options.get(option) is not None and option not in taken:
            raise ValueError(f"{name} has no {option}: leave it out")
    if basis == "default" and name == "grass_walk":
        basis = "walk"
    if basis != "default":
        if "basis" not in taken:
            raise ValueError(f"{name} has its own basis: leave out basis={basis!r}")
        options["basis"] = make_basis(basis, step_size, key)
    elif "key" in taken:
        options["key"] = key
    chosen = {
        k: v
        for k, v in options.items()
        if v is not None and k in taken and k not in OWN.get(name, ())
    }
    return method(learning_rate, dimension_numbers=MATRICES, **chosen)


def make_basis(
    name: str, step_size: float, key: jax.Array | int
) -> optax.GradientTransformation:
    """A basis rule by its name on the command line."""
    rules = {
        "svd": lro.dominant_svd,
        "sara": lambda: lro.sara_sample(key),
        "walk": lambda: lro.grassmann_walk(key, step_size),
        "jump": lambda: lro.grassmann_jump(key),
        "track": lro.grassmann_track,
        "frozen": lambda: lro.frozen(lro.dominant_svd()),
        "coordinates": lambda: lro.coordinates(key),
    }
    return rules[name]()


def decayed(params: Any) -> Any:
    """True for the weights that decay: matrices and the embedding, no norm scales."""

    def decays(path: Any, _: Any) -> bool:
        return not jax.tree_util.keystr(path, simple=True).endswith("scale")

    return jax.tree_util.tree_map_with_path(decays, params)
