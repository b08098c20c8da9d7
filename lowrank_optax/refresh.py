"""When: basis rules that are asked less often than every T steps."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.basis import clock_of
from lowrank_optax.frame import Clock, Frame, is_frame, map_frames, nothing
from lowrank_optax.online_pca import OnlinePCAState


def frozen(
    rule: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """`rule`'s basis of step 0, for the whole run.

    The ablation of the GrassWalk paper (section 5): S_0 from the first gradient, and
    what the projection lost given back.

    Args:
      rule: a basis rule.

    Raises:
      ValueError: at init, `online_pca`; at update, outside `low_rank`.

    Example:
      >>> import lowrank_optax as lro
      >>> stages = optax.chain(lro.frozen(lro.dominant_svd()), lro.project(),
      ...     lro.in_subspace(optax.scale_by_adam()), lro.recover_residual())
    """
    rule = optax.with_extra_args_support(rule)

    def init(params: Any) -> Any:
        return _with_refreshes(rule.init(params), "frozen()")

    def update(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        clock: Clock | None = None,
        **extra_args: Any,
    ) -> tuple[Any, Any]:
        now = clock_of(clock)
        still = now._replace(refresh=now.refresh & (now.step == 0))
        return rule.update(updates, state, params, clock=still, **extra_args)

    return optax.GradientTransformationExtraArgs(init, update)


class LazyRefreshState(NamedTuple):
    """State of `lazy_refresh`: for each matrix leaf, by path.

    Attributes:
      rule_state: the rule's state for this leaf alone.
      cycle: () int32, refreshes that were done.
      interval: () int32, refreshes that were due per refresh that is done.
      wait: () int32, refreshes still to be passed over.
      similarities: (window,) float32, of the last bases to the ones before them, the
        newest last; -1 where there was none.
    """

    rule_state: Any
    cycle: Any
    interval: Any
    wait: Any
    similarities: Any


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
      rule: a basis rule with orthonormal bases.
      threshold: of the mean similarity, in [0, 1].
      window: how many similarities are averaged, at least 1.
      factor: by which the interval grows, at least 1.

    Raises:
      ValueError: a window or a factor below 1; at init, `online_pca`; at update,
        outside `low_rank`.

    Example:
      >>> import lowrank_optax as lro
      >>> tx = lro.galore(0.01, rank=4, refresh_every=200,
      ...     basis=lro.lazy_refresh(lro.dominant_svd()))
    """
    for name, value in (("window", window), ("factor", factor)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an int of at least 1, not {value!r}")
    ask: Any = optax.with_extra_args_support(rule).update

    def init(params: Any) -> Any:
        def first(frame: Any) -> Any:
            return _with_refreshes(rule.init(frame), "lazy_refresh()")

        def each(make: Callable[[], jax.Array]) -> Any:
            return map_frames(lambda _: make(), params, plain=nothing)

        def zero() -> jax.Array:
            return jnp.zeros([], jnp.int32)

        return LazyRefreshState(
            rule_state=map_frames(first, params, plain=nothing),
            cycle=each(zero),
            interval=each(lambda: jnp.ones([], jnp.int32)),
            wait=each(zero),
            similarities=each(lambda: jnp.full((window,), -1.0, jnp.float32)),
        )

    def one(
        frame: Frame, now: Clock, state: Any, extra_args: Any
    ) -> tuple[Frame, LazyRefreshState]:
        rule_state, cycle, interval, wait, similarities = state
        due = now.refresh & (wait == 0)
        frame, rule_state = ask(
            frame,
            rule_state,
            clock=now._replace(refresh=due, cycle=cycle),
            **extra_args,
        )
        turn = frame.need("turn", "a basis rule such as dominant_svd()")
        overlap = jnp.mean(jnp.sum(jnp.square(turn), axis=(-2, -1))) / frame.rank
        compared = due & (now.step > 0)
        shifted = jnp.append(similarities[1:], overlap.astype(similarities.dtype))
        similarities = jnp.where(compared, shifted, similarities)
        full = jnp.all(similarities >= 0)
        grow = compared & full & (jnp.mean(similarities) >= threshold)
        interval = jnp.where(grow, factor * interval, interval)
        wait = jnp.where(due, interval - 1, wait - now.refresh)
        return frame, LazyRefreshState(
            rule_state, cycle + due, interval, wait, similarities
        )

    def update(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        clock: Clock | None = None,
        **extra_args: Any,
    ) -> tuple[Any, Any]:
        del params
        now = clock_of(clock)
        leaves, structure = jax.tree.flatten(updates, is_leaf=is_frame)
        parts = [structure.flatten_up_to(part) for part in state]
        for i, leaf in enumerate(leaves):
            if is_frame(leaf):
                leaves[i], new = one(leaf, now, [p[i] for p in parts], extra_args)
                for part, x in zip(parts, new, strict=True):
                    part[i] = x
        return structure.unflatten(leaves), LazyRefreshState(
            *[structure.unflatten(part) for part in parts]
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _with_refreshes(state: Any, wrapper: str) -> Any:
    if isinstance(state, OnlinePCAState):
        raise ValueError(
            f"{wrapper}: online_pca() moves its basis at every step, whatever the "
            f"clock says; take {wrapper} around another rule, such as dominant_svd()"
        )
    return state
