"""Which factorisations an optimizer asks of each platform, without having it here."""

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import lowrank_optax as lro
from lowrank_optax.core import linalg
from tests.helpers.battery import ALL, build
from tests.helpers.marks import slow_but

RULES = {
    "svd": lro.dominant_svd(),
    "sara": lro.sara_sample(key=0),
    "walk": lro.grassmann_walk(key=0),
    "walk of all directions": lro.grassmann_walk(key=0, walk_rank=None),
    "jump": lro.grassmann_jump(key=0),
}
# On a TPU the compiler takes minutes for a default SVD or eigh of size 512: only the
# Jacobi eigensolver and, to complete a basis, a thin QR are asked for.
TPU = {"Eigh", "Qr", "ProductOfElementaryHouseholderReflectors"}


def calls(rule: str, platform: str) -> set[str]:
    adam = lro.rotate_moments(optax.scale_by_adam())
    stages = optax.chain(RULES[rule], lro.project(), adam, lro.project_back())
    tx = lro.low_rank(stages, rank=4, refresh_every=2, dimension_numbers=lro.STACKED)
    g = {"w": jnp.ones((3, 16, 24))}
    traced = jax.jit(tx.update).trace(g, tx.init(g))
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    return set(re.findall(r"custom_call @(\w+)", text))


@pytest.mark.parametrize("rule", RULES)
def test_on_a_tpu(rule):
    assert calls(rule, "tpu") == {"Eigh"}


def test_no_qr_and_no_triangular_solve_of_a_large_rank_on_a_tpu():
    """The compiler unrolls them: at rank 1024 it would take minutes for each."""
    x = jax.ShapeDtypeStruct((2, 1024, 384), "float32")

    def both(x: jax.Array) -> jax.Array:
        return linalg.complement(linalg.orthonormalize(x))

    text = jax.jit(both).trace(x).lower(lowering_platforms=("tpu",)).as_text()
    columns = [
        *re.findall(r"custom_call @Qr.*?: \(tensor<\d+x(\d+)xf32>", text),
        *re.findall(r"triangular_solve.*?: \(tensor<(?:\d+x)+(\d+)xf32>", text),
    ]
    assert len(columns) >= 2
    assert {int(n) for n in columns} <= {96, 128}


@pytest.mark.parametrize("rule", ["svd", "sara"])
def test_accelerators_factorise_the_gram_matrix_and_a_cpu_the_gradient(rule):
    assert calls(rule, "cuda") == {"cusolver_syevd_ffi"}
    assert calls(rule, "cpu") == {"lapack_sgesdd_ffi"}


# --- the named optimizers ---

UNREFRESHED = {"rank": 4, "dimension_numbers": lro.STACKED}
COMMON = {**UNREFRESHED, "refresh_every": 2}
OPTIMIZERS = {
    "apollo": lambda: lro.apollo(0.01, key=0, **COMMON),
    "apollo_mini": lambda: lro.apollo_mini(0.01, key=0, **{**COMMON, "rank": 1}),
    "flora": lambda: lro.recipes.flora(0.01, key=0, **COMMON),
    "frugal rows": lambda: lro.frugal(0.01, basis=lro.bases.coordinates(0), **COMMON),
    "grass_sparse": lambda: lro.recipes.grass_sparse(0.01, key=0, **COMMON),
    "frugal": lambda: lro.frugal(0.01, **COMMON),
    "q_galore": lambda: lro.recipes.q_galore(0.01, **COMMON),
    "galore_adafactor": lambda: lro.recipes.galore_adafactor(0.01, **COMMON),
    "galore_adam8bit": lambda: lro.recipes.galore_adam8bit(0.01, **COMMON),
    "online": lambda: lro.recipes.online_subspace_descent(
        0.01, rank=4, dimension_numbers=lro.STACKED
    ),
    "subtrack": lambda: lro.recipes.subtrack(0.01, **COMMON),
    "spectral_adam": lambda: lro.spectral_adam(0.01, **COMMON),
    "golore": lambda: lro.recipes.golore(0.01, key=0, switch_step=3, **COMMON),
    "ldadam": lambda: lro.ldadam(0.01, rank=4, dimension_numbers=lro.STACKED),
    "coap": lambda: lro.recipes.coap(0.01, **COMMON),
    "msgd": lambda: lro.recipes.msgd(0.01, key=0, **COMMON),
    "dct_adamw": lambda: lro.recipes.dct_adamw(0.01, **COMMON),
    "alice": lambda: lro.recipes.alice(0.01, key=0, **COMMON),
    "sumo": lambda: lro.recipes.sumo(0.01, **COMMON),
    "racs": lambda: lro.recipes.racs(0.01, dimension_numbers=lro.STACKED),
    "scale_sgd": lambda: lro.recipes.scale_sgd(0.01, dimension_numbers=lro.STACKED),
    "foam": lambda: lro.recipes.foam(0.01, rank=4, dimension_numbers=lro.STACKED),
    "gwt": lambda: lro.recipes.gwt(0.01, rank=4, dimension_numbers=lro.STACKED),
    "sink_gd": lambda: lro.recipes.sink_gd(0.01, dimension_numbers=lro.STACKED),
    "mlorc": lambda: lro.recipes.mlorc(0.01, key=0, **UNREFRESHED),
    "lora_pre": lambda: lro.recipes.lora_pre(0.01, key=0, **UNREFRESHED),
    "mofasgd": lambda: lro.recipes.mofasgd(0.01, key=0, **UNREFRESHED),
    "cosmos": lambda: lro.recipes.cosmos(0.01, **COMMON),
}
NONE = {"apollo", "apollo_mini", "flora", "frugal rows", "grass_sparse", "dct_adamw"}
NONE |= {"racs", "scale_sgd", "foam", "gwt", "sink_gd", "mlorc"}


@pytest.mark.parametrize(
    "name",
    slow_but({"galore", "grass_jump", "ldadam", "apollo", "spectral_adam"}, OPTIMIZERS),
)
def test_the_update_of_an_optimizer_on_a_tpu_and_a_gpu(name: str) -> None:
    """Nothing but Jacobi on r x r or m x m, and a thin QR: no SVD, no default eigh."""
    tx = OPTIMIZERS[name]()
    g = {"w": jnp.ones((3, 16, 24)), "b": jnp.ones(5)}
    traced = jax.jit(tx.update).trace(g, tx.init(g), g)
    texts = {
        platform: traced.lower(lowering_platforms=(platform,)).as_text()
        for platform in ("tpu", "cuda")
    }
    found = {p: set(re.findall(r"custom_call @(\w+)", t)) for p, t in texts.items()}
    # Random bits, sorting, top-k and sharding are no factorisations.
    others = {"Sharding", "TopK", "cu_threefry2x32_ffi", "mhlo"}
    expected = set() if name in NONE else TPU if name == "alice" else {"Eigh"}
    assert found["tpu"] - others == expected
    assert not any("svd" in call or "gesv" in call for call in found["cuda"])


NO_LAPACK = {"apollo", "apollo_published", "apollo_mini", "flora", "grass_sparse"}
NO_LAPACK |= {"frugal_coordinates", "dct_adamw", "dct_adamw_feedback"}
NO_LAPACK |= {"racs", "scale_sgd", "foam", "gwt", "sink_gd", "stable_spam"}


@pytest.mark.parametrize(
    "name",
    slow_but({"galore", "grass_jump", "spectral_adam", "coap", "apollo"}, ALL),
)
def test_a_cpu_factorises_one_matrix_at_a_time(name: str) -> None:
    """Two batched calls of jaxlib 0.10 at once, on two cores, wait for each other."""
    g = {"layers": jnp.ones((3, 8, 12)), "matrix": jnp.ones((12, 16))}
    tx = build(name)
    shapes = lapack_shapes(tx.update, g, tx.init(g), g)
    assert all(re.fullmatch(r"(1x)?\d+x\d+x", shape) for shape in shapes), shapes
    assert bool(shapes) == (name not in NO_LAPACK)


def lapack_shapes(f: Callable[..., Any], *args: Any) -> list[str]:
    text = jax.jit(f).trace(*args).lower(lowering_platforms=("cpu",)).as_text()
    return re.findall(r"custom_call @lapack_.*?: \(tensor<((?:\d+x)+)f32>", text)


@pytest.mark.parametrize("refresh", [False, True])
@pytest.mark.parametrize("name", ["lora_pre", "mlorc", "mofasgd", "ldadam", "sumo"])
def test_nor_does_it_factorise_two_under_vmap(name: str, refresh: bool) -> None:
    """`per_layer` updates all layers by it; `mofasgd` hung in the trainer."""
    g = {"w": jnp.ones((3, 8, 12)), "v": jnp.ones((3, 12, 16))}
    tx = lro.training.per_layer(OPTIMIZERS[name]())
    update = functools.partial(tx.update, refresh=refresh)
    shapes = lapack_shapes(update, g, tx.init(g), g)
    assert all(re.fullmatch(r"(1x)?\d+x\d+x", shape) for shape in shapes), shapes
    assert bool(shapes) == (refresh or name != "ldadam")
