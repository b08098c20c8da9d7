"""The arithmetic of the released PyTorch packages, where it differs from the papers.

galore-torch 1.0, fira 1.0.2 and apollo-torch 1.0.3 apply Adam's bias correction to the
step size, so that epsilon and the limiter see uncorrected moments. They decay weights
last, after the step. Fira's residual is G - scale S G~. `variant="published"` of
`galore`, `fira`, `apollo`, `recover_residual` and `scale_gradient` selects all of this.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.core.aliases import Mask, Number
from lowrank_optax.core.linalg import average_weight
from lowrank_optax.core.stage import simple_stage, stage

Variant = Literal["paper", "published"]


class Arithmetic(NamedTuple):
    """The differences between the variants of a method.

    Attributes:
      adam: makes Adam from b1, b2 and eps; an eps of None is the variant's default.
      after: makes what follows `low_rank` from the learning rate, weight decay, mask,
        b1 and b2.
      norm_eps: added to the norms that the residual's scale and limiter divide by.
      scaled_residual: whether the residual is G - scale S G~ instead of G - S G~.
      stores_zero_norm: whether the limiter stores a norm of zero like any other.
    """

    adam: Callable[[Number, Number, Number | None], optax.GradientTransformation]
    after: Callable[
        [optax.ScalarOrSchedule, optax.ScalarOrSchedule, Mask, Number, Number],
        optax.GradientTransformation,
    ]
    norm_eps: float
    scaled_residual: bool
    stores_zero_norm: bool


def arithmetic_of(variant: Variant) -> Arithmetic:
    """Returns the variant's arithmetic; raises ValueError for an unknown variant."""
    variants: dict[str, Arithmetic] = {"paper": PAPER, "published": PUBLISHED}
    if variant not in variants:
        raise ValueError(f'variant={variant!r}: choose "paper" or "published"')
    return variants[variant]


def scale_by_uncorrected_adam(
    b1: Number = 0.9, b2: Number = 0.999, eps: Number = 1e-6
) -> optax.GradientTransformation:
    """Adam without bias correction: M / (sqrt(V) + eps).

    The state is `optax.ScaleByAdamState`, so that the moments are found and rotated.
    """
    adam = optax.scale_by_adam(b1, b2)

    def update(
        updates: optax.Updates,
        state: optax.ScaleByAdamState,
        params: optax.Params | None = None,
    ) -> tuple[optax.Updates, optax.ScaleByAdamState]:
        new = cast(optax.ScaleByAdamState, adam.update(updates, state, params)[1])
        step = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), new.mu, new.nu)
        return step, new

    return optax.GradientTransformation(adam.init, cast(Any, update))


class StepCount(NamedTuple):
    """The state of a transformation that counts its steps: () int32."""

    count: jax.Array

    @classmethod
    def first(cls, _: optax.Params) -> "StepCount":
        return cls(jnp.zeros([], jnp.int32))


def scale_by_bias_correction(
    b1: Number = 0.9, b2: Number = 0.999
) -> optax.GradientTransformation:
    """Multiplies the update of step t = 1, 2, ... by sqrt(1 - b2^t) / (1 - b1^t)."""

    def update(
        updates: optax.Updates, state: StepCount
    ) -> tuple[optax.Updates, StepCount]:
        count = jnp.asarray(optax.safe_increment(state.count))
        w_m, w_v = (average_weight(jnp.asarray(1.0 - b), count) for b in (b1, b2))
        factor = jnp.sqrt(w_v) / w_m
        scaled = jax.tree.map(lambda u: (factor * u).astype(u.dtype), updates)
        return scaled, StepCount(count)

    return simple_stage(StepCount.first, update)


def decay_stepped_weights(
    learning_rate: optax.ScalarOrSchedule, weight_decay: optax.ScalarOrSchedule
) -> optax.GradientTransformation:
    """Decays the weights after their step: u <- u - lr weight_decay (W + u).

    Stands last in the chain, after the learning rate.

    Raises:
      ValueError: if `update` is called without params.
    """

    def update(
        updates: optax.Updates,
        state: StepCount,
        params: optax.Params | None = None,
        **_: Any,
    ) -> tuple[optax.Updates, StepCount]:
        if params is None:
            raise ValueError(
                "weight decay needs params: call tx.update(grads, state, params)"
            )
        lr, decay = (
            x(state.count) if callable(x) else x for x in (learning_rate, weight_decay)
        )
        decayed = jax.tree.map(
            lambda u, w: (u - lr * decay * (w + u)).astype(u.dtype),
            updates,
            params,
        )
        return decayed, StepCount(jnp.asarray(optax.safe_increment(state.count)))

    return stage(StepCount.first, update)


def decay_and_rate(
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: optax.ScalarOrSchedule,
    mask: Mask,
) -> optax.GradientTransformation:
    """Adds decoupled weight decay, then multiplies by the learning rate (AdamW)."""
    return optax.chain(
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def _published_after(
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: optax.ScalarOrSchedule,
    mask: Mask,
    b1: Number,
    b2: Number,
) -> optax.GradientTransformation:
    decay = decay_stepped_weights(learning_rate, weight_decay)
    return optax.chain(
        scale_by_bias_correction(b1, b2),
        optax.scale_by_learning_rate(learning_rate),
        decay if mask is None else optax.masked(decay, mask),
    )


PAPER = Arithmetic(
    adam=lambda b1, b2, eps: optax.scale_by_adam(b1, b2, 1e-8 if eps is None else eps),
    after=lambda rate, decay, mask, *_: decay_and_rate(rate, decay, mask),
    norm_eps=0.0,
    scaled_residual=False,
    stores_zero_norm=False,
)
PUBLISHED = Arithmetic(
    adam=lambda b1, b2, eps: scale_by_uncorrected_adam(
        b1, b2, 1e-6 if eps is None else eps
    ),
    after=_published_after,
    norm_eps=1e-8,
    scaled_residual=True,
    stores_zero_norm=True,
)
