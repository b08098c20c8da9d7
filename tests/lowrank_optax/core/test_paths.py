"""A parameter's path is the same whatever container holds it."""

import dataclasses
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import lowrank_optax as lro
from lowrank_optax.core.paths import boxed, map_with_paths, unboxed, with_paths
from tests.helpers.stages import normal

KEY, VALUE = normal(8, 16), normal(8, 16, seed=1)


class Named(NamedTuple):
    key: Any
    value: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Registered:
    key: Any
    value: Any


@flax.struct.dataclass
class Struct:
    key: Any
    value: Any


class Node(flax.struct.PyTreeNode):
    key: Any
    value: Any


class Module(eqx.Module):
    key: Any
    value: Any


class Nnx(nnx.Module):
    def __init__(self, key, value):
        self.key, self.value = nnx.Param(key), nnx.Param(value)


def nnx_state(key, value):
    return nnx.state(Nnx(key, value))


def partitioned(key, value):
    return {
        "key": nn.Partitioned(key, ("rows", None)),
        "value": nn.Partitioned(value, (None, None)),
    }


CONTAINERS = {
    "dict": lambda key, value: {"key": key, "value": value},
    "Variables": lambda key, value: {"key": nnx.Param(key), "value": nnx.Param(value)},
    "nn.Partitioned": partitioned,
    "nnx": nnx_state,
    **{c.__name__: c for c in (Named, Registered, Struct, Node, Module)},
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_paths_and_ranks(name):
    tree = {"attn": CONTAINERS[name](KEY, VALUE)}
    assert {path for path, _ in with_paths(tree)} == {"attn/key", "attn/value"}
    tx = lro.galore(0.1, rank=[("value$", 2), ("", 4)], dimension_numbers=None)
    rows = lro.memory_report(tx, tree).rows
    assert {row.path: row.rank for row in rows[:2]} == {"attn/key": 4, "attn/value": 2}


@pytest.mark.parametrize("name", CONTAINERS)
def test_the_same_bits_in_every_container(name):
    """The random keys too come from paths."""
    tx = lro.grass_jump(0.1, rank=4, key=0, dimension_numbers=None)

    def steps(make):
        params = {"attn": make(KEY, VALUE)}
        state = tx.init(params)
        grads = jax.tree.map(lambda x: 0.1 * x, params)
        updates, state = tx.update(grads, state, params)
        assert jax.tree.structure(updates) == jax.tree.structure(grads)
        return jax.tree.leaves(updates)

    for a, b in zip(steps(CONTAINERS[name]), steps(CONTAINERS["dict"]), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", ["Variables", "nn.Partitioned", "nnx"])
def test_boxes_come_back(name):
    tree = CONTAINERS[name](KEY, VALUE)
    doubled = map_with_paths(lambda path, x, y: x + y, tree, unboxed(tree))
    again = boxed(jax.tree.map(lambda x: 2 * x, unboxed(tree)), tree)
    for new in (doubled, again):
        assert jax.tree.structure(new) == jax.tree.structure(tree)
        np.testing.assert_array_equal(jax.tree.leaves(new)[0], 2 * KEY)


@pytest.mark.parametrize("name", ["Variables", "nn.Partitioned", "nnx"])
def test_updates_in_few_bits_round_the_same_in_boxes(name):
    def added(make):
        params = make(KEY.astype(jnp.bfloat16), VALUE.astype(jnp.bfloat16))
        updates = make(0.001 * KEY, 0.001 * VALUE)
        return jax.tree.leaves(lro.weights.add_updates(params, updates, 7))

    for a, b in zip(added(CONTAINERS[name]), added(CONTAINERS["dict"]), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "make", [lro.galore, lambda *a, **k: lro.grass_jump(*a, key=0, **k), lro.ldadam]
)
def test_python_numbers_among_the_parameters(make):
    tx = make(0.1, rank=4, dimension_numbers=None)
    params: Any = {"w": KEY, "logit_scale": 2.6}
    state = tx.init(params)
    shapes = jax.eval_shape(lambda s: s, state)
    grads = {"w": KEY, "logit_scale": jnp.float32(1.0)}
    updates, state = jax.jit(tx.update)(grads, state, params)
    params = optax.apply_updates(params, updates)
    assert float(params["logit_scale"]) == pytest.approx(2.5)
    assert jax.eval_shape(lambda s: s, state) == shapes
    tx.update({"w": KEY, "logit_scale": 1.0}, state, params)


class Net(eqx.Module):
    kernel: Any

    def __call__(self, x):
        return x @ self.kernel


def test_a_callable_tree_of_dimension_numbers():
    params = Net(normal(8, 12))
    for numbers in (Net(lro.STACKED), lambda params: Net(lro.STACKED)):
        tx = lro.galore(0.1, rank=2, dimension_numbers=numbers)
        assert optax.tree.get(tx.init(params), "mu").kernel.shape == (2, 12)


def test_flattened_parameters_are_a_warning():
    tx = lro.galore(0.1, rank=4)
    with pytest.warns(UserWarning, match=r"projects nothing.*optax\.flatten"):
        optax.flatten(tx).init({"mlp": {"kernel": KEY}})
