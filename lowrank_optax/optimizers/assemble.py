"""What the named optimizers share: Adam, and the bracket with what follows it."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.layout import DimensionNumbers, Rank
from lowrank_optax.low_rank import LowRankState, low_rank
from lowrank_optax.optimizers.published import (
    decay_stepped_weights,
    scale_by_bias_correction,
    scale_by_uncorrected_adam,
)
from lowrank_optax.step import in_subspace

Mask = Any | Callable[[Any], Any] | None

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
    "bits",
    "mask",
    "dimension_numbers",
    "precision",
    "variant",
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
    return rule(key) if basis is None else basis


def adam(
    b1: float | jax.Array,
    b2: float | jax.Array,
    eps: float | jax.Array | None,
    variant: str,
) -> optax.GradientTransformation:
    """Adam as the papers write it, or as galore-torch and fira compute it."""
    if variant == "published":
        return scale_by_uncorrected_adam(b1, b2, 1e-6 if eps is None else eps)
    if variant != "paper":
        raise ValueError(f'variant={variant!r}: choose "paper" or "published"')
    return optax.scale_by_adam(b1, b2, 1e-8 if eps is None else eps)


def adam_or(
    step: optax.GradientTransformation | None,
    b1: float | jax.Array,
    b2: float | jax.Array,
    eps: float | jax.Array | None,
    variant: str,
) -> optax.GradientTransformation:
    """`step`, or Adam in the subspace with its moments left as they are."""
    inner = adam(b1, b2, eps, variant)
    if step is not None and variant == "published":
        raise ValueError('variant="published" has a step of its own: leave out step')
    return in_subspace(inner) if step is None else step


def optimizer(
    stages: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: Rank,
    refresh_every: int,
    dimension_numbers: DimensionNumbers,
    precision: jax.lax.PrecisionLike,
    weight_decay: float | jax.Array,
    mask: Mask,
    published_decays: tuple[Any, Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The bracket around the stages, then weight decay and learning rate.

    Leaves of full rank pass through the stages' Adam too, which makes it AdamW for
    them. A step that the bracket skips changes nothing: no decay, no schedule. With
    `published_decays` = (b1, b2) the rest is the released packages': bias correction on
    the step size, and the decay last.
    """
    bracket = low_rank(
        stages,
        rank=rank,
        refresh_every=refresh_every,
        dimension_numbers=dimension_numbers,
        precision=precision,
    )
    rate = optax.scale_by_learning_rate(learning_rate)
    if published_decays is None:
        decay = optax.add_decayed_weights(weight_decay, mask)
        return _skip_together(bracket, optax.chain(decay, rate))
    decay = decay_stepped_weights(learning_rate, weight_decay)
    if mask is not None:
        decay = optax.masked(decay, mask)
    correction = scale_by_bias_correction(*published_decays)
    return _skip_together(bracket, optax.chain(correction, rate, decay))


def _skip_together(
    bracket: optax.GradientTransformationExtraArgs, after: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """`optax.chain(bracket, after)`, except that `after` skips what `bracket` skips."""
    after = optax.with_extra_args_support(after)

    def init(params: Any) -> Any:
        return bracket.init(params), after.init(params)

    def update(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        old, old_rest = state
        updates, new = bracket.update(updates, old, params, **extra_args)
        updates, new_rest = after.update(updates, old_rest, params, **extra_args)
        accepted = cast(LowRankState, new).skipped == old.skipped
        return (
            jax.tree.map(lambda u: jnp.where(accepted, u, jnp.zeros_like(u)), updates),
            (new, jax.tree.map(partial(jnp.where, accepted), new_rest, old_rest)),
        )

    return optax.GradientTransformationExtraArgs(init, update)
