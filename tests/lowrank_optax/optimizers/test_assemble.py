"""What the named optimizers take, and a chain of one's own with the same wrapping."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from tests.helpers.stages import M, N, chain_of, normal, run


def test_a_step_or_a_basis_that_is_none() -> None:
    params = {"mlp": {"kernel": normal(M, N)}}
    with pytest.raises(TypeError, match=r"mlp/kernel: .*in in_subspace\(inner\)"):
        lro.galore(0.1, rank=3, refresh_every=5, step=optax.scale_by_adam()).init(
            params
        )
    for make in (lro.galore, lro.fira, lro.grass_jump, lro.frugal):
        bad: Any = "sara"
        with pytest.raises(
            ValueError, match=r"basis must be a stage.*sara_sample\(key=0\)"
        ):
            make(0.1, rank=3, refresh_every=5, basis=bad)
    with pytest.raises(ValueError, match="step must be a stage"):
        lro.fira(0.1, rank=3, refresh_every=5, step=bad)


def test_numpy_integers_are_integers() -> None:
    make: Any = lro.galore
    for rank, every in ((np.int64(3), np.int32(5)), (np.float32(0.5), 5)):
        tx = make(0.1, rank=rank, refresh_every=every, dimension_numbers=None)
        tx.init({"w": normal(M, N)})


def test_a_chain_of_ones_own_skips_as_the_named_optimizers_do() -> None:
    params = {"w": normal(M, N), "b": normal(3)}
    tx = lro.low_rank_optimizer(
        chain_of(),
        0.1,
        rank=3,
        refresh_every=2,
        weight_decay=0.1,
        dimension_numbers=None,
    )
    named = lro.galore(
        0.1,
        rank=3,
        refresh_every=2,
        weight_decay=0.1,
        scale=1.0,
        dimension_numbers=None,
    )
    bad = {**params, "w": params["w"].at[0, 0].set(jnp.nan)}
    for ours, theirs in zip(
        *(run(t, [params, bad, params])[0] for t in (tx, named)), strict=True
    ):
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert not np.any(run(tx, [params, bad])[0][1]["b"])


def test_leaves_without_numbers_do_not_spoil_the_others() -> None:
    params = {"none": jnp.zeros((0, 4)), "empty": jnp.zeros((3, 0)), "w": normal(4, 6)}
    tx = lro.recipes.galore_adam_mini(
        0.1, rank=2, refresh_every=2, dimension_numbers=None
    )
    updates, states = run(tx, [params] * 3)
    assert np.any(updates[-1]["w"])
    assert int(states[-1][0].skipped) == 0
