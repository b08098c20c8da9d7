"""Layers of a stack on eight devices, whose updates need whole matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_optax as lro
from lowrank_optax.core.aliases import Tree
from tests.helpers import sharded
from tests.helpers.marks import slow_but

TX = lro.spectral_adam(1e-2, rank=sharded.R, refresh_every=2)
WEIGHTS = {"mlp": {k: sharded.gradient(0)["layers"]["mlp"][k] for k in ("down", "up")}}
GRADIENT = {"mlp": {k: sharded.gradient(1)["layers"]["mlp"][k] for k in ("down", "up")}}


def step(refresh: bool, block: int | None) -> jax.stages.Wrapped:
    def take(gradient: Tree, state: Tree, weights: Tree) -> tuple[Tree, Tree]:
        how = {"refresh": refresh, "block": block}
        return lro.training.update_layers(TX, gradient, state, weights, **how)

    return jax.jit(take)


@pytest.mark.parametrize("block", slow_but([], [None, 3], slow=[None]))
def test_no_device_sums_products_of_whole_matrices(block: int | None) -> None:
    mesh = sharded.mesh_of("fsdp")
    cut = {"mlp": {k: sharded.on(mesh)["layers"]["mlp"][k] for k in ("down", "up")}}
    per_layer = lro.training.per_layer(TX)
    alone = WEIGHTS, per_layer.init(WEIGHTS)
    with jax.set_mesh(mesh):
        weights, gradient = (jax.device_put(x, cut) for x in (WEIGHTS, GRADIENT))
        spread = weights, jax.jit(per_layer.init)(weights)
    for refresh in (True, False):
        alone = step(refresh, block)(GRADIENT, *alone[::-1])
        with jax.set_mesh(mesh):
            lowered = step(refresh, block).lower(gradient, *spread[::-1])
            compiled = lowered.compile()
            spread = compiled(gradient, *spread[::-1])
        kinds = {kind for kind, size in sharded.moved(compiled) if size > sharded.BASES}
        assert kinds <= {"all-to-all"}
        assert sum(kind == "all-to-all" for kind, _ in sharded.moved(compiled)) >= 4
        for old, new in zip(*map(jax.tree.leaves, (alone[0], spread[0])), strict=True):
            # A product in bfloat16 may round the other way.
            np.testing.assert_allclose(new, old, rtol=0, atol=2e-3)
            assert not jnp.allclose(new, 0)
