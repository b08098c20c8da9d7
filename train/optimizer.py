"""The optimizer of a run: gradient clipping, the method, its schedule."""

import dataclasses
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lowrank_optax as lro
from train.config import Config, OptimizerConfig, resolved
from train.methods import BASES, METHODS, call

S = TypeVar("S")

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

    def skipped(self, opt_state: optax.OptState) -> jax.Array:
        """() int32: steps refused so far."""
        if self.refresh_every is None:
            return _only(optax.ApplyIfFiniteState, opt_state).total_notfinite
        return _only(lro.LowRankState, opt_state).skipped

    def refreshes(self, opt_state: optax.OptState) -> jax.Array:
        """() int32: how often new bases were due so far; q_galore may take fewer."""
        if self.refresh_every is None:
            return jnp.zeros([], jnp.int32)
        return -(-_only(lro.LowRankState, opt_state).count // self.refresh_every)

    def learning_rate(self, opt_state: optax.OptState) -> jax.Array:
        """() float32: that of the next step."""
        count = _only(optax.ScaleByScheduleState, opt_state).count
        return jnp.asarray(self.schedule(count))


def _only(kind: type[S], opt_state: optax.OptState) -> S:
    """The one state of this kind inside an optimizer's state."""

    def is_kind(x: object) -> bool:
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
    method = METHODS[config.name]
    schedule = make_schedule(config, steps)
    clip = (
        optax.identity()
        if config.clip_norm is None
        else optax.clip_by_global_norm(config.clip_norm)
    )
    tx = make_method(
        config.name,
        schedule,
        basis=config.basis,
        key=key,
        angle=config.angle,
        walk_rank=config.walk_rank,
        rank=resolved(config, "rank"),
        refresh_every=config.refresh_every,
        # Like the rank, it means nothing to a full-rank method in a comparison.
        scale=config.scale if method.low_rank else None,
        switch_step=round(config.switch * steps),
        b1=config.b1,
        b2=config.b2,
        weight_decay=config.weight_decay,
        mask=decayed,
    )
    tx = optax.chain(clip, tx)
    if method.low_rank:
        refresh_every = method.own.get("refresh_every", config.refresh_every)
        return Optimizer(tx, schedule, refresh_every)
    # The loop stops after max_skipped; this wrapper itself must never give in.
    never = np.iinfo(np.int32).max
    return Optimizer(optax.apply_if_finite(tx, never), schedule, None)


def check_optimizer(config: Config) -> None:
    """ValueError for a resolved config whose optimizer cannot be built."""
    make_optimizer(config.optimizer, config.steps, jax.random.key(0))


def make_method(
    name: str,
    learning_rate: optax.ScalarOrSchedule,
    *,
    basis: str = "default",
    key: jax.Array | int | None = None,
    angle: float | None = None,
    walk_rank: int | None = None,
    **options: Any,
) -> optax.GradientTransformation:
    """A method by its name, with those of the options that it takes and are not None.

    `key`, `angle` and `walk_rank` are for the basis, the method's own or another.

    Raises:
      ValueError: a basis for a method whose basis is its own, or a scale, b1 or b2 for
        one that has none.
    """
    method = METHODS[name]
    for option in ("scale", "b1", "b2"):
        if options.get(option) is not None and option not in method.options:
            raise ValueError(f"{name} has no {option}: leave it out")
    rule = {"key": key, "angle": angle, "walk_rank": walk_rank}
    if basis != "default":
        if "basis" not in method.options:
            raise ValueError(f"{name} has its own basis: leave out basis={basis!r}")
        rule = {"basis": call(BASES[basis], **rule)}
    options = {"dimension_numbers": MATRICES, **options, **rule, **method.own}
    return call(method.make, learning_rate, **options)


def decayed(params: optax.Params) -> Any:
    """True for the weights that decay: matrices and the embedding, no norm scales."""

    def decays(path: jax.tree_util.KeyPath, _: object) -> bool:
        return not jax.tree_util.keystr(path, simple=True).endswith("scale")

    return jax.tree_util.tree_map_with_path(decays, params)
