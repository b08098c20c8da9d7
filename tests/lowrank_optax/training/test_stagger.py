"""Staggered refreshes of layers: stacked, one by one, in a backward pass, on a mesh."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lowrank_optax as lro
from tests.helpers.marks import NIGHTLY

L, T, STEPS = 4, 3, 7
SHAPES = {"up": (L, 16, 24), "down": (L, 24, 16), "norm": (L, 16)}
RULES = ((r"^(up|down)$", lro.STACKED), (r"^norm$", None))
PARAMS = {name: jnp.ones(shape) for name, shape in SHAPES.items()}
METHODS: dict[str, Callable[..., Any]] = {
    "galore": functools.partial(lro.galore, rank=4),
    # Random keys, moments that rotate, and a limiter.
    "grass_walk": functools.partial(lro.grass_walk, rank=4, key=0),
}


@functools.cache
def gradient(t: int) -> Any:
    rng = np.random.default_rng(t)
    return {k: rng.standard_normal(shape, np.float32) for k, shape in SHAPES.items()}


@functools.cache
def made(name: str) -> Any:
    options: dict[str, Any] = {"refresh_every": T, "dimension_numbers": RULES}
    if name == "adaptive":  # each matrix has its turn when its basis is stale
        rule = lro.bases.adaptive_refresh(lro.dominant_svd(), threshold=0.5)
        return lro.galore(0.01, rank=4, basis=rule, **options)
    return METHODS[name](0.01, stagger=True, **options)


def stacked(tx: Any, refresh: bool | None) -> Any:
    def step(params: Any, state: Any, g: Any) -> Any:
        updates, state = tx.update(g, state, params, refresh=refresh)
        return optax.apply_updates(params, updates), state

    return tx.init, step


def by_layer(tx: Any, refresh: bool | None) -> Any:
    return stacked(lro.training.per_layer(tx), refresh)


def in_blocks(block: int) -> Any:
    def make(tx: Any, refresh: bool | None) -> Any:
        def step(params: Any, state: Any, g: Any) -> Any:
            return lro.training.update_layers(
                tx, g, state, params, block=block, refresh=refresh
            )

        return lro.training.per_layer(tx).init, step

    return make


def in_backward(tx: Any, refresh: bool | None) -> Any:
    """Each layer's loss is <G_i, W_i>, so that its gradient is G_i to the bit."""
    layer = lro.training.update_in_backward(
        lambda w, x, g: x + sum(jnp.vdot(w[k], g[k]) for k in SHAPES),
        tx,
        refresh=refresh,
    )

    def step(params: Any, state: Any, g: Any) -> Any:
        layers = lro.training.Layers.open(params, state)

        def loss(x: Any) -> Any:
            return jax.lax.scan(
                lambda x, row: (layer(row[0], layers, x, row[1]), None),
                x,
                (jnp.arange(L), g),
            )[0]

        jax.grad(loss)(0.0)
        done = layers.close()
        return done.params, done.state

    return lro.training.per_layer(tx).init, step


def run(make: Any, tx: Any, place: Callable[[Any], Any] = lambda x: x) -> Any:
    """The weights, and the bases after each step."""
    init, first = make(tx, True)
    # The device decides by the step where the bases do not take turns at each.
    _, later = make(tx, None if tx is made("adaptive") else False)
    first, later = jax.jit(first), jax.jit(later)
    params = place(PARAMS)
    state, seen = jax.jit(init)(params), []
    for t in range(STEPS):
        params, state = (later if t else first)(params, state, place(gradient(t)))
        seen.append(jax.tree.map(np.asarray, optax.tree.get(state, "basis")))
    assert later._cache_size() == 1
    return jax.tree.map(np.asarray, params), seen


@functools.cache
def reference(name: str) -> Any:
    return run(stacked, made(name))


def same(ours: Any, theirs: Any) -> None:
    """Bases to the bit; weights to the rounding of products in another order."""
    for t, (a, b) in enumerate(zip(ours[1], theirs[1], strict=True)):
        for name in ("up", "down"):
            np.testing.assert_array_equal(a[name], b[name], err_msg=f"{name} {t}")
    for name in SHAPES:
        np.testing.assert_allclose(ours[0][name], theirs[0][name], rtol=0, atol=1e-6)


WAYS = {
    "per_layer": by_layer,
    "one at a time": in_blocks(1),
    "two together": in_blocks(2),
    "in_backward": in_backward,
}


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("grass_walk", "in_backward"),
        ("adaptive", "two together"),
        *(pytest.param("adaptive", way, marks=NIGHTLY) for way in WAYS),
        pytest.param("grass_walk", "two together", marks=NIGHTLY),
        # The test of hyperparameters goes this way too.
        pytest.param("grass_walk", "per_layer", marks=NIGHTLY),
        pytest.param("grass_walk", "one at a time", marks=NIGHTLY),
        *(pytest.param("galore", way, marks=NIGHTLY) for way in WAYS),
    ],
)
def test_layers_take_the_same_turns_in_any_way(name, way):
    same(run(WAYS[way], made(name)), reference(name))


@pytest.mark.parametrize(
    ("way", "kind"),
    [
        (stacked, AxisType.Auto),
        pytest.param(by_layer, AxisType.Auto, marks=NIGHTLY),
        pytest.param(stacked, AxisType.Explicit, marks=NIGHTLY),
        pytest.param(by_layer, AxisType.Explicit, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(
    "name", ["grass_walk", pytest.param("adaptive", marks=NIGHTLY)]
)
def test_on_a_mesh(way, kind, name):
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(kind,) * 2)
    both = ("fsdp", "tensor")
    specs = {"up": P(None, None, both), "down": P(None, both), "norm": P()}

    def place(tree: Any) -> Any:
        return {
            k: jax.device_put(x, NamedSharding(mesh, specs[k])) for k, x in tree.items()
        }

    with jax.set_mesh(mesh):
        ours = run(way, made(name), place)
    same(ours, reference(name))


def test_hyperparameters_of_each_layer():
    """Traced ones, which the rule closes over, under the vmap of `per_layer`."""

    tx = optax.inject_hyperparams(
        lro.grass_walk, static_args=lro.static_args(lro.grass_walk)
    )(
        learning_rate=0.01,
        angle=0.3,
        rank=4,
        key=0,
        refresh_every=T,
        stagger=True,
        dimension_numbers=RULES,
    )
    same(run(by_layer, tx), reference("grass_walk"))
