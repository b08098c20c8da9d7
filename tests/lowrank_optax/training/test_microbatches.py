"""Gradients of micro-batches, summed in the subspace while the backward pass runs."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from tests.helpers.battery import ALL, WHOLE, build
from tests.helpers.marks import slow_but

COUNT, WIDTH, HIDDEN, ROWS, PARTS = 4, 16, 24, 8, 3
RATE, EVERY = 0.01, 4
REFUSED = [
    *("fira", "grass_jump", "grass_walk", "subtrack", "ldadam", "apollo"),
    *("apollo_mini", "frugal", "flora", "online_subspace_descent", "alice", "sumo"),
    *("spectral_adam", "cosmos", "foam", "gwt"),
]
WITHOUT = sorted(WHOLE)
# A method that is not named above sums S^T G, a new one too.
SUMMED = [
    name
    for name, (make, _) in ALL.items()
    if name == make.__name__ and name not in (*REFUSED, *WITHOUT)
]


@pytest.fixture
def x64() -> Any:
    with jax.enable_x64(True):
        yield


def optimizer(name: str) -> optax.GradientTransformationExtraArgs:
    return build(name, learning_rate=RATE, dimension_numbers=None)


def block(w: Any, x: Any) -> Any:
    return x + jnp.tanh((x * w["norm"]) @ w["up"]) @ w["down"]


def layers_of() -> Any:
    random = np.random.default_rng(0)
    weights = {
        "norm": 1 + 0.1 * random.normal(size=(COUNT, WIDTH)),
        "up": random.normal(size=(COUNT, WIDTH, HIDDEN)) / np.sqrt(WIDTH),
        "down": random.normal(size=(COUNT, HIDDEN, WIDTH)) / np.sqrt(HIDDEN * COUNT),
    }
    return jax.tree.map(jnp.array, weights)


def parts_of(step: int) -> Any:
    """Micro-batches and their weights.

    At a refresh, where the first chooses the bases, the others weigh nothing.
    """
    random = np.random.default_rng(100 + step)
    parts = random.normal(size=(PARTS, ROWS, WIDTH))
    weights = np.full(PARTS, 1 / PARTS)
    if step % EVERY == 0:
        weights = np.eye(PARTS)[0]
    return jnp.array(parts), jnp.array(weights)


def mean_loss(y: Any, weight: Any) -> Any:
    return weight * jnp.mean(jnp.square(y - 1.0))


def summed(
    tx: Any, refresh: bool, params: Any, state: Any, parts: Any
) -> tuple[Any, Any, Any]:
    layers = lro.training.LayerSums.open(tx, params, state, refresh=refresh)

    def add(carry: Any, part: Any, *, first: bool) -> Any:
        x, weight = part
        layer = lro.training.sum_in_backward(block, tx, refresh=refresh, first=first)

        def loss(x: Any) -> Any:
            over = jnp.arange(COUNT)
            y, _ = jax.lax.scan(lambda x, i: (layer(i, layers, x), None), x, over)
            return mean_loss(y, weight)

        return carry + jnp.sum(jax.grad(loss)(x)), None

    start, total = int(refresh), jnp.zeros([], parts[0].dtype)
    if refresh:
        total, _ = add(total, jax.tree.map(lambda x: x[0], parts), first=True)
    others = jax.tree.map(lambda x: x[start:], parts)
    jax.lax.scan(functools.partial(add, first=False), total, others)
    params, state, sums = layers.close()
    params, state = lro.training.update_layers(
        tx,
        sums,
        state,
        params,
        refresh=refresh,
    )
    return params, state, sums


@functools.cache
def stepped(name: str) -> Any:
    """`summed`, compiled for steps with a refresh and for those without."""
    return jax.jit(functools.partial(summed, optimizer(name)), static_argnums=0)


def gradient_of(params: Any, x: Any, weight: Any = 1 / PARTS) -> Any:
    def loss(params: Any) -> Any:
        y, _ = jax.lax.scan(lambda x, w: (block(w, x), None), x, params)
        return mean_loss(y, weight)

    return jax.grad(loss)(params)


def whole(tx: Any, refresh: bool, params: Any, state: Any, parts: Any) -> Any:
    each = [gradient_of(params, *part) for part in zip(*parts, strict=True)]
    gradient = jax.tree.map(lambda *g: sum(g), *each)
    return lro.training.update_layers(tx, gradient, state, params, refresh=refresh)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", slow_but(["galore"], SUMMED))
def test_the_step_is_that_of_the_whole_batch(name: str) -> None:
    tx, params = optimizer(name), layers_of()
    ours = theirs = params, jax.jit(lro.training.per_layer(tx).init)(params)
    of_all = {d: jax.jit(functools.partial(whole, tx, d)) for d in (True, False)}
    for step in range(6):
        due, parts = step % EVERY == 0, parts_of(step)
        ours = stepped(name)(due, *ours, parts)[:2]
        theirs = of_all[due](*theirs, parts)
    # Sums in another order: rounding, and what Adam's division makes of it.
    for a, b in zip(*map(jax.tree.leaves, (ours[0], theirs[0])), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-8 * RATE)
    assert jax.tree.map(jnp.shape, ours[1]) == jax.tree.map(jnp.shape, theirs[1])
    moved = jax.tree.map(lambda a, b: jnp.max(jnp.abs(a - b)), ours[0], params)
    assert min(jax.tree.leaves(moved)) > 0.01 * RATE


@pytest.mark.usefixtures("x64")
def test_the_first_micro_batch_chooses_and_all_are_projected() -> None:
    tx, params = optimizer("galore"), layers_of()
    state = lro.training.per_layer(tx).init(params)
    parts = parts_of(1)  # each its own
    *_, sums = stepped("galore")(True, params, state, parts)
    each = list(map(jax.jit(functools.partial(gradient_of, params)), parts[0]))
    assert sorted(sums.bases) == ["down", "up"]
    for name, basis in sums.bases.items():
        for layer in range(COUNT):
            turned = (lambda g: g.T) if name == "down" else (lambda g: g)
            first, *_ = matrices = [turned(np.asarray(g[name][layer])) for g in each]
            s = np.asarray(basis[layer])
            u = np.linalg.svd(first)[0][:, : s.shape[1]]
            np.testing.assert_allclose(s @ s.T, u @ u.T, atol=1e-9)
            low = sum(s.T @ g for g in matrices)
            np.testing.assert_allclose(sums.low[name][layer], low, atol=1e-12)
    total = sum(g["norm"] for g in each)
    np.testing.assert_allclose(sums.low["norm"], total, atol=1e-12)


@pytest.mark.parametrize("name", REFUSED)
def test_a_step_that_needs_the_gradient_is_refused(name: str) -> None:
    tx, params = optimizer(name), {"up": jnp.ones((WIDTH, HIDDEN))}

    def step(params: Any) -> Any:
        state = tx.init(params)
        low = lro.training.project_gradient(tx, params, state, params)
        return lro.training.update_projected(tx, low, state, params)

    with pytest.raises(ValueError, match="up: this stage needs the full gradient"):
        jax.eval_shape(step, params)


@pytest.mark.parametrize("name", WITHOUT)
def test_without_a_subspace_nothing_is_projected(name: str) -> None:
    tx, params = optimizer(name), {"up": jnp.ones((WIDTH, HIDDEN))}
    with pytest.raises(ValueError, match="this transformation has 0; sum full"):
        jax.eval_shape(
            lambda p: lro.training.project_gradient(tx, p, tx.init(p), p), params
        )


def test_every_named_optimizer_is_one_of_these() -> None:
    made = {make for make, _ in ALL.values()}
    names = (*SUMMED, *REFUSED, *WITHOUT)
    assert {ALL[name][0] for name in names if name in ALL} == made


def test_what_cannot_be_projected_is_an_error() -> None:
    params = {"up": jnp.ones((WIDTH, HIDDEN))}
    adamw = optax.adamw(RATE)
    with pytest.raises(ValueError, match="this transformation has 0"):
        lro.training.project_gradient(adamw, params, adamw.init(params), params)
    tx = optimizer("galore")
    state, whole = tx.init(params), lro.training.Projected(params, {})
    with pytest.raises(
        ValueError, match=r"up: the projected gradient has the shape \(16, 24"
    ):
        lro.training.update_projected(tx, whole, state, params)
    with pytest.raises(ValueError, match="pass params"):
        lro.training.update_projected(tx, whole, state, None)


def test_no_sum_of_whole_gradients() -> None:
    """What lives during a step: less than the layers' gradients, which are summed."""
    tx, params = optimizer("galore"), layers_of()
    params = jax.tree.map(lambda x: jnp.tile(x, (8, 4, 4)[: x.ndim]), params)
    count, size = 8 * COUNT, sum(x.nbytes for x in jax.tree.leaves(params))
    state = jax.eval_shape(lro.training.per_layer(tx).init, params)
    parts = jnp.zeros((PARTS, ROWS, 4 * WIDTH))

    def sums(params: Any, state: Any, parts: Any) -> Any:
        layers = lro.training.LayerSums.open(tx, params, state)
        layer = lro.training.sum_in_backward(block, tx)

        def add(total: Any, x: Any) -> Any:
            def loss(x: Any) -> Any:
                over = jnp.arange(count)
                y, _ = jax.lax.scan(lambda x, i: (layer(i, layers, x), None), x, over)
                return mean_loss(y, 1.0)

            return total + jnp.sum(jax.grad(loss)(x)), None

        total, _ = jax.lax.scan(add, 0.0, parts)
        return total, layers.close()

    def gradients(params: Any, parts: Any) -> Any:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return jax.lax.scan(
            lambda total, x: (
                jax.tree.map(jnp.add, total, gradient_of(params, x)),
                None,
            ),
            zeros,
            parts,
        )

    def needs(f: Any, *args: Any) -> int:
        memory = jax.jit(f, donate_argnums=(0, 1)[: len(args) - 1]).lower(*args)
        memory = memory.compile().memory_analysis()
        new = memory.output_size_in_bytes - memory.alias_size_in_bytes
        return memory.temp_size_in_bytes + new

    assert needs(gradients, params, parts) > size
    assert needs(sums, params, state, parts) < 0.6 * size


@pytest.mark.parametrize("refresh", [False, True])
def test_a_bad_micro_batch_costs_one_step(refresh: bool) -> None:
    tx, params = optimizer("galore"), layers_of()
    state, run = lro.training.per_layer(tx).init(params), stepped("galore")
    parts, weights = parts_of(1)
    bad = parts.at[PARTS - 1, 0, 0].set(jnp.nan), weights
    before = run(True, params, state, (parts, weights))[:2]
    skipped = run(refresh, *before, bad)[:2]
    after = run(refresh, *skipped, (parts, weights))[:2]
    jax.tree.map(np.testing.assert_array_equal, skipped[0], before[0])
    assert np.all(optax.tree.get(after[1], "skipped") == 1)
    for old, new in zip(*map(jax.tree.leaves, (skipped[0], after[0])), strict=True):
        assert np.isfinite(new).all()
        assert (np.asarray(old) != new).any()
