"""The optimizers and settings that tests go through, and what compares their steps."""

import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lowrank_optax as lro

RATE, EVERY = 0.01, 3
COMMON: dict[str, Any] = {
    "rank": 2,
    "refresh_every": EVERY,
    "dimension_numbers": [
        ("embedding", None),
        ("layers", lro.STACKED),
        ("", "matrix"),
    ],
}


def step(inner: optax.GradientTransformation) -> dict[str, Any]:
    return {"step": lro.in_subspace(inner)}


ADAM_8BIT = lro.quantize_moments(optax.scale_by_adam(), min_size=1)
SARA: dict[str, Any] = {"basis": lro.sara_sample(key=7)}
PUBLISHED: dict[str, Any] = {"variant": "published"}
ALL: dict[str, tuple[Any, dict[str, Any]]] = {
    "galore": (lro.galore, {}),
    "galore_sara": (lro.galore, SARA),
    "galore_published": (lro.galore, PUBLISHED),
    "galore_adafactor": (lro.recipes.galore_adafactor, {}),
    "galore_adam_mini": (lro.recipes.galore_adam_mini, {}),
    "galore_adam8bit": (lro.recipes.galore_adam8bit, {"min_size": 1}),
    # The moments of matrices as small as these stay as they are in q_galore itself.
    "q_galore": (lro.recipes.q_galore, {}),
    "q_galore_sara_8bit": (
        lro.galore,
        {
            "basis": lro.bases.lazy_refresh(
                lro.bases.quantize_basis(lro.sara_sample(key=7))
            ),
            **step(ADAM_8BIT),
        },
    ),
    "galore_2": (lro.recipes.galore_2, {"key": 1}),
    "golore": (lro.recipes.golore, {"key": 1, "switch_step": 4}),
    "msgd": (lro.recipes.msgd, {"key": 1}),
    "fira": (lro.fira, {}),
    "fira_sara": (lro.fira, SARA),
    "fira_published": (lro.fira, PUBLISHED),
    "fira_adafactor": (
        lro.fira,
        step(lro.steps.per_matrix(lro.steps.scale_by_adafactor())),
    ),
    "fira_adam_mini": (lro.fira, step(lro.steps.scale_by_adam_mini())),
    "fira_adam8bit": (lro.fira, step(ADAM_8BIT)),
    "grass_walk": (lro.grass_walk, {"key": 1}),
    "grass_walk_all": (lro.grass_walk, {"key": 1, "walk_rank": None}),
    "grass_walk_sara": (lro.grass_walk, SARA),
    "grass_jump": (lro.grass_jump, {"key": 2}),
    "grass_jump_sara": (lro.grass_jump, SARA),
    "subtrack": (lro.recipes.subtrack, {}),
    "spectral_adam": (lro.spectral_adam, {}),
    "ldadam": (lro.ldadam, {"refresh_every": 1}),
    "apollo": (lro.apollo, {"key": 1}),
    "apollo_published": (lro.apollo, {"key": 1, **PUBLISHED}),
    "apollo_mini": (lro.apollo_mini, {"key": 1, "rank": 1}),
    "frugal": (lro.frugal, {}),
    "frugal_coordinates": (lro.frugal, {"basis": lro.bases.coordinates(key=1)}),
    "grass_sparse": (lro.recipes.grass_sparse, {"key": 1}),
    "flora": (lro.recipes.flora, {"key": 1}),
    "coap": (lro.recipes.coap, {}),
    "alice": (lro.recipes.alice, {"key": 1, "keep": 1}),
    "alice_0": (lro.recipes.alice, {"key": 1, "b3": None}),
    "sumo": (lro.recipes.sumo, {}),
    "sumo_newton_schulz": (lro.recipes.sumo, {"method": "newton_schulz"}),
    "racs": (lro.recipes.racs, {}),
    "scale_sgd": (lro.recipes.scale_sgd, {"momentum": "matrix"}),
    "dct_adamw": (lro.recipes.dct_adamw, {}),
    "dct_adamw_feedback": (
        lro.recipes.dct_adamw,
        {"feedback": True, "refresh_every": 1},
    ),
    "online_subspace_descent": (lro.recipes.online_subspace_descent, {}),
    "foam": (lro.recipes.foam, {}),
    "gwt": (lro.recipes.gwt, {}),
    "sink_gd": (lro.recipes.sink_gd, {}),
    "mlorc": (lro.recipes.mlorc, {"key": 1}),
    "lora_pre": (lro.recipes.lora_pre, {"key": 1}),
    "mofasgd": (lro.recipes.mofasgd, {"key": 1}),
    "cosmos": (lro.recipes.cosmos, {"refresh_every": 1}),
    "stable_spam": (lro.recipes.stable_spam, {"restart": EVERY}),
}


# Of the named optimizers, those without a subspace, and with one that never changes.
WHOLE = {"racs", "scale_sgd", "sink_gd", "stable_spam", "mlorc", "lora_pre", "mofasgd"}
FIXED = {"foam", "gwt"}


# One wrapper at a time, for what differs most in how state is kept: moments that turn
# and a key, moments that begin anew, a state for each leaf, an error that is fed back.
WRAPPED = ["grass_walk", "frugal", "q_galore", "ldadam"]


# And one of each other kind: factored moments, codes, one step for all matrices, a
# basis from its key, rows, a trained one, a tracked Gram matrix, none.
KINDS = [*WRAPPED, "galore_adafactor", "galore_adam8bit", "galore_adam_mini", "apollo"]
KINDS += ["grass_sparse", "online_subspace_descent", "alice", "racs"]


# Two compiled programs may round in another order; relative to the learning rate,
# which is about the size of an update. Bias correction multiplies by up to 1e3.
TOLERANCE = 1e-4


# A number that rounds to the next 8-bit code moves by 1/64 of its size at most.
CODE = 2e-2


def options_of(name: str, **changes: Any) -> tuple[Any, dict[str, Any]]:
    make, options = ALL[name]
    options = {"learning_rate": RATE, **COMMON, **options, **changes}
    taken = inspect.signature(make).parameters
    return make, {k: v for k, v in options.items() if k in taken or k in changes}


def build(name: str, **changes: Any) -> optax.GradientTransformationExtraArgs:
    make, options = options_of(name, **changes)
    return make(**options)


def full_tree(seed: int = 0) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    shapes = {"embedding": (5, 3), "matrix": (4, 6), "vector": (3,)}
    tree: dict[str, Any] = {
        k: jnp.asarray(random.normal(size=s), jnp.float32) for k, s in shapes.items()
    }
    tree["layers"] = {"kernel": jnp.asarray(random.normal(size=(2, 6, 4)), jnp.float32)}
    tree["frozen"] = None
    return tree


def tree_of(seed: int = 0) -> dict[str, Any]:
    """What compiles fast: one matrix, one vector, and a leaf that is not there."""
    tree = full_tree(seed)
    return {k: tree[k] for k in ("matrix", "vector", "frozen")}


def gradients(steps: int = 8, make: Any = tree_of) -> list[Any]:
    return [make(seed) for seed in range(100, 100 + steps)]


def run(
    tx: Any, grads: list[Any], params: Any = None, **extra_args: Any
) -> tuple[list[Any], Any]:
    """The updates of each step on constant weights, and the last state."""
    return _run(tx, jax.jit(tx.update), grads, params, **extra_args)


def _run(
    tx: Any, jitted: Any, grads: list[Any], params: Any = None, **extra_args: Any
) -> tuple[list[Any], Any]:
    params = tree_of() if params is None else params
    update, state, out = functools.partial(jitted, **extra_args), tx.init(params), []
    for grad in grads:
        updates, state = update(grad, state, params)
        out.append(updates)
    return out, state


@functools.cache
def compiled(name: str) -> tuple[Any, Any]:
    tx = build(name)
    return tx, jax.jit(tx.update)


def plain(name: str, grads: list[Any] | None = None) -> list[Any]:
    """The updates of the optimizer by itself."""
    return _run(*compiled(name), gradients() if grads is None else grads)[0]


def close(ours: Any, theirs: Any, atol: float = TOLERANCE * RATE) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(
            np.asarray(a, np.float64), np.asarray(b, np.float64), rtol=0, atol=atol
        )


def zeros(tree: Any) -> None:
    assert not any(np.any(np.asarray(x)) for x in jax.tree.leaves(tree))


def types(tree: Any) -> Any:
    """Shape, dtype and weak type of each leaf."""
    return jax.tree.map(jax.typeof, tree)


def stack(trees: list[Any]) -> Any:
    return jax.tree.map(lambda *xs: jnp.stack(xs), *trees)


def unstack(tree: Any, steps: int) -> list[Any]:
    return [jax.tree.map(lambda x, t=t: np.asarray(x)[t], tree) for t in range(steps)]


def paths(tree: Any) -> dict[str, Any]:
    return {
        jax.tree_util.keystr(keys, simple=True, separator="/"): x
        for keys, x in jax.tree_util.tree_leaves_with_path(tree)
    }


def raw_keys(state: Any) -> Any:
    def raw(x: Any) -> Any:
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return jax.random.key_data(x) if is_key else x

    return jax.tree.map(raw, state)
