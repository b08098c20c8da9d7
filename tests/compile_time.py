"""CPU seconds to compile an update of an unstacked LLaMA.

    python -m tests.compile_time

Trees of Hugging Face and NNX have one array for each matrix: 7 a layer. A program has
one step: an ordinary one (refresh=False), a refresh (True), or both (None).
"""

import argparse
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax

import lowrank_optax as lro

NAMES = ("q", "k", "v", "o", "gate", "up", "down")
METHODS = {
    "adamw": lambda: optax.adamw(1e-3),
    "contrib.muon": lambda: optax.contrib.muon(1e-3),
    "contrib.galore": lambda: optax.contrib.galore(1e-3, rank=16),
    "galore": lambda: lro.galore(1e-3, rank=16),
    "fira": lambda: lro.fira(1e-3, rank=16),
    "apollo": lambda: lro.apollo(1e-3, rank=16, key=0),
    "ldadam": lambda: lro.ldadam(1e-3, rank=16),
    "grass_walk": lambda: lro.grass_walk(1e-3, rank=16, key=0),
    "grass_jump": lambda: lro.grass_jump(1e-3, rank=16, key=0),
    "spectral_adam": lambda: lro.spectral_adam(1e-3, rank=16, key=0),
}


def parameters(layers: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of the matrices of some layers."""
    shapes = {"down": (176, 64), "gate": (64, 176), "up": (64, 176)}
    return {
        f"layers/{i}/mlp/{name}": jax.ShapeDtypeStruct(
            shapes.get(name, (64, 64)), jnp.float32
        )
        for i in range(layers)
        for name in NAMES
    }


def measure(
    tx: optax.GradientTransformation, layers: int, refresh: bool | None
) -> tuple[float, float, int]:
    """CPU seconds to trace and to compile an update, and the lines of the program."""
    params = parameters(layers)
    state = jax.eval_shape(tx.init, params)
    given = {} if refresh is None else {"refresh": refresh}

    def update(grads, state, params):
        return tx.update(grads, state, params, **given)

    start = time.process_time()
    lowered = jax.jit(update).lower(params, state, params)
    traced = time.process_time()
    compiled = lowered.compile()
    done = time.process_time()
    return traced - start, done - traced, compiled.as_text().count("\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints a row for each method and kind of step."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[6, 12])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    options = parser.parse_args(arguments)
    print("method          refresh  matrices  trace, s  compile, s    lines")
    for name in options.methods:
        ours = name in ("adamw",) or name.startswith("contrib")
        for refresh in (None,) if ours else (False, True, None):
            for layers in options.layers:
                trace, seconds, lines = measure(METHODS[name](), layers, refresh)
                print(
                    f"{name:15} {refresh!s:8} {layers * len(NAMES):8} {trace:9.1f} "
                    f"{seconds:11.1f} {lines:8,}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
