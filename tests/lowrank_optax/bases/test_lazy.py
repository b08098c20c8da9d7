"""When a basis is chosen anew: once, and lazily."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lowrank_optax as lro
from lowrank_optax.bases.follow import follow
from lowrank_optax.core.frame import Frame
from lowrank_optax.core.stage import Clock
from tests.helpers.rules import (
    M,
    N,
    R,
    bracket,
    frame_of,
    normal,
    same_bits,
    scanned,
    updates_of,
)

few = settings(derandomize=True, deadline=None, max_examples=20)


@pytest.mark.parametrize("rule", [lro.sara_sample(3), lro.bases.coordinates(3)])
def test_a_frozen_basis_is_that_of_step_zero(rule: Any) -> None:
    gradients = jnp.asarray(normal(6, 2, M, N))
    due = jnp.arange(6) % 2 == 0
    found, moving = jax.jit(
        lambda gs: (
            scanned(lro.bases.frozen(rule), gs, due),
            scanned(rule, gs, due).basis,
        )
    )(gradients)
    assert same_bits(found.basis, np.stack([moving[0]] * 6))
    assert same_bits(found.rotation[1:], np.broadcast_to(np.eye(R), (5, 2, R, R)))
    key = found.state.rng_key
    assert bool(jnp.all(key == key[0]))
    assert not same_bits(moving[-1], moving[0])


def counted(rule: Any, asked: list[tuple[str, int]]) -> Any:
    """`rule`, which notes the leaf and the step whenever it is asked for a basis."""

    def choose(frame: Frame, keys: Any, clock: Clock) -> Any:
        def note(step: Any) -> None:
            asked.append((frame.path, int(step)))

        jax.debug.callback(note, clock.step)
        return rule.rule.choose(frame, keys, clock)

    return follow(dataclasses.replace(rule.rule, choose=choose))


def when(asked: list[tuple[str, int]], name: str) -> list[int]:
    """The steps at which a leaf was asked."""
    jax.effects_barrier()
    return sorted(step for path, step in asked if path == name)


def chosen(rows: Any) -> Any:
    """(K, ..., M, R) bases of the given coordinates."""
    return np.swapaxes(np.eye(M, dtype=np.float32)[np.asarray(rows)], -1, -2)


STILL, ACROSS = [0, 1, 2], [3, 4, 5]


def test_a_leaf_that_stands_still_is_asked_less_and_less_and_another_is_not() -> None:
    steps, every = 70, 2
    moving = [STILL, ACROSS] * steps
    given_bases = {"a": chosen([STILL]), "b": chosen(moving), "c": chosen([STILL])}
    asked: list[tuple[str, int]] = []
    rule = lro.bases.lazy_refresh(
        counted(lro.bases.replay(given_bases), asked), window=2
    )
    g = {k: normal(steps, M, N) for k in "abc"} | {"v": normal(steps, 5)}
    _, states = updates_of(bracket(rule, refresh_every=every), g)
    lazy = states.inner_state[0]
    # Similarities at the first two refreshes after step 0 fill the window: from the
    # second on, the interval doubles at each.
    still = [every * k for k in (0, 1, 2, 4, 8, 16, 32)]
    assert when(asked, "a") == when(asked, "c") == still
    assert when(asked, "b") == list(range(0, steps, every))
    for name in g:
        counts = np.diff(lazy.cycle[name], prepend=0)
        assert np.flatnonzero(counts).tolist() == when(asked, name)
    for name, last in (("a", 32), ("b", 1)):
        interval = np.asarray(lazy.interval[name])
        assert interval[-1] == last
        assert (np.diff(interval) >= 0).all()
        assert interval.min() == 1


def model(
    overlaps: Any, window: int, threshold: float
) -> tuple[list[int], int]:  # Q-GaLore, section 3.2, as lazy_refresh writes it
    """When a leaf is asked, and its last interval; it gets row k at refresh k done."""
    interval, wait, seen, asked = 1, 0, [], []
    for t in range(len(overlaps)):
        if wait:
            wait -= 1
            continue
        asked.append(t)
        if t:
            seen.append(overlaps[len(asked) - 2][len(asked) - 1])
            if len(seen) >= window and np.mean(seen[-window:]) >= threshold:
                interval *= 2
        wait = interval - 1
    return asked, interval


@settings(derandomize=True, deadline=None, max_examples=30)
@given(
    rows=st.lists(
        st.sampled_from([[0, 1, 2], [1, 2, 3], [2, 3, 4], [5, 6, 7]]),
        min_size=24,
        max_size=24,
    ),
    # Between the means of three overlaps in thirds, so that rounding does not decide.
    ninths=st.integers(0, 9),
)
def test_lazy_refreshes_are_those_of_its_model(rows: Any, ninths: int) -> None:
    threshold = (ninths - 0.5) / 9
    overlaps = [[len(set(a) & set(b)) / R for b in rows] for a in rows]
    asked, interval = model(overlaps, 3, threshold)
    bases, counts, intervals = _lazily(chosen(rows), threshold)
    assert np.flatnonzero(np.diff(counts, prepend=0)).tolist() == asked
    assert intervals[-1] == interval
    for t in range(len(rows)):
        done = sum(k <= t for k in asked)
        assert same_bits(bases[t], chosen(rows[done - 1]))


@jax.jit
def _lazily(given_bases: Any, threshold: Any) -> Any:
    rule = lro.bases.lazy_refresh(
        lro.bases.replay({"": given_bases}), threshold=threshold, window=3
    )

    def step(state: Any, t: Any) -> Any:
        clock = Clock(step=t, refresh=t >= 0, cycle=t)
        frame, state = rule.update(
            frame_of(jnp.zeros((M, N)), path=""), state, clock=clock
        )
        return state, (frame.basis, state.cycle, state.interval)

    start = rule.init(frame_of(jnp.zeros((M, N)), path=""))
    return jax.lax.scan(step, start, jnp.arange(len(given_bases)))[1]


@pytest.mark.parametrize(("layers", "grows"), [(2, True), (3, False)])
def test_a_stack_has_one_interval_by_the_mean_over_its_layers(
    layers: int, grows: bool
) -> None:
    # One layer stands still: a mean similarity of 1/2 or 1/3 against 0.4.
    steps = 12
    rows = [[STILL] + [[STILL, ACROSS][t % 2]] * (layers - 1) for t in range(steps)]
    # Odd factors, so that a longer interval does not meet the same basis again.
    asked: list[tuple[str, int]] = []
    replayed = counted(lro.bases.replay({"w": chosen(rows)}), asked)
    rule = lro.bases.lazy_refresh(replayed, window=1, factor=3)
    g = {"w": normal(steps, layers, M, N)}
    _, states = updates_of(bracket(rule), g)
    lazy = states.inner_state[0]
    assert lazy.interval["w"].shape == (steps,)
    assert when(asked, "w") == ([0, 1, 4] if grows else list(range(steps)))


@pytest.mark.parametrize(("name", "bad"), [("window", 0), ("factor", 0.5)])
def test_a_window_and_a_factor_are_positive_ints(name: str, bad: Any) -> None:
    arguments: dict[str, Any] = {name: bad}
    with pytest.raises(ValueError, match=f"{name} must be an int of at least 1"):
        lro.bases.lazy_refresh(lro.dominant_svd(), **arguments)


@pytest.mark.parametrize("wrapper", ["lazy_refresh", "frozen"])
def test_a_basis_without_refreshes_has_none_to_put_off(wrapper: str) -> None:
    wrap = getattr(lro.bases, wrapper)
    for rule in (lro.bases.online_pca(), lro.bases.lazy_refresh(lro.dominant_svd())):
        with pytest.raises(
            ValueError,
            match=rf"^{wrapper}\(\) goes around a basis .* online_pca\(\) moves",
        ):
            wrap(rule)


@pytest.mark.parametrize(
    "rule", [lro.bases.gaussian(0), lro.bases.frozen(lro.dominant_svd())]
)
def test_there_is_nothing_to_compare_a_basis_with(rule: Any) -> None:
    with pytest.raises(
        ValueError, match=r"^lazy_refresh\(\) compares a basis with the"
    ):
        lro.bases.lazy_refresh(rule)
