"""When: basis rules that are asked less often than every T steps."""

import dataclasses
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.basis import (
    BasisRule,
    BasisState,
    Chosen,
    Leaves,
    choose_anew,
    clock_of,
    follow,
    rule_of,
    starts,
)
from lowrank_optax.frame import Clock, Frame, each_apart, in_turn, stage


def frozen(rule: optax.GradientTransformation) -> BasisRule:
    """`rule`'s basis of step 0, for the whole run.

    The ablation of the GrassWalk paper (section 5): S_0 from a matrix's first gradient
    that is not zero, and what the projection lost given back.

    Args:
      rule: a basis rule.

    Raises:
      ValueError: a stage that is no basis rule; at update, outside `low_rank`.

    Example:
      >>> import lowrank_optax as lro
      >>> stages = optax.chain(lro.frozen(lro.dominant_svd()), lro.project(),
      ...     lro.in_subspace(optax.scale_by_adam()), lro.recover_residual())
    """
    return follow(dataclasses.replace(rule_of(rule, "frozen()"), once=True))


class LazyRefreshState(NamedTuple):
    """State of `lazy_refresh`; but for the rule's, trees like the parameters.

    Attributes:
      rule_state: the rule's, its key split whenever a refresh is due.
      cycle: () int32, refreshes that were done.
      interval: () int32, refreshes that were due per refresh that is done.
      wait: () int32, refreshes still to be passed over.
      similarities: (window,) float32, of the last bases to the ones before them, the
        newest last; -1 where there was none.
    """

    rule_state: BasisState
    cycle: Any
    interval: Any
    wait: Any
    similarities: Any


class _Pace(NamedTuple):
    """The last four fields of one leaf."""

    cycle: Any
    interval: Any
    wait: Any
    similarities: Any


_A_PACE = jax.tree.structure(_Pace(0, 0, 0, 0))


def lazy_refresh(
    rule: optax.GradientTransformation,
    *,
    threshold: float | jax.Array = 0.4,
    window: int = 5,
    factor: int = 2,
) -> optax.GradientTransformationExtraArgs:
    """Asks `rule` less and less often for a basis that hardly moves (Q-GaLore).

    At a refresh that is done, the similarity of the new basis to the last one,

        cos(S_t S_t^T, S_{t-1} S_{t-1}^T) = ||S_t^T S_{t-1}||_F^2 / r,

    enters a window. Once the mean of a full window is at least `threshold`, the leaf's
    interval is multiplied by `factor` at every refresh, and never falls again
    (Zhang et al. 2024, "Q-GaLore", section 3.2). A stacked kernel is one leaf and has
    one interval, by the mean over its layers.

    Deviation: the released q-galore-torch compares the first singular vector alone,
    with its sign, which the SVD leaves open. The paper's threshold is kept.

    Args:
      rule: a basis rule that keeps its bases.
      threshold: of the mean similarity, in [0, 1].
      window: how many similarities are averaged, at least 1.
      factor: by which the interval grows, at least 1.

    Raises:
      ValueError: a window or a factor below 1; a stage that is no basis rule,
        `gaussian`, or `frozen`; at update, outside `low_rank`.

    Example:
      >>> import lowrank_optax as lro
      >>> tx = lro.galore(0.01, rank=4, refresh_every=200,
      ...     basis=lro.lazy_refresh(lro.dominant_svd()))
    """
    for name, value in (("window", window), ("factor", factor)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an int of at least 1, not {value!r}")
    inside = rule_of(rule, "lazy_refresh()")
    if inside.storage.shared or inside.once:
        raise ValueError(
            "lazy_refresh() compares a basis with the last one; it has nothing to do "
            "around gaussian(), which keeps none, or frozen(), which is never asked"
        )

    def init(params: optax.Params) -> LazyRefreshState:
        def start(_: Any) -> _Pace:
            zero, one, zero_too = (jnp.full([], x, jnp.int32) for x in (0, 1, 0))
            return _Pace(zero, one, zero_too, jnp.full((window,), -1.0, jnp.float32))

        leaves, structure = jax.tree.flatten(params)
        paces = in_turn(structure, _A_PACE, [start(x) for x in leaves])
        return LazyRefreshState(cast(BasisState, rule.init(params)), *paces)

    def one(
        frame: Frame, last: Chosen, pace: _Pace, key: jax.Array | None, now: Clock
    ) -> tuple[Chosen, _Pace]:
        due = now.refresh & (pace.wait == 0)
        chosen = jax.lax.cond(
            due | starts(inside, [frame], [last]),
            lambda: choose_anew(
                inside, frame, last, key, now._replace(cycle=pace.cycle), due
            ),
            lambda: last,
        )
        overlap = jnp.mean(jnp.sum(jnp.square(chosen.turn), axis=(-2, -1))) / frame.rank
        compared = due & (now.step > 0)
        shifted = jnp.append(pace.similarities[1:], overlap.astype(jnp.float32))
        similarities = jnp.where(compared, shifted, pace.similarities)
        full = jnp.all(similarities >= 0)
        grow = compared & full & (jnp.mean(similarities) >= threshold)
        interval = jnp.where(grow, factor * pace.interval, pace.interval)
        wait = jnp.where(due, interval - 1, pace.wait - now.refresh)
        return chosen, _Pace(pace.cycle + due, interval, wait, similarities)

    def update(
        updates: optax.Updates,
        state: LazyRefreshState,
        params: optax.Params | None = None,
        *,
        clock: Clock | None = None,
        **_: Any,
    ) -> tuple[optax.Updates, LazyRefreshState]:
        del params
        now, leaves = clock_of(clock), Leaves(inside, updates, state.rule_state)
        key, sub = _split_if(now.refresh, state.rule_state.rng_key)
        paces = each_apart(leaves.structure, _A_PACE, _Pace(*state[1:]))
        new = []
        rows = zip(leaves.places, leaves.frames, leaves.last, strict=True)
        for i, frame, last in rows:
            chosen, paces[i] = one(frame, last, paces[i], sub, now)
            new.append(chosen)
        frames, rule_state = leaves.with_bases(key, new)
        paces = in_turn(leaves.structure, _A_PACE, paces)
        return frames, LazyRefreshState(rule_state, *paces)

    return stage(init, update)


def _split_if(
    due: jax.Array, key: jax.Array | None
) -> tuple[jax.Array | None, jax.Array | None]:
    """The key to keep and the key to draw from, if one is due."""
    if key is None:
        return None, None
    kept, drawn = jax.lax.cond(
        due, lambda k: tuple(jax.random.split(k)), lambda k: (k, k), key
    )
    return kept, drawn
