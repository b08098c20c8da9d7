"""What the named optimizers share: Adam, and the bracket with what follows it."""

import inspect
from collections.abc import Callable
from typing import Any, cast

import jax
import optax

from lowrank_optax.bracket.bracket import LowRankState, full_matrices, low_rank
from lowrank_optax.bracket.extend import Extensible, extensible
from lowrank_optax.bracket.finite import if_accepted
from lowrank_optax.core.aliases import Mask, Number
from lowrank_optax.core.layout import (
    TRANSFORMER_MATRICES,
    DimensionNumbers,
    Rank,
    Square,
)
from lowrank_optax.core.stage import stage
from lowrank_optax.recovery.published import Variant, arithmetic_of, decay_and_rate
from lowrank_optax.steps.subspace import in_subspace

_STATIC = {
    "rank",
    "refresh_every",
    "key",
    "basis",
    "step",
    "optimizer_of_basis",
    "recompute_every",
    "feedback",
    "residual",
    "heads",
    "block_size",
    "min_size",
    "keep",
    "iterations",
    "method",
    "momentum",
    "rest",
    "bits",
    "walk_rank",
    "mask",
    "dimension_numbers",
    "square",
    "precision",
    "variant",
    "stages",
    "after",
}


def static_args(factory: Callable[..., Any]) -> tuple[str, ...]:
    """The arguments of a named optimizer that are no numbers to be scheduled.

    Args:
      factory: `galore` or any other of the named optimizers.

    Returns:
      Their names, for `optax.inject_hyperparams`.

    Example:
      >>> import lowrank_optax as lro
      >>> make = optax.inject_hyperparams(
      ...     lro.galore, static_args=lro.static_args(lro.galore))
      >>> tx = make(learning_rate=0.01, rank=4, refresh_every=200)
      >>> "rank" in lro.static_args(lro.galore), "scale" in lro.static_args(lro.galore)
      (True, False)
    """
    return tuple(n for n in inspect.signature(factory).parameters if n in _STATIC)


def one_of(
    key: jax.Array | int | None,
    basis: optax.GradientTransformation | None,
    rule: Callable[[Any], optax.GradientTransformation],
) -> optax.GradientTransformation:
    """The basis rule: `rule(key)`, or `basis` in its place."""
    if (key is None) == (basis is None):
        raise ValueError(
            "give either key, a seed for the random bases, or basis, another basis rule"
        )
    return (
        rule(key) if basis is None else stage_of(basis, "basis", "sara_sample(key=0)")
    )


def stage_of(
    given: optax.GradientTransformation, name: str, example: str
) -> optax.GradientTransformation:
    """`given`; ValueError for what is no transformation at all, as "sara" is not."""
    if not isinstance(given, optax.GradientTransformation):
        raise ValueError(
            f"{name} is a stage, such as lowrank_optax.{example}, not {given!r}"
        )
    return given


def basis_or(
    basis: optax.GradientTransformation | None,
    rule: Callable[[], optax.GradientTransformation],
) -> optax.GradientTransformation:
    """`basis`, or `rule()` where none is given."""
    return rule() if basis is None else stage_of(basis, "basis", "sara_sample(key=0)")


def adam_or(
    step: optax.GradientTransformation | None,
    b1: Number,
    b2: Number,
    eps: Number | None,
    variant: Variant,
) -> optax.GradientTransformation:
    """`step`, or Adam in the subspace with its moments left as they are."""
    inner = arithmetic_of(variant).adam(b1, b2, eps)
    if step is None:
        return in_subspace(inner)
    if variant == "published":
        raise ValueError('variant="published" has a step of its own: leave out step')
    return stage_of(step, "step", "in_subspace(optax.scale_by_adam())")


def low_rank_optimizer(
    stages: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: Rank,
    refresh_every: int,
    weight_decay: Number = 0.0,
    mask: Mask = None,
    dimension_numbers: DimensionNumbers = TRANSFORMER_MATRICES,
    square: Square = "input",
    precision: jax.lax.PrecisionLike = None,
    after: optax.GradientTransformation | None = None,
) -> Extensible:
    """A named optimizer from its stages: `low_rank`, weight decay, learning rate.

    W <- W - lr (step + weight_decay W). Leaves of full rank pass through the stages'
    step too, which makes Adam AdamW for them. A step that `low_rank` skips changes
    nothing: no decay, no schedule, which a plain `optax.chain` would go on with.
    Updates have the gradients' dtype.

    Args:
      stages: where, in, step and back, chained.
      learning_rate: a number or a schedule.
      rank, refresh_every, dimension_numbers, square, precision: as in `low_rank`.
      weight_decay: decoupled, times the learning rate.
      mask: which leaves decay, as in `optax.add_decayed_weights`.
      after: another transformation in place of decay and rate.

    Raises:
      ValueError: as `low_rank` does.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> stages = optax.chain(lro.sara_sample(key=0), lro.project(),
      ...     lro.in_subspace(optax.scale_by_lion()), lro.project_back())
      >>> tx = lro.low_rank_optimizer(stages, 1e-4, rank=4, refresh_every=200,
      ...     weight_decay=0.1)
      >>> params = {"mlp": {"kernel": jnp.ones((16, 64))}, "norm": jnp.ones(16)}
      >>> updates, state = tx.update(params, tx.init(params), params)
    """
    bracket = low_rank(
        stages,
        rank=rank,
        refresh_every=refresh_every,
        dimension_numbers=dimension_numbers,
        square=square,
        precision=precision,
    )
    if after is None:
        after = decay_and_rate(learning_rate, weight_decay, mask)
    return _skip_together(bracket, after)


def whole_optimizer(
    stages: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    *,
    weight_decay: Number,
    mask: Mask,
    dimension_numbers: DimensionNumbers,
    square: Square = "input",
) -> Extensible:
    """`low_rank_optimizer` without subspaces, in `full_matrices`."""
    bracket = full_matrices(stages, dimension_numbers=dimension_numbers, square=square)
    return _skip_together(bracket, decay_and_rate(learning_rate, weight_decay, mask))


def _skip_together(
    bracket: Extensible, after: optax.GradientTransformation
) -> Extensible:
    """`optax.chain(bracket, after)`, except that `after` skips what `bracket` skips."""
    after = optax.with_extra_args_support(after)

    def init(params: optax.Params) -> tuple[optax.OptState, optax.OptState]:
        return bracket.init(params), after.init(params)

    def update(
        updates: optax.Updates,
        state: tuple[optax.OptState, optax.OptState],
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, tuple[optax.OptState, optax.OptState]]:
        old, old_rest = cast(LowRankState, state[0]), state[1]
        steps, new = bracket.update(updates, old, params, **extra_args)
        steps, new_rest = after.update(steps, old_rest, params, **extra_args)
        # Weight decay and schedule would go on with the zero update of a skipped step.
        accept = extra_args.get("accept")
        if accept is not True:
            accept = cast(LowRankState, new).skipped == old.skipped
        steps = jax.tree.map(lambda u, g: u.astype(g.dtype), steps, updates)
        new_rest = if_accepted(accept, new_rest, old_rest)
        return if_accepted(accept, steps), (new, new_rest)

    return extensible(
        stage(init, update), lambda more: _skip_together(bracket.extended(more), after)
    )
