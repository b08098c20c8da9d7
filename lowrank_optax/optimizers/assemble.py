"""Shared parts of the named optimizers: Adam, the bracket, and what follows it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Unpack, cast

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.bracket.bracket import LowRankState, full_matrices, low_rank
from lowrank_optax.bracket.extend import Extensible, extensible
from lowrank_optax.bracket.finite import if_accepted
from lowrank_optax.core.aliases import Key, Mask, Number
from lowrank_optax.core.checks import found
from lowrank_optax.core.dimensions import DimensionNumbers
from lowrank_optax.core.rules import Rank, Square
from lowrank_optax.core.stage import stage
from lowrank_optax.optimizers.options import Options
from lowrank_optax.optimizers.rates import check_rate, finite_at
from lowrank_optax.recovery.published import Variant, arithmetic_of, decay_and_rate
from lowrank_optax.steps.subspace import in_subspace

# Annotations of the arguments that may be traced, and so be scheduled.
_NUMBERS = {"Number", "Number | None", "Step", "optax.ScalarOrSchedule"}


def static_args(factory: Callable[..., Any]) -> tuple[str, ...]:
    """The arguments of a named optimizer that `optax.inject_hyperparams` leaves alone.

    These are all arguments except those annotated as a number or a schedule.

    Args:
      factory: `galore` or any other of the named optimizers.

    Returns:
      Their names, for `optax.inject_hyperparams`.

    Example:
      >>> make = optax.inject_hyperparams(
      ...     lro.galore, static_args=lro.static_args(lro.galore))
      >>> tx = make(learning_rate=0.01, rank=4, refresh_every=200)
      >>> "rank" in lro.static_args(lro.galore), "scale" in lro.static_args(lro.galore)
      (True, False)
    """
    parameters = inspect.signature(factory).parameters.items()
    return tuple(name for name, p in parameters if p.annotation not in _NUMBERS)


def one_of(
    key: Key | None,
    basis: optax.GradientTransformation | None,
    rule: Callable[[Key], optax.GradientTransformation],
) -> optax.GradientTransformation:
    """The basis rule: `rule(key)`, or `basis` in its place."""
    if key is not None and basis is None:
        return rule(key)
    if key is None and basis is not None:
        return stage_of(basis, "basis", "sara_sample(key=0)")
    raise ValueError(
        "pass either key, a seed for the random bases, or basis, another basis rule"
    )


def stage_of(
    stage: optax.GradientTransformation, name: str, example: str
) -> optax.GradientTransformation:
    """`stage`; ValueError for what is no transformation at all, as "sara" is not."""
    if not isinstance(stage, optax.GradientTransformation):
        raise ValueError(
            f"{name} must be a stage, such as lowrank_optax.{example}, not "
            f"{found(stage)}"
        )
    return stage


def basis_or(
    basis: optax.GradientTransformation | None,
    rule: Callable[[], optax.GradientTransformation],
) -> optax.GradientTransformation:
    """`basis`, or `rule()` if there is none."""
    return rule() if basis is None else stage_of(basis, "basis", "sara_sample(key=0)")


def adam_or(
    step: optax.GradientTransformation | None,
    b1: Number,
    b2: Number,
    eps: Number | None,
    variant: Variant,
) -> optax.GradientTransformation:
    """`step`, or Adam in the subspace, which leaves its moments as they are."""
    inner = arithmetic_of(variant).adam(b1, b2, eps)
    if step is None:
        return in_subspace(inner)
    if variant == "published":
        raise ValueError('variant="published" has its own step: leave out step')
    return stage_of(step, "step", "in_subspace(optax.scale_by_adam())")


def low_rank_optimizer(
    stages: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: Rank = 0.25,
    refresh_every: int = 200,
    stagger: bool = False,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Mask = None,
    dimension_numbers: DimensionNumbers = "auto",
    square: Square = "input",
    precision: jax.lax.PrecisionLike = None,
    after: optax.GradientTransformation | None = None,
) -> Extensible:
    """Makes an optimizer of stages: `low_rank`, weight decay, learning rate.

    W <- W - lr (step + weight_decay W). Leaves of full rank pass through the stages'
    step too, which makes Adam AdamW for them. A step that `low_rank` skips changes
    nothing, weight decay and schedules included, and a step at which a schedule is not
    finite is skipped too. (`optax.inject_hyperparams` counts by itself: a schedule that
    it evaluates goes on at skipped steps.) Updates have the gradients' dtype.

    Args:
      stages: a basis rule, a projection, a step and a way back, chained.
      learning_rate: a number or a schedule.
      rank: r, an int, a fraction of each matrix's smaller side, or rules by path
        (`low_rank`).
      refresh_every: T, the steps from one basis to the next.
      stagger: whether refreshes are spread over the interval, each matrix in its turn,
        so that no step has all of them (docs/concepts/refresh.md).
      weight_decay: decoupled, multiplied by the learning rate; a number or a schedule.
      mask: which leaves decay, as in `optax.add_decayed_weights`.
      dimension_numbers: which leaves are low-rank matrices (`low_rank`).
      square: the side of a square matrix that is projected (`low_rank`).
      precision: of the products with S (`low_rank`).
      after: a transformation in place of weight decay and learning rate.

    Raises:
      ValueError: as `low_rank` does; a learning rate or weight decay that is neither a
        finite number nor a schedule.

    Example:
      >>> stages = optax.chain(lro.sara_sample(key=0), lro.project(),
      ...     lro.in_subspace(optax.scale_by_lion()), lro.project_back())
      >>> tx = lro.low_rank_optimizer(stages, 1e-4, rank=4, weight_decay=0.1)
    """
    check_rate("learning_rate", learning_rate)
    check_rate("weight_decay", weight_decay)
    bracket = low_rank(
        stages,
        rank=rank,
        refresh_every=refresh_every,
        stagger=stagger,
        dimension_numbers=dimension_numbers,
        square=square,
        precision=precision,
    )
    if after is None:
        after = decay_and_rate(learning_rate, weight_decay, mask)
    return _skip_together(bracket, after, (learning_rate, weight_decay))


def variant_optimizer(
    stages: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    variant: Variant,
    b1: Number,
    b2: Number,
    **options: Unpack[Options],
) -> Extensible:
    """`low_rank_optimizer` with the weight decay and learning rate of a variant."""
    weight_decay, mask = options.get("weight_decay", 0.0), options.get("mask")
    after = arithmetic_of(variant).after(learning_rate, weight_decay, mask, b1, b2)
    return low_rank_optimizer(stages, learning_rate, **options, after=after)


def full_rank_optimizer(
    stages: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: Rank | None = None,
    square: Square = "input",
    precision: jax.lax.PrecisionLike = None,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Mask = None,
    dimension_numbers: DimensionNumbers = "auto",
) -> Extensible:
    """`low_rank_optimizer` without subspaces, in `full_matrices`."""
    check_rate("learning_rate", learning_rate)
    check_rate("weight_decay", weight_decay)
    bracket = full_matrices(
        stages,
        rank=rank,
        dimension_numbers=dimension_numbers,
        square=square,
        precision=precision,
    )
    after = decay_and_rate(learning_rate, weight_decay, mask)
    return _skip_together(bracket, after, (learning_rate, weight_decay))


def _skip_together(
    bracket: Extensible,
    after: optax.GradientTransformation,
    rates: tuple[optax.ScalarOrSchedule, ...],
) -> Extensible:
    """`optax.chain(bracket, after)`, except that both skip a step together.

    Args:
      bracket: skips a gradient that is not finite.
      after: weight decay and learning rate.
      rates: the numbers and schedules of `after`, whose steps are those of `bracket`; a
        step at which one is not finite is skipped.
    """
    after = optax.with_extra_args_support(after)

    def init(params: optax.Params) -> tuple[optax.OptState, optax.OptState]:
        return bracket.init(params), after.init(params)

    def update(
        updates: optax.Updates,
        state: tuple[optax.OptState, optax.OptState],
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, tuple[optax.OptState, optax.OptState]]:
        if not isinstance(state, tuple) or len(state) != 2:
            raise ValueError(
                f"update() got a {type(state).__name__} for its state; call "
                "update(gradients, state, params) with a state from tx.init(params)"
            )
        old, old_rest = cast(LowRankState, state[0]), state[1]
        steps, new = bracket.update(updates, old, params, **extra_args)
        steps, new_rest = after.update(steps, old_rest, params, **extra_args)
        # Weight decay and schedule would go on with the zero update of a skipped step.
        accept = extra_args.get("accept")
        if accept is not True:
            finite = finite_at(old.count, *rates)
            if finite is not None:
                new = if_accepted(finite, new, old._replace(skipped=old.skipped + 1))
            accept = cast(LowRankState, new).skipped == old.skipped
        steps = jax.tree.map(lambda u, g: u.astype(jnp.result_type(g)), steps, updates)
        new_rest = if_accepted(accept, new_rest, old_rest)
        return if_accepted(accept, steps), (new, new_rest)

    return extensible(
        stage(init, update),
        lambda more: _skip_together(bracket.extended(more), after, rates),
    )
