"""Temporaries of an update beside the state, by how a loop calls it.

    python -m tests.update_memory
    XLA_FLAGS=--xla_cpu_enable_concurrency_optimized_scheduler=false \\
      python -m tests.update_memory
    python -m tests.update_memory --topology v5e:2x2 --methods adamw galore

A step is the update and its addition to the weights of a LLaMA, jitted, with weights
and state donated, and compiled for this machine's device, or for one chip of a TPU that
is not here (with moments in 8 bits that takes minutes). Nothing runs. The ways:

- whole: `tx.update` of the whole tree
- accept: the same, with `accept` given as an array
- layers: `update_layers`, a layer at a time, and `tx.update` of the rest, with `accept`
"""

import argparse
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

import lowrank_optax as lro
from models import SIZES, init_params
from train.tpu.topology import chips_of, stay_on_cpu

MIB = 2**20
METHODS: dict[str, Callable[[int], optax.GradientTransformation]] = {
    "adamw": lambda _: optax.adamw(1e-3),
    "galore": lambda r: lro.galore(1e-3, rank=r),
    "galore_adam8bit": lambda r: lro.recipes.galore_adam8bit(1e-3, rank=r),
    "fira": lambda r: lro.fira(1e-3, rank=r),
    "grass_jump": lambda r: lro.grass_jump(1e-3, rank=r, key=0),
    "apollo": lambda r: lro.apollo(1e-3, rank=r, key=0),
    "apollo_mini": lambda _: lro.apollo_mini(1e-3, key=0),
    "spectral_adam": lambda r: lro.spectral_adam(1e-3, rank=r),
}


def parted(tree: Any) -> tuple[Any, Any]:
    """The stacked layers, and the rest."""
    rest = {k: v for k, v in tree.items() if k != "layers"}
    return {"layers": tree["layers"]}, rest


def whole(tx: Any, params: Any, state: Any, grads: Any, **given: Any) -> Any:
    """The step of a whole tree."""
    updates, state = tx.update(grads, state, params, refresh=False, **given)
    return optax.apply_updates(params, updates), state


def by_layer(tx: Any, params: Any, state: Any, grads: Any, **given: Any) -> Any:
    """The same a layer at a time, with a state for the layers and one for the rest."""
    (p, rest), (g, g_rest) = parted(params), parted(grads)
    p, layers = lro.training.update_layers(
        tx, g, state[0], p, block=1, refresh=False, **given
    )
    rest, others = whole(tx, rest, state[1], g_rest, **given)
    return {**p, **rest}, (layers, others)


def on_chip(tree: Any, topology: str | None) -> Any:
    """The shapes of a tree, on the first chip of a topology if there is one."""
    if topology is None:
        return tree
    own = jax.sharding.SingleDeviceSharding(chips_of(topology)[0])
    return jax.tree.map(lambda x: x.update(sharding=own), tree)


def temporaries(step: Any, params: Any, state: Any, *flag: Any) -> tuple[int, int]:
    """Bytes that live during a step alone, and those of all that it needs."""

    def update(params: Any, state: Any, grads: Any, *accept: Any) -> Any:
        given = {"accept": accept[0]} if accept else {}
        return step(params, state, grads, **given)

    jitted = jax.jit(update, donate_argnums=(0, 1))
    memory: Any = jitted.lower(params, state, params, *flag).compile().memory_analysis()
    lasting = memory.argument_size_in_bytes + memory.output_size_in_bytes
    alone = memory.temp_size_in_bytes
    return alone, lasting - memory.alias_size_in_bytes + alone


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints a row for each method and way."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", default="60m", choices=SIZES)
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--topology", help="compile for a TPU, such as v5e:2x2")
    options = parser.parse_args(arguments)
    if options.topology:
        stay_on_cpu()
    draw = partial(init_params, SIZES[options.size])
    params = jax.eval_shape(draw, jax.random.key(0))
    flag = jax.ShapeDtypeStruct((), jnp.bool_)
    print("method           way     temporaries, MiB  with weights, state, gradients")
    for name in options.methods:
        tx = optax.with_extra_args_support(METHODS[name](options.rank))
        state = jax.eval_shape(tx.init, params)
        ways = {"whole": (partial(whole, tx), params, state)}
        if name != "adamw":
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="low_rank projects 0 of")
                layers, rest = parted(params)
                inits = lro.training.per_layer(tx).init, tx.init
                states = tuple(map(jax.eval_shape, inits, (layers, rest)))
            ways["accept"] = (*ways["whole"], flag)
            ways["layers"] = (partial(by_layer, tx), params, states, flag)
        for way, (step, *given) in ways.items():
            alone, total = temporaries(step, *on_chip(given, options.topology))
            print(
                f"{name:16} {way:7} {alone / MIB:16,.1f} {total / MIB:27,.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
