"""Chains and arguments that are wrong: one error, with what to do."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import lowrank_optax as lro

GRADIENT = {"mlp": {"w": jnp.ones((8, 12))}}
ADAM = optax.scale_by_adam()
STEPS: dict[str, Any] = {
    "in_subspace": lro.in_subspace(ADAM),
    "rotate_moments": lro.rotate_moments(ADAM),
    "reset_moments": lro.reset_moments(ADAM),
}
BACKS: dict[str, Any] = {
    "project_back": lro.project_back(),
    "recover_residual": lro.recover_residual(),
    "sign_residual": lro.sign_residual(),
    "scale_gradient": lro.scale_gradient(),
    "compensate_columns": lro.compensate_columns(),
    "spectral_residual": lro.spectral_residual(),
    "scale_by_racs": lro.full_rank.scale_by_racs(),
    "normalize_by_output_rms": lro.full_rank.normalize_by_output_rms(),
}
RULES: dict[str, Any] = {
    "svd": lro.dominant_svd(),
    "gaussian": lro.bases.gaussian(0),
    "lazy": lro.bases.lazy_refresh(lro.dominant_svd()),
    "adaptive": lro.bases.adaptive_refresh(lro.dominant_svd()),
    "pca": lro.bases.online_pca(),
}


def trace(*stages: Any) -> None:
    """Init and one step, as shapes."""
    tx = lro.low_rank(optax.chain(*stages), rank=2, refresh_every=2)
    state = jax.eval_shape(tx.init, GRADIENT)
    jax.eval_shape(tx.update, GRADIENT, state, GRADIENT)


@pytest.mark.parametrize("name", STEPS)
def test_two_steps(name: str) -> None:
    rule, back = lro.grassmann_jump(0), lro.project_back()
    with pytest.raises(ValueError, match=r"mlp/w: a second step.*remove one"):
        trace(rule, lro.project(), lro.in_subspace(ADAM), STEPS[name], back)


@pytest.mark.parametrize("name", BACKS)
def test_two_ways_back(name: str) -> None:
    before = lro.grassmann_jump(0), lro.project(), lro.in_subspace(ADAM)
    with pytest.raises(ValueError, match=r"mlp/w: a second way back.*remove one"):
        trace(*before, BACKS["project_back"], BACKS[name])


@pytest.mark.parametrize("name", RULES)
def test_two_basis_rules(name: str) -> None:
    rest = lro.project(), lro.in_subspace(ADAM), lro.project_back()
    with pytest.raises(ValueError, match=r"mlp/w: a second basis rule.*remove one"):
        trace(lro.grassmann_jump(0), RULES[name], *rest)


OUTSIDE: dict[str, Any] = {
    **BACKS,
    "project": lro.project(),
    "scale_by_shape": lro.recovery.scale_by_shape(),
    "clip_step_growth": lro.recovery.clip_step_growth(),
    "error_feedback": lro.error_feedback(lro.project()),
    "trace_matching": lro.full_rank.trace_matching("w"),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_stage_outside_of_low_rank(name: str) -> None:
    """It did nothing, and said nothing."""
    tx = OUTSIDE[name]
    with pytest.raises(ValueError, match=rf"mlp/w: {name}\(\).*chain that low_rank"):
        tx.update(GRADIENT, tx.init(GRADIENT))
    assert tx.update({}, tx.init({}))[0] == {}


def test_a_tree_of_full_rank_is_none_outside() -> None:
    stages = lro.dominant_svd(), lro.project(), STEPS["in_subspace"], lro.project_back()
    tx = lro.low_rank(optax.chain(*stages), rank=2, refresh_every=2)
    g = {"bias": jnp.ones(3)}
    updates: Any = tx.update(g, tx.init(g))[0]
    assert updates["bias"].shape == (3,)


def nothing() -> Any:
    return 3


three, none = nothing(), nothing
svd: Any = lro.dominant_svd
WRONG: dict[str, tuple[Callable[[], object], str]] = {
    "error_feedback": (lambda: lro.error_feedback(three), "error_feedback.*not 3"),
    "track_gram": (lambda: lro.bases.track_gram(three), "track_gram.*not 3"),
    "low_rank": (
        lambda: lro.low_rank(three, rank=2, refresh_every=1),
        r"low_rank\(\) needs a transf",
    ),
    "full_matrices": (
        lambda: lro.full_rank.full_matrices(none),  # pyright: ignore[reportArgumentType]
        "call it: nothing",
    ),
    "in_subspace": (lambda: lro.in_subspace(three), r"scale_by_adam\(\), not 3"),
    "reset": (lambda: lro.reset_moments(three), "reset_moments.*not 3"),
    "rotate": (lambda: lro.rotate_moments(three), "rotate_moments.*not 3"),
    "per_matrix": (lambda: lro.steps.per_matrix(three), "per_matrix.*not 3"),
    "in_full_space": (lambda: lro.steps.in_full_space(three), "in_full_space.*not 3"),
    "with_rest": (lambda: lro.steps.with_rest(three), "with_rest.*not 3"),
    "rest": (lambda: lro.steps.with_rest(ADAM, three), "with_rest.*not 3"),
    "quantize": (lambda: lro.quantize_moments(three), "quantize_moments.*not 3"),
    "per_layer": (lambda: lro.training.per_layer(three), "per_layer.*galore.*not 3"),
    "average": (lambda: lro.training.average_gradients(three, "d"), "average_.*not 3"),
    "add_stage": (lambda: lro.add_stage(lro.galore(0.1), three), "add_stage.*not 3"),
    "memory": (
        lambda: lro.memory_report(GRADIENT, lro.galore(0.1)),  # pyright: ignore
        r"memory_report\(tx, params\) needs a transformation.*not ",
    ),
    "moments": (
        lambda: lro.steps.register_moments(three, first="mu"),
        "NamedTuple class.*not 3",
    ),
    "class": (
        lambda: lro.steps.register_moments(int, first="mu"),
        "NamedTuple class.*not <class 'int'>",
    ),
    "heads": (lambda: lro.steps.adam_mini_blocks(three), "heads=3: pass pairs"),
    "heads of galore": (
        lambda: lro.recipes.galore_adam_mini(0.1, heads=three),
        "heads=3: pass pairs",
    ),
    "uncalled": (lambda: lro.galore(0.1, basis=svd), "call it: dominant_svd"),
    "basis_rule": (lambda: lro.basis_rule(three), "basis_rule.*a function.*not 3"),
    "fira": (lambda: lro.fira(0.1, limit=0.5), "limit=0.5: .*at least 1"),
    "apollo": (lambda: lro.apollo(0.1, key=0, limit=0.5), "limit=0.5"),
    "alice": (lambda: lro.recipes.alice(0.1, key=0, limit=0.5), "limit=0.5"),
    "sumo": (lambda: lro.recipes.sumo(0.1, limit=0.5), "limit=0.5"),
    "racs": (lambda: lro.recipes.racs(0.1, limit=float("nan")), "limit=nan"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_argument(name: str) -> None:
    call, match = WRONG[name]
    with pytest.raises(ValueError, match=match):
        call()


def test_options_have_names() -> None:
    make: Any = lro.galore
    with pytest.raises(TypeError, match=r"galore\(\): too many.*by name, as rank="):
        make(0.01, 4)


def test_what_error_feedback_wraps() -> None:
    rest = lro.in_subspace(ADAM), lro.project_back()
    with pytest.raises(ValueError, match=r"mlp/w: .*chain\(dominant_svd\(\), project"):
        trace(lro.error_feedback(lro.dominant_svd()), *rest)
