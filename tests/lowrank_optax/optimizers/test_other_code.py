"""Every optimizer in other people's training code: loops in Flax NNX, Linen and
Equinox, their serialisers, and trees of any containers."""

import functools
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

from tests.helpers.battery import (
    ALL,
    build,
    close,
    paths,
)
from tests.helpers.marks import slow_but

WORDS, WIDTH, HIDDEN = 5, 4, 6
# Five steps: bases are refreshed at the first and the fourth.
TOKENS = jax.random.randint(jax.random.key(0), (5, 8), 0, WORDS)

# Every named optimizer. State is kept in the same way with another basis, and in the
# published packages' arithmetic.
NAMES = [name for name in ALL if not name.endswith(("_sara", "_published"))]
# A state for each leaf, quantised state, an error fed back, keys from paths, a reset.
KINDS = ["galore_adafactor", "q_galore_sara_8bit", "ldadam", "apollo", "frugal"]
FEW = ["q_galore_sara_8bit", "ldadam"]
each_kind = pytest.mark.parametrize("name", slow_but(FEW, KINDS))
each_optimizer = pytest.mark.parametrize("name", slow_but(["ldadam"], NAMES))


def optimizer(name: str, **changes: Any) -> optax.GradientTransformationExtraArgs:
    options = {"dimension_numbers": "auto", "weight_decay": 0.1}
    return build(name, **{**options, **changes})


def loss(model: Any, tokens: jax.Array) -> jax.Array:
    return jnp.mean((model(tokens) - 1.0) ** 2)


def nested(tree: Any) -> dict[str, Any]:
    """The same leaves at the same paths, in dicts of dicts."""
    out: dict[str, Any] = {}
    for path, x in paths(tree).items():
        *parents, last = path.split("/")
        functools.reduce(lambda d, key: d.setdefault(key, {}), parents, out)[last] = x
    return out


@functools.cache
def plain(name: str) -> tuple[Any, Any]:
    """The optimizer, and a step with it."""
    tx = optimizer(name)

    @jax.jit
    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return tx, step


def plain_loop(tx: Any, step: Any, params: Any, grads: list[Any]) -> dict[str, Any]:
    """The weights, by path, after a loop over dicts that takes these gradients."""
    params = nested(params)
    state = tx.init(params)
    for grad in grads:
        params, state = step(params, state, nested(grad))
    return paths(params)


def assert_same_bits(ours: Any, theirs: Any) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_no_optimizer_is_left_out() -> None:
    assert {ALL[name][0] for name in NAMES} == {make for make, _ in ALL.values()}


class NnxModel(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.embed = nnx.Embed(WORDS, WIDTH, rngs=rngs)
        self.norm = nnx.LayerNorm(WIDTH, use_bias=False, rngs=rngs)
        self.mlp = nnx.Dict(
            up=nnx.Linear(WIDTH, HIDDEN, use_bias=False, rngs=rngs),
            down=nnx.Linear(HIDDEN, WIDTH, use_bias=False, rngs=rngs),
        )

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embed(tokens)
        return x + self.mlp.down(nnx.relu(self.mlp.up(self.norm(x))))


def nnx_loop(tx: Any) -> tuple[Any, Any, list[Any]]:
    """The weights before, those after, and the gradients."""
    model = NnxModel()
    trainer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model: Any, trainer: Any, tokens: jax.Array) -> Any:
        grads = nnx.grad(loss)(model, tokens)
        trainer.update(model, grads)
        return nnx.as_pure(grads)

    before = nnx.as_pure(nnx.state(model, nnx.Param))
    # Compiled once: a state that came back in other containers would be refused.
    compiled = step.lower(model, trainer, TOKENS[0]).compile()
    grads = [compiled(model, trainer, tokens) for tokens in TOKENS]
    return before, nnx.as_pure(nnx.state(model, nnx.Param)), grads


@each_optimizer
def test_flax_nnx_optimizer(name: str) -> None:
    before, after, grads = nnx_loop(optimizer(name))
    # Two programs may round in another order: here and below `close` allows 1e-4 of
    # the learning rate, which is about the size of a step.
    close(paths(after), plain_loop(*plain(name), before, grads))


def test_rules_do_not_see_the_variables_of_nnx() -> None:
    """`nnx.Optimizer` passes them to init, and arrays to update."""
    rules = [("value", None), (r"^mlp/(up|down)/kernel$", "matrix"), ("", None)]
    tx = optimizer("grass_walk", dimension_numbers=rules, rank=[(r"kernel$", 2)])
    before, after, grads = nnx_loop(tx)
    close(paths(after), plain_loop(*plain("grass_walk"), before, grads))


@each_kind
def test_trees_of_nnx_variables(name: str) -> None:
    """What `nnx.split` and `nnx.grad` give, without `nnx.Optimizer`."""
    tx, step = plain(name)
    params = nnx.state(NnxModel(), nnx.Param)
    grads = [jax.tree.map(lambda x, k=k: jnp.sin(k * x), params) for k in range(3, 8)]
    expected = plain_loop(tx, step, *map(nnx.as_pure, (params, grads)))
    state = tx.init(params)
    for grad in grads:
        params, state = step(params, state, grad)
    close(paths(nnx.as_pure(params)), expected)


class EqxModel(eqx.Module):
    """Layers in a list, a tuple and dicts."""

    embed: list[eqx.nn.Embedding]
    norm: tuple[eqx.nn.LayerNorm, ...]
    transformer: dict[str, Any]

    def __init__(self) -> None:
        a, b = jax.random.split(jax.random.key(0))
        self.embed = [eqx.nn.Embedding(WORDS, WIDTH, key=a)]
        self.norm = (eqx.nn.LayerNorm(WIDTH, use_bias=False),)
        query = eqx.nn.Linear(WIDTH, HIDDEN, key=b)
        # A function is a leaf too, until it is filtered out and leaves a None.
        self.transformer = {"h0_attn": {"query": query, "activation": jax.nn.relu}}

    def __call__(self, tokens: jax.Array) -> jax.Array:
        attention = self.transformer["h0_attn"]
        x = jax.vmap(self.norm[0])(jax.vmap(self.embed[0])(tokens))
        return attention["activation"](jax.vmap(attention["query"])(x))


def arrays(model: Any) -> Any:
    return eqx.filter(model, eqx.is_inexact_array)


@functools.cache
def equinox_step(name: str) -> tuple[Any, Any]:
    tx = optimizer(name)

    @eqx.filter_jit
    def step(model: Any, state: Any, tokens: jax.Array) -> tuple[Any, Any, Any]:
        grads = eqx.filter_grad(loss)(model, tokens)
        updates, state = tx.update(grads, state, arrays(model))
        return eqx.apply_updates(model, updates), state, grads

    return tx, step


def equinox_loop(step: Any, model: Any, state: Any, batches: Any) -> Any:
    grads = []
    for tokens in batches:
        model, state, grad = step(model, state, tokens)
        grads.append(grad)
    return model, state, grads


@each_optimizer
def test_equinox(name: str) -> None:
    tx, step = equinox_step(name)
    before = EqxModel()
    state = tx.init(arrays(before))
    after, _, grads = equinox_loop(step, before, state, TOKENS)
    expected = plain_loop(*plain(name), arrays(before), grads)
    close(paths(arrays(after)), expected)


@each_kind
def test_equinox_serialises_the_state(name: str, tmp_path: Path) -> None:
    tx, step = equinox_step(name)
    first = EqxModel()
    model, state, _ = equinox_loop(step, first, tx.init(arrays(first)), TOKENS[:2])

    eqx.tree_serialise_leaves(tmp_path / "state.eqx", state)
    like = tx.init(arrays(model))
    restored = eqx.tree_deserialise_leaves(tmp_path / "state.eqx", like)

    assert_same_bits(restored, state)
    theirs, ours = (equinox_loop(step, model, s, TOKENS[2:]) for s in (state, restored))
    assert_same_bits(arrays(ours[0]), arrays(theirs[0]))
    assert_same_bits(ours[1], theirs[1])


class LinenMLP(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.Dense(HIDDEN, use_bias=False, name="up")(x))
        return nn.Dense(WIDTH, use_bias=False, name="down")(x)


class LinenModel(nn.Module):
    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = nn.Embed(WORDS, WIDTH, name="embed")(tokens)
        norm = nn.LayerNorm(use_bias=False, name="norm")
        return x + LinenMLP(name="mlp")(norm(x))


@functools.cache
def linen_model() -> tuple[nn.Module, Any]:
    model = LinenModel()
    return model, model.init(jax.random.key(0), TOKENS[0])["params"]


@functools.cache
def linen_step(name: str) -> tuple[TrainState, Any]:
    model, params = linen_model()
    state = TrainState.create(apply_fn=model.apply, params=params, tx=optimizer(name))
    state = state.replace(step=jnp.zeros([], jnp.int32))  # or two programs are compiled

    @jax.jit
    def step(state: Any, tokens: jax.Array) -> tuple[Any, Any]:
        def loss_of(params: Any) -> jax.Array:
            return loss(lambda x: state.apply_fn({"params": params}, x), tokens)

        grads = jax.grad(loss_of)(state.params)
        return state.apply_gradients(grads=grads), grads

    return state, step


@each_optimizer
def test_flax_train_state(name: str) -> None:
    first, step = linen_step(name)
    state, grads = first, []
    for tokens in TOKENS:
        state, grad = step(state, tokens)
        grads.append(grad)
    close(paths(state.params), plain_loop(*plain(name), first.params, grads))


@each_kind
def test_flax_serialises_the_train_state(name: str) -> None:
    first, step = linen_step(name)
    state = first
    for tokens in TOKENS[:2]:
        state, _ = step(state, tokens)

    saved = flax.serialization.to_bytes(state)
    restored = flax.serialization.from_bytes(first, saved)

    assert_same_bits(restored, state)
    for tokens in TOKENS[2:]:
        state, _ = step(state, tokens)
        restored, _ = step(restored, tokens)
    assert_same_bits(restored, state)


class Scale(NamedTuple):
    bias: jax.Array | None
    weight: jax.Array


def haiku_tree(random: np.random.Generator) -> Any:
    """Slashes and integers for keys, a list, a NamedTuple, and two Nones."""

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(random.normal(size=shape), jnp.float32)

    query = {"weight": normal(HIDDEN, WIDTH), "bias": normal(HIDDEN)}
    return {
        "transformer/h0_attn/query": query,
        "embed": {0: {"weight": normal(WORDS, WIDTH)}},
        "norm": [Scale(bias=None, weight=normal(WIDTH)), None],
    }


@each_kind
def test_trees_of_any_containers(name: str) -> None:
    tx, step = plain(name)
    random = np.random.default_rng(0)
    params, *grads = (haiku_tree(random) for _ in range(6))
    expected = plain_loop(tx, step, params, grads)
    state = tx.init(params)
    for grad in grads:
        params, state = step(params, state, grad)
    close(paths(params), expected)
