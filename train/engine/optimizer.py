"""The optimizer of a run: gradient clipping, the method, its schedule."""

import dataclasses
import functools
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import lowrank_optax as lro
from lowrank_optax.core.dimensions import specs_of
from lowrank_optax.core.layout import layout_of
from lowrank_optax.core.paths import with_paths
from lowrank_optax.core.rules import Square
from lowrank_optax.core.trees import squared_norm
from models import init_params
from train.config.config import (
    Config,
    OptimizerConfig,
    label,
    model_config,
    resolved,
)
from train.config.methods import METHODS, NUMBERS, OF_THE_BASIS, ONCE, basis_of
from train.config.ranks import check_ranks, parse_rank
from train.config.unread import unread
from train.engine.layer_metrics import check_measured, measured
from train.engine.schedule import make_schedule

Tree = Any
"""A pytree of arrays."""

# The kernels of attention and MLP are (layers, in, out): the last two axes are the
# matrix, the layers a batch of them. A parameter that no rule names is an error.
MATRICES = (
    (r"^layers/(attention|mlp)/\w+/kernel$", lro.STACKED),
    (r"^(embed|head|norm)/|^layers/\w+_norm/|/bias$", None),
)

# With square=megatron, the side of square matrices that is projected: the one that
# tensor parallelism does not shard (`lowrank_optax.training.square_sides`).
MEGATRON_SQUARES: Square = ((r"attention/o/", "output"), ("", "input"))


class Parts(NamedTuple):
    """Weights, or optimizer state: those of the layers, and the rest.

    The layers' state has a layer axis everywhere (`lowrank_optax.training.per_layer`):
    each layer can be updated by itself when its gradient is there, and a run may switch
    between that and a step for all. The rest: embedding, head and last norm.
    """

    layers: Tree
    rest: Tree


def parted(params: Tree) -> Parts:
    """Splits a tree like the weights into two; paths stay."""
    layers = {"layers": params["layers"]}
    return Parts(layers, {k: v for k, v in params.items() if k != "layers"})


def joined(parts: Parts) -> Tree:
    """Undoes `parted`."""
    return {**parts.rest, **parts.layers}


class Checked(NamedTuple):
    """A clipped gradient, whether it was finite, and its squared norm before."""

    gradient: optax.Updates
    accept: jax.Array
    squared: jax.Array


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """A gradient transformation, and what can be read off its state.

    Attributes:
      method: for the weights of one layer, or for the rest; skips a step whose gradient
        is not finite.
      clip: of gradients; has no state.
      schedule: step, from 0, to learning rate.
      refresh_every: steps from one refresh of all bases to the next; `ONCE` where those
        after the first step are staggered; None for a method without any.
      square: the side of square matrices that is projected.
    """

    method: optax.GradientTransformationExtraArgs
    clip: optax.GradientTransformation
    schedule: optax.Schedule
    refresh_every: int | None
    square: Square = "input"

    @property
    def tx(self) -> optax.GradientTransformationExtraArgs:
        """The method for all weights, with a state in `Parts`."""
        return by_part(self.method)

    @property
    def checked_method(self) -> optax.GradientTransformationExtraArgs:
        """`checked` and the method, with the method's state."""

        def update(
            updates: optax.Updates,
            state: optax.OptState,
            params: optax.Params | None = None,
            **extra_args: Any,
        ) -> tuple[optax.Updates, optax.OptState]:
            gradient, accept, _ = self.checked(updates)
            return self.method.update(
                gradient, state, params, accept=accept, **extra_args
            )

        return optax.GradientTransformationExtraArgs(self.method.init, update)

    def checked(self, gradient: optax.Updates) -> Checked:
        """Decides whether a step is taken, then clips the gradient.

        In this order: clipping makes zeros of numbers whose squares have no finite sum.
        """
        squared = squared_norm(gradient)
        clipped, _ = self.clip.update(gradient, optax.EmptyState())
        return Checked(clipped, jnp.isfinite(squared), squared)

    def skipped(self, opt_state: optax.OptState) -> jax.Array:
        """() int32: how many steps a part, a layer or the rest, skipped so far."""
        kinds = (lro.stages.LowRankState, GuardState)
        return sum((jnp.sum(s.skipped) for s in _found(kinds, opt_state)), jnp.int32(0))

    def refreshes(self, opt_state: optax.OptState) -> jax.Array:
        """() int32: how many times new bases were due; q_galore may compute fewer."""
        return _most(s.refreshes for s in _found(lro.stages.LowRankState, opt_state))

    def learning_rate(self, opt_state: optax.OptState) -> jax.Array:
        """() float32: the learning rate of the next step."""
        states = _found(optax.ScaleByScheduleState, opt_state)
        return jnp.asarray(self.schedule(_most(s.count for s in states)))


def _found(kind: Any, opt_state: optax.OptState) -> list[Any]:
    """The states of this kind inside an optimizer's state."""

    def is_kind(x: object) -> bool:
        return isinstance(x, kind)

    return [*filter(is_kind, jax.tree.leaves(opt_state, is_leaf=is_kind))]


def _most(counts: Iterable[jax.Array]) -> jax.Array:
    return functools.reduce(jnp.maximum, map(jnp.max, counts), jnp.int32(0))


def by_part(
    method: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
    """Applies `method` to every layer separately, and to the rest."""
    layered = lro.training.per_layer(method)

    def init(params: optax.Params) -> Parts:
        parts = parted(params)
        with warnings.catch_warnings():
            # A low-rank method has nothing to project in the rest, as it should be.
            warnings.filterwarnings("ignore", message="low_rank projects 0 of")
            rest = method.init(parts.rest)
        return Parts(layered.init(parts.layers), rest)

    def update(
        updates: Tree, state: Tree, params: Tree = None, **extra_args: Any
    ) -> tuple[Tree, Tree]:
        steps, weights = parted(updates), parted(params)
        done = Parts(
            layered.update(steps.layers, state.layers, weights.layers, **extra_args),
            method.update(steps.rest, state.rest, weights.rest, **extra_args),
        )
        return joined(Parts(*(x[0] for x in done))), Parts(*(x[1] for x in done))

    return optax.GradientTransformationExtraArgs(init, update)


class GuardState(NamedTuple):
    """The number of skipped steps, () int32, and the inner state."""

    skipped: jax.Array
    inner_state: optax.OptState


def skip_not_finite(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """`inner`, and nothing changes at a step whose gradient is not finite.

    The caller passes `accept` if it has checked the gradients of all weights, as to
    `lowrank_optax.low_rank`. (`optax.apply_if_finite` takes no such argument, and
    accepts any gradient after a number of steps.)
    """
    inner = optax.with_extra_args_support(inner)

    def init(params: optax.Params) -> GuardState:
        return GuardState(jnp.zeros([], jnp.int32), inner.init(params))

    def update(
        updates: Tree,
        state: Tree,
        params: Tree = None,
        *,
        accept: bool | jax.Array | None = None,
        **extra_args: Any,
    ) -> tuple[Tree, Tree]:
        if accept is None:
            accept = jnp.isfinite(squared_norm(updates))
        steps, new = inner.update(updates, state.inner_state, params, **extra_args)
        if accept is True:
            return steps, GuardState(state.skipped, new)
        take = functools.partial(jnp.where, accept)
        return jax.tree.map(lambda u: take(u, jnp.zeros_like(u)), steps), GuardState(
            state.skipped + ~accept, jax.tree.map(take, new, state.inner_state)
        )

    return optax.GradientTransformationExtraArgs(init, update)


def make_optimizer(config: OptimizerConfig, steps: int, key: jax.Array) -> Optimizer:
    """Builds the optimizer of a resolved config; `key` decides every random basis."""
    method = METHODS[config.name]
    every = config.refresh_every or method.interval
    schedule = make_schedule(config, steps)
    clip = (
        optax.identity()
        if config.clip_norm is None
        else optax.clip_by_global_norm(config.clip_norm)
    )
    tx = make_method(
        config,
        {
            **vars(config),
            "learning_rate": schedule,
            "refresh_every": every,
            "dimension_numbers": MATRICES,
            "rank": parse_rank(resolved(config, "rank")),
            "switch": round(config.switch * steps),
            "precision": None if config.precision == "default" else config.precision,
            "square": MEGATRON_SQUARES if config.square == "megatron" else None,
            "key": key,
            "mask": decayed,
        },
    )
    if not method.low_rank:
        return Optimizer(skip_not_finite(tx), clip, schedule, None, MEGATRON_SQUARES)
    refresh_every = method.own.get("refresh_every", every)
    if config.stagger and refresh_every > 1 and "stagger" in method.reads():
        refresh_every = ONCE
    square = (
        MEGATRON_SQUARES if config.square == "megatron" else method.options["square"]
    )
    tx = optax.with_extra_args_support(measured(tx, config))
    return Optimizer(tx, clip, schedule, refresh_every, square)


def check_meant(given: OptimizerConfig, chosen: Sequence[OptimizerConfig]) -> None:
    """ValueError for an option that was given, and that no chosen optimizer reads."""
    read_by_none = set.intersection(*(set(unread(config)) for config in chosen))
    for option in (name for name in unread(chosen[0]) if name in read_by_none):
        if getattr(given, option) == getattr(OptimizerConfig, option):
            continue
        flag = "--" + option.replace("_", "-")
        who = ", ".join(map(label, chosen))
        own = any(option in METHODS[c.name].own for c in chosen)
        has = f"decides {option} by itself" if own else f"has no {option}"
        raise ValueError(f"{who} {has}: leave out {flag}")
    check_measured(given, chosen)
    if given.basis_dtype != "float32" and all(c.basis == "default" for c in chosen):
        raise ValueError(
            f"basis_dtype={given.basis_dtype!r} needs a basis by name: --basis svd, or "
            "galore+svd where several optimizers are named"
        )


def check_optimizer(config: Config) -> None:
    """ValueError for a resolved config whose optimizer cannot be built, or not used."""
    key = jax.random.key(0)
    tx = make_optimizer(config.optimizer, config.steps, key).method
    model, name = model_config(config.model), config.optimizer.name
    params = jax.eval_shape(lambda: parted(init_params(model, key)).layers)
    if "rank" in METHODS[name].reads():
        check_ranks(resolved(config.optimizer, "rank"), smaller_sides(params))
    if "precision" in METHODS[name].reads():
        check_precision(config.optimizer.precision)
    layer = jax.eval_shape(lambda p: jax.tree.map(lambda x: x[0], p), params)
    state = jax.eval_shape(tx.init, layer)
    jax.eval_shape(functools.partial(tx.update, refresh=True), layer, state, layer)
    if config.layerwise == "off" or config.microbatches == 1:
        return

    def summed(layer: Any, state: Any) -> Any:
        projected = lro.training.project_gradient(tx, layer, state, layer)
        return lro.training.update_projected(tx, projected, state, layer)

    try:
        jax.eval_shape(summed, layer, state)
    except ValueError as error:
        raise ValueError(
            f"layerwise=on with microbatches={config.microbatches} sums a layer's "
            f"gradients in the subspace, which {config.optimizer.name} does not allow: "
            f"{error}; take microbatches=1, or layerwise=off"
        ) from error


def smaller_sides(params: Any) -> dict[str, int]:
    """The smaller side of each matrix that has a subspace, by its path."""
    specs = specs_of(MATRICES, params)
    return {
        path: layout_of(path, x.shape, spec).m
        for path, x in with_paths(params)
        if (spec := specs[path]) is not None
    }


def check_precision(precision: str) -> None:
    """ValueError unless JAX knows it, and this device has it."""
    x = jnp.ones((8, 8))

    def has(precision: str) -> bool:
        try:
            jnp.matmul(x, x, precision=precision).block_until_ready()
        except (ValueError, NotImplementedError, jax.errors.JaxRuntimeError):
            return False
        return True

    if not has(precision):
        names = (preset.name for preset in jax.lax.DotAlgorithmPreset)
        known = ", ".join(("default", "high", "highest", *filter(has, names)))
        raise ValueError(
            f"precision={precision!r} is none that a {jax.default_backend()} has here; "
            f"it has {known}"
        )


def make_method(
    config: OptimizerConfig, values: Mapping[str, Any]
) -> optax.GradientTransformation:
    """The method of a config, with those of the values that it reads.

    Raises:
      ValueError: a basis for a method whose basis is its own, or a scale, b1 or b2 for
        one that has none.
    """
    name, basis, method = config.name, config.basis, METHODS[config.name]
    for option in NUMBERS:
        # In a comparison AdamW ignores a scale, like all that is said of the subspace.
        ignored = option == "scale" and not method.low_rank
        given = getattr(config, option) is not None and not ignored
        if given and option not in method.options:
            raise ValueError(f"{name} has no {option}: leave it out")
    rule = None
    if basis != "default":
        if "basis" not in method.options:
            raise ValueError(f"{name} has its own basis: leave out basis={basis!r}")
        rule = basis_of(basis, values)
        if config.basis_dtype != "float32":
            rule = lro.bases.cast_basis(rule, config.basis_dtype)
        values = {**values, **dict.fromkeys(OF_THE_BASIS)}
    elif config.basis_dtype != "float32":
        raise ValueError(
            f"basis_dtype={config.basis_dtype!r} needs a basis by name: give one"
        )
    return method.build({**values, "basis": rule})


def decayed(params: optax.Params) -> Tree:
    """True for the weights that decay: matrices and the embedding, not vectors."""

    def decays(path: jax.tree_util.KeyPath, _: object) -> bool:
        return not jax.tree_util.keystr(path, simple=True).endswith(("scale", "bias"))

    return jax.tree_util.tree_map_with_path(decays, params)
