"""Which factorisations an optimizer asks of each platform, without having it here."""

import re

import jax
import jax.numpy as jnp
import optax
import pytest

import lowrank_optax as lro

RULES = {
    "svd": lro.dominant_svd(),
    "sara": lro.sara_sample(key=0),
    "walk": lro.grassmann_walk(key=0),
    "jump": lro.grassmann_jump(key=0),
}
# On a TPU the compiler takes minutes for a default SVD or eigh of size 512: only the
# Jacobi eigensolver and, where CholeskyQR2 may give up, a thin QR are asked for.
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
    assert calls(rule, "tpu") == (TPU if rule == "jump" else {"Eigh"})


@pytest.mark.parametrize("rule", ["svd", "sara"])
def test_accelerators_factorise_the_gram_matrix_and_a_cpu_the_gradient(rule):
    assert calls(rule, "cuda") == {"cusolver_syevd_ffi"}
    assert calls(rule, "cpu") == {"lapack_sgesdd_ffi"}
