"""One basis rule at a time: its bases on given gradients, alone and in a bracket."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lowrank_optax as lro
from lowrank_optax.core.frame import Frame
from lowrank_optax.core.stage import Clock

M, N, R, B1 = 8, 12, 3, 0.9


def normal(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def frame_of(g: Any, rank: int = R, path: str = "w") -> Frame:
    return Frame(gradient=jnp.asarray(g), rank=rank, path=path, precision=None)


class Walk(NamedTuple):
    """What a rule said at each step, stacked."""

    basis: Any
    rotation: Any
    low: Any
    back: Any
    state: Any


def scanned(rule: Any, gradients: Any, refresh: Any, rank: int = R) -> Walk:
    """`rule` alone under lax.scan, next to a first moment that turns with its basis."""

    def step(carry: Any, x: Any) -> Any:
        (state, m), (t, due, cycle, g) = carry, x
        clock = Clock(step=t, refresh=due, cycle=cycle)
        frame = frame_of(g, rank).replace(momentum=m)
        out, state = rule.update(frame, state, clock=clock)
        turn = out.no_rotation() if out.rotation is None else out.rotation
        low = out.down(out.gradient)
        moment = B1 * turn @ m + (1 - B1) * low
        return (state, moment), Walk(out.basis, turn, low, out.up(low), state)

    first = frame_of(gradients[0], rank)
    start = (rule.init(first), jnp.zeros(first.low_shape, first.gradient.dtype))
    cycle = jnp.cumsum(refresh) - refresh
    times = jnp.arange(len(gradients))
    return jax.lax.scan(step, start, (times, refresh, cycle, gradients))[1]


def walk(rule: Any, gradients: Any, every: int = 1, rank: int = R) -> Walk:
    due = jnp.arange(len(gradients)) % every == 0
    run = jax.jit(lambda gs: scanned(rule, gs, due, rank))
    return run(jnp.asarray(gradients))


def bracket(rule: Any, step: Any = None, **changes: Any) -> Any:
    """The least chain around a rule: its update is S S^T G."""
    stages = optax.chain(
        rule,
        lro.project(),
        step or lro.in_subspace(optax.identity()),
        lro.project_back(),
    )
    given: dict[str, Any] = {
        "rank": R,
        "refresh_every": 1,
        "dimension_numbers": lro.STACKED,
    }
    return lro.low_rank(stages, **{**given, **changes})


def updates_of(tx: Any, gradients: Any) -> Any:
    """Updates and states of a tree of (K, ...) gradients."""

    def step(state: Any, g: Any) -> Any:
        updates, state = tx.update(g, state, g)  # any params: some ask for them
        return state, (updates, state)

    def run(gs: Any) -> Any:
        return jax.lax.scan(step, tx.init(jax.tree.map(lambda x: x[0], gs)), gs)[1]

    return jax.jit(run)(jax.tree.map(jnp.asarray, gradients))


def same_bits(a: Any, b: Any) -> bool:
    return bool(np.array_equal(np.asarray(a), np.asarray(b)))


def bases_of(state):
    return optax.tree.get(state, "basis")


def gaussian(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def run(tx, gradients):
    """The bases after each step of a (K, ...) stack of gradients."""

    def step(state, g):
        _, state = tx.update({"w": g}, state)
        return state, bases_of(state)["w"]

    return jax.jit(
        lambda gs: jax.lax.scan(step, tx.init({"w": gs[0]}), gs)[1],
    )(gradients)


def draw(tx, tree, steps=1):
    """The bases after each of so many steps on one gradient: (steps, ...) leaves."""

    def step(state, _):
        state = tx.update(tree, state)[1]
        return state, bases_of(state)

    return jax.jit(lambda: jax.lax.scan(step, tx.init(tree), length=steps)[1])()
