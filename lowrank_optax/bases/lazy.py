"""When: basis rules that choose a basis less often than every T steps."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.bases.batching import Request
from lowrank_optax.bases.follow import follow
from lowrank_optax.bases.redrawn import Redrawn, redraw
from lowrank_optax.bases.refresh import Chosen, Refresh, choose_anew, unmoved
from lowrank_optax.bases.rule import BasisRule, BasisState, Rule, never, rule_of
from lowrank_optax.core.aliases import Number, Tree
from lowrank_optax.core.checks import check_count, check_fraction
from lowrank_optax.core.frame import Frame
from lowrank_optax.core.keys import split, typed_key
from lowrank_optax.core.stage import (
    Clock,
    both,
    branch,
    check_no_turns,
    check_only_rule,
    timed_stage,
)
from lowrank_optax.core.trees import map_frames, nothing, update_frames


def frozen(rule: optax.GradientTransformation) -> BasisRule:
    """Keeps `rule`'s basis of step 0 for the complete run.

    The ablation of the GrassWalk paper (section 5): S_0 comes from a matrix's first
    nonzero gradient.

    Args:
      rule: a basis rule.

    Raises:
      ValueError: a stage that is no basis rule; at update, outside `low_rank`.

    Example:
      >>> stages = optax.chain(lro.bases.frozen(lro.dominant_svd()), lro.project(),
      ...     lro.in_subspace(optax.scale_by_adam()), lro.recover_residual())
    """
    inside = rule_of(rule, "frozen()")
    # Not batched: most steps of the run choose no basis.
    inside = dataclasses.replace(inside, once=True, batched=never)
    return redraw(inside) if isinstance(rule, Redrawn) else follow(inside)


class LazyRefreshState(NamedTuple):
    """State of `lazy_refresh`; all but the rule's are trees like the parameters.

    Attributes:
      rule_state: the rule's; its key is split whenever a refresh is due.
      cycle: () int32, refreshes done.
      interval: () int32, refreshes due for each refresh done.
      wait: () int32, refreshes still to be skipped.
      similarities: (window,) float32, of each of the last bases to the one before it,
        the newest last; -1 where there is none yet.
    """

    rule_state: BasisState
    cycle: Tree
    interval: Tree
    wait: Tree
    similarities: Tree


def lazy_refresh(
    rule: optax.GradientTransformation,
    *,
    threshold: Number = 0.4,
    window: int = 5,
    factor: int = 2,
) -> optax.GradientTransformationExtraArgs:
    """Refreshes a basis less often while it hardly moves (Q-GaLore).

    At a refresh, the similarity of the new basis to the last one,

        cos(S_t S_t^T, S_{t-1} S_{t-1}^T) = ||S_t^T S_{t-1}||_F^2 / r,

    enters a window. Once the mean of a full window is at least `threshold`, every
    refresh multiplies the leaf's interval by `factor` (Zhang et al. 2024, "Q-GaLore",
    section 3.2). The interval never shrinks. A stacked kernel has one interval, by the
    mean over its layers. Deviation: the released q-galore-torch compares only the first
    singular vector, including its sign, which the SVD does not determine. The threshold
    is the paper's.

    Args:
      rule: a basis rule that stores its bases.
      threshold: of the mean similarity, in [0, 1].
      window: how many similarities are averaged, at least 1.
      factor: by which the interval grows, at least 1.

    Raises:
      ValueError: a window or a factor below 1; a threshold outside [0, 1]; a stage that
        is not a basis rule, `gaussian`, or `frozen`; at init, inside
        `low_rank(stagger=True)`; at update, outside `low_rank`.

    Example:
      >>> tx = lro.galore(0.01, rank=4, refresh_every=200,
      ...     basis=lro.bases.lazy_refresh(lro.dominant_svd()))
    """
    check_fraction("threshold", threshold)
    check_count("window", window)
    check_count("factor", factor)
    inside = dataclasses.replace(rule_of(rule, "lazy_refresh()"), batched=never)
    if isinstance(rule, Redrawn) or inside.once:
        raise ValueError(
            "lazy_refresh() compares a basis with the last one; wrap a rule other than "
            "gaussian(), which stores no bases, and frozen(), which chooses only one"
        )

    def init(params: optax.Params) -> LazyRefreshState:
        check_no_turns(
            params,
            "lazy_refresh()",
            "it has one interval for all layers of a kernel: leave out either",
        )

        def each(make: Callable[[], jax.Array]) -> Tree:
            return map_frames(lambda _: make(), params, plain=nothing)

        return LazyRefreshState(
            rule_state=cast(BasisState, rule.init(params)),
            cycle=each(lambda: jnp.zeros([], jnp.int32)),
            interval=each(lambda: jnp.ones([], jnp.int32)),
            wait=each(lambda: jnp.zeros([], jnp.int32)),
            similarities=each(lambda: jnp.full((window,), -1.0, jnp.float32)),
        )

    def update(
        frames: optax.Updates, state: LazyRefreshState, now: Clock
    ) -> tuple[optax.Updates, LazyRefreshState]:
        check_only_rule(frames)
        old = state.rule_state
        key, sub = old.rng_key, None
        if key is not None and (seed := inside.key) is not None:
            key, sub = branch(
                now.refresh,
                lambda k: split(k, seed),
                lambda k: (k, typed_key(k, seed)),
                key,
            )

        step = Refresh(inside, frames, old, now)
        ask = partial(_ask, inside, sub, now)
        chosen = step.each(ask, state.cycle, state.wait)
        pace = partial(_pace, now, threshold, factor)
        _, _, *paces = update_frames(pace, frames, chosen.rotation, *state[1:])
        rule_state = BasisState(key, chosen.stored, chosen.started)
        return step.with_bases(chosen), LazyRefreshState(rule_state, *paces)

    return timed_stage(init, update)


def _ask(
    rule: Rule,
    key: jax.Array | None,
    now: Clock,
    frame: Frame,
    started: jax.Array,
    stored: Tree,
    cycle: jax.Array,
    wait: jax.Array,
) -> Chosen:
    """The basis of one leaf, new where its interval has passed."""
    clock, due = now._replace(cycle=cycle), both(now.refresh, wait == 0)
    own = Refresh(rule, frame, BasisState(key, stored, started), clock)
    request = Request(rule, key, clock)
    return branch(
        own.wanted(due),
        lambda: choose_anew(request, due, frame, started, stored),
        lambda: unmoved(frame, started, stored),
    )


def _pace(
    now: Clock,
    threshold: Number,
    factor: int,
    frame: Frame,
    rotation: jax.Array,
    cycle: jax.Array,
    interval: jax.Array,
    wait: jax.Array,
    similarities: jax.Array,
) -> tuple[Tree, ...]:
    """Returns a leaf, its rotation, and its `LazyRefreshState` after a step."""
    if frame.full_rank:
        return frame, rotation, cycle, interval, wait, similarities
    overlap = jnp.mean(jnp.sum(jnp.square(rotation), axis=(-2, -1))) / frame.rank
    due = now.refresh & (wait == 0)  # an array, whatever `refresh` is
    compared = due & (now.step > 0)
    shifted = jnp.append(similarities[1:], overlap.astype(similarities.dtype))
    similarities = jnp.where(compared, shifted, similarities)
    full = jnp.all(similarities >= 0)
    grow = compared & full & (jnp.mean(similarities) >= threshold)
    interval = jnp.where(grow, factor * interval, interval)
    wait = jnp.where(due, interval - 1, wait - now.refresh)
    return frame, rotation, cycle + due, interval, wait, similarities
