"""Shared options: the defaults of each optimizer, and arguments it does not have."""

import inspect
from typing import Any

import jax.numpy as jnp
import pytest

import lowrank_optax as lro
from lowrank_optax.optimizers.options import ELSEWHERE

# Where a method's own paper or release differs from `low_rank_optimizer` or `galore`.
DEFAULTS: dict[Any, dict[str, Any]] = {
    lro.galore: {"rank": 0.25, "refresh_every": 200, "scale": 0.25, "square": "input"},
    lro.grass_walk: {"refresh_every": 100},
    lro.grass_jump: {"refresh_every": 100},
    lro.recipes.subtrack: {"refresh_every": 200},
    lro.spectral_adam: {"refresh_every": 10},
    lro.ldadam: {"refresh_every": 1, "square": "output"},
    lro.apollo_mini: {"rank": 1},
    lro.recipes.dct_adamw: {"refresh_every": 1},
    lro.recipes.coap: {"eps": 1e-6, "refresh_every": 40},
    lro.recipes.online_subspace_descent: {"eps": 1e-8},
    lro.recipes.msgd: {"scale": 1.0},
}


@pytest.mark.parametrize("make", DEFAULTS, ids=lambda make: make.__name__)
def test_an_optimizer_has_its_own_defaults(make: Any) -> None:
    parameters = inspect.signature(make).parameters
    found = {name: parameters[name].default for name in DEFAULTS[make]}
    assert found == DEFAULTS[make]


def test_a_default_is_what_the_optimizer_runs_with() -> None:
    params = {"mlp": {"kernel": jnp.ones((8, 16))}}
    report = lro.memory_report(lro.apollo_mini(0.01, key=0), params)
    assert {row.path: row.rank for row in report.rows}["mlp/kernel"] == 1
    report = lro.memory_report(lro.apollo(0.01, key=0), params)
    assert {row.path: row.rank for row in report.rows}["mlp/kernel"] == 2


def test_an_argument_that_is_misspelt_is_named_with_the_one_that_was_meant() -> None:
    with pytest.raises(TypeError, match=r"golore\(\): no argument 'rnak'; .* rank"):
        lro.recipes.golore(0.01, rnak=4)
    with pytest.raises(TypeError, match=r"galore\(\): no argument 'foo'; see help"):
        lro.galore(0.01, foo=1)


@pytest.mark.parametrize("name", ELSEWHERE)
def test_an_argument_of_another_package_is_translated(name: str) -> None:
    parameters = inspect.signature(lro.galore).parameters
    meant = ELSEWHERE[name]
    assert name not in parameters
    assert {*meant.split(" and ")} <= {*parameters}
    with pytest.raises(TypeError, match=f"no argument '{name}'; did you mean {meant}"):
        lro.galore(**{"learning_rate": 0.01, name: 1})
