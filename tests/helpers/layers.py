"""A small model of stacked layers, and its steps in the backward pass and after it."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lowrank_optax as lro
from tests.helpers.battery import (
    ALL,
    build,
    raw_keys,
)

LAYERS, WIDTH, HIDDEN, WORDS, BATCH = 4, 8, 16, 7, 24
STEPS, EVERY, RATE = 20, 5, 0.01


# In float64, and relative to the learning rate, which is about the size of an update.
# Two programs add the few dozen products of a gradient's entry in another order, so
# their gradients differ by some 1e-15 of their size. What an optimizer makes of that it
# multiplies by the inverse of what it divides by: gaps of singular values, of 1e-2 here
# and larger, and Adam's root of V, of 1e-3 of the gradient's size and larger; and the
# model hands a difference on over 20 steps. 1e-15 * 1e2 * 1e3 * 20 = 2e-9. Another
# layer's gradient, a stale weight or another key makes differences of size one.
TOLERANCE = 2e-9


# Every named optimizer, once.
NAMES = [*{make: name for name, (make, _) in reversed(ALL.items())}.values()]


# One of each kind of state: moments that turn and a key, a state for each leaf, an
# error that is fed back, lazy refreshes in few bits, bases from a key.
KINDS = ["grass_walk", "galore_adafactor", "ldadam", "q_galore_sara_8bit", "apollo"]
OTHERS: dict[str, Any] = {
    "adamw": lambda: optax.adamw(RATE, weight_decay=0.1),
    "muon": lambda: optax.contrib.muon(RATE),
    "sgd": lambda: optax.sgd(0.1 * RATE, momentum=0.9),
}


@functools.cache
def optimizer(name: str) -> optax.GradientTransformationExtraArgs:
    if name in OTHERS:
        return optax.with_extra_args_support(OTHERS[name]())
    return build(name, learning_rate=RATE, dimension_numbers=None)


def block(w: Any, x: Any, xp: Any = jnp) -> Any:
    return x + xp.tanh((x * w["norm"]) @ w["up"]) @ w["down"]


def layers_of(count: int = LAYERS, width: int = WIDTH, hidden: int = HIDDEN) -> Any:
    random = np.random.default_rng(0)
    return {
        "norm": 1 + 0.1 * random.normal(size=(count, width)),
        "up": random.normal(size=(count, width, hidden)) / np.sqrt(width),
        "down": random.normal(size=(count, hidden, width)) / np.sqrt(hidden * count),
    }


def rest_of(width: int = WIDTH) -> Any:
    random = np.random.default_rng(1)
    return {
        "embedding": random.normal(size=(WORDS, width)),
        "head": random.normal(size=(width, WORDS)) / np.sqrt(width),
    }


class Data(NamedTuple):
    tokens: Any
    targets: Any


def data(step: int) -> Data:
    random = np.random.default_rng(100 + step)
    return Data(random.integers(0, WORDS, BATCH), random.normal(size=(BATCH, WORDS)))


def arrays(tree: Any) -> Any:
    """In float64 where that is allowed, else in float32."""
    return jax.tree.map(jnp.array, tree)


def head_loss(rest: Any, x: Any, batch: Data) -> Any:
    return jnp.mean(jnp.square(x @ rest["head"] - batch.targets))


def through(body: Any, rest: Any, batch: Data, over: Any) -> Any:
    x, _ = jax.lax.scan(body, rest["embedding"][batch.tokens], over)
    return head_loss(rest, x, batch)


def stepped(rest: Any, gradient: Any) -> Any:
    return jax.tree.map(lambda w, g: w - RATE * g, rest, gradient)


def in_backward(
    tx: Any, *, remat: Any = lambda f: f, order: Any = range(LAYERS), **options: Any
) -> Any:
    """A step of (params, state, rest, batch, *operands) to the first three."""

    def step(params: Any, state: Any, rest: Any, batch: Data, *operands: Any) -> Any:
        layers = lro.training.Layers.open(params, state, *operands)
        layer = lro.training.update_in_backward(block, tx, **options)

        def loss(rest: Any) -> Any:
            body = remat(lambda x, i: (layer(i, layers, x), None))
            return through(body, rest, batch, jnp.asarray(order))

        gradient = jax.grad(loss)(rest)
        done = layers.close()
        return done.params, done.state, stepped(rest, gradient)

    return step


def gradients(
    params: Any, rest: Any, batch: Data, order: Any = None, remat: Any = lambda f: f
) -> Any:
    def loss(params: Any, rest: Any) -> Any:
        if order is not None:
            params = jax.tree.map(lambda w: w[jnp.asarray(order)], params)
        return through(remat(lambda x, w: (block(w, x), None)), rest, batch, params)

    return jax.grad(loss, (0, 1))(params, rest)


def gradients_first(
    tx: Any, *, remat: Any = lambda f: f, order: Any = None, **options: Any
) -> Any:
    """The same step with all gradients at hand, by `update_layers`."""
    load = options.get("load", lambda w: w)

    def step(params: Any, state: Any, rest: Any, batch: Data, *operands: Any) -> Any:
        g, of_rest = gradients(load(params), rest, batch, order, remat)
        new, state = lro.training.update_layers(
            tx, g, state, params, operands=operands, **options
        )
        return new, state, stepped(rest, of_rest)

    return step


def by_per_layer(tx: Any, **options: Any) -> Any:
    """The same by `per_layer(tx).update` and `optax.apply_updates`."""

    def step(params: Any, state: Any, rest: Any, batch: Data) -> Any:
        g, of_rest = gradients(params, rest, batch)
        updates, state = lro.training.per_layer(tx).update(g, state, params, **options)
        return optax.apply_updates(params, updates), state, stepped(rest, of_rest)

    return step


def run(make: Any, tx: Any, steps: int = STEPS, every: int = EVERY) -> Any:
    """(params, state, rest) after some steps; `make` is one of the three above.

    Compiled once for steps with refreshes and once for those without.
    """
    done = start(tx)
    for t in range(steps):
        done = program(make, tx, t % every == 0)(*done, data(t))
    return done


@functools.cache
def program(make: Any, tx: Any, refresh: bool) -> Any:
    return jax.jit(make(tx, refresh=refresh))


@functools.cache
def init_of(tx: Any) -> Any:
    return jax.jit(lro.training.per_layer(tx).init)


def start(tx: Any, load: Any = lambda w: w, params: Any = None) -> Any:
    params = arrays(layers_of()) if params is None else params
    return params, init_of(tx)(load(params)), arrays(rest_of())


def close(ours: Any, theirs: Any, atol: float, rtol: float = 0.0) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
        assert a.dtype == b.dtype
        a, b = (np.asarray(raw_keys(x)) for x in (a, b))
        if a.dtype.kind != "f":
            np.testing.assert_array_equal(a, b)
        else:
            np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)
