"""A sharded model's shapes, its steps compiled on a mesh, and what these move.

Weights are sharded by "fsdp" and "tensor" along the side that the projection leaves, as
a transformer's are: outputs of q and up, inputs of o and down.
"""

import functools
import inspect
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lowrank_optax as lro
from train.config.methods import METHODS

L, D, F, R, T = 3, 64, 176, 16, 2
BOTH = ("tensor", "fsdp")
SHAPES = {
    "layers": {
        "attn": {"o": (L, D, D), "q": (L, D, D)},
        "mlp": {"down": (L, F, D), "up": (L, D, F)},
        "norm": (L, D),
    },
    "embed": (320, D),
}
CUT = {
    "layers": {
        "attn": {"o": P(None, BOTH), "q": P(None, None, BOTH)},
        "mlp": {"down": P(None, BOTH), "up": P(None, None, BOTH)},
        "norm": P(),
    },
    "embed": P(BOTH),
}
MESHES = {"fsdp": (8, 1), "tensor": (1, 8), "both": (4, 2)}
RULES = (("mlp|attn", lro.STACKED), ("", None))
SQUARE = (("attn/o$", "output"), ("", "input"))


def is_shape(x):
    return isinstance(x, tuple) and not isinstance(x, P)


def params():
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), SHAPES, is_leaf=is_shape
    )


@functools.cache
def gradient(t):
    rng = np.random.default_rng(t)
    return jax.tree.map(
        lambda shape: rng.standard_normal(shape, np.float32), SHAPES, is_leaf=is_shape
    )


def mesh_of(name, kind=AxisType.Auto):
    return jax.make_mesh(MESHES[name], ("fsdp", "tensor"), axis_types=(kind,) * 2)


def on(mesh):
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), CUT)


def named(name):
    # 8-bit blocks whole on each of eight devices.
    options = {"min_size": 16, "switch_step": T, "square": SQUARE}
    options |= {"rank": R, "refresh_every": T, "dimension_numbers": RULES, "key": 0}
    make = METHODS[name].make
    accepted = inspect.signature(make).parameters
    tx = make(1e-3, **{k: v for k, v in options.items() if k in accepted})
    return optax.with_extra_args_support(tx)


def typed(shapes, shardings):
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        shapes,
        shardings,
    )


MOVES = re.compile(
    r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)"
    r"(?:-start)?\("
)


def moved(compiled):
    """Of each collective in a program its kind and the numbers of its result."""
    found = []
    for line in compiled.as_text().splitlines():
        if match := MOVES.search(line):
            shapes = re.findall(r"\w+\[([\d,]*)\]", match[1])
            sizes = [math.prod(map(int, s.split(","))) if s else 1 for s in shapes]
            found.append((match[2], max(sizes)))
    return found


def compiled_step(tx, mesh, **how):
    weights = typed(params(), on(mesh))
    cut = lro.state_shardings(tx, params(), on(mesh))
    state = typed(jax.eval_shape(tx.init, params()), cut)

    def step(gradient, state, weights):
        updates, state = tx.update(gradient, state, weights, **how)
        return optax.apply_updates(weights, updates), state

    with jax.set_mesh(mesh):
        step = jax.jit(step, out_shardings=(on(mesh), cut), donate_argnums=(1, 2))
        return step.lower(weights, state, weights).compile()


# The largest that an ordinary step may move: the bases of one kernel's layers. AdamW's
# own step moves nothing here.
BASES, MATRIX = L * D * R, D * D
