"""Bases that the caller has chosen before."""

import re

import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_optax as lro
from tests.helpers.rules import M, N, R, bracket, gaussian, run


def test_replay_takes_the_kth_basis_at_the_kth_refresh():
    given = jnp.stack([jnp.eye(M, R), jnp.eye(M, R)[::-1], jnp.eye(M)[:, 2 : 2 + R]])
    bases = run(
        bracket(lro.bases.replay({"w": given}), refresh_every=2), gaussian(9, M, N)
    )
    for t, k in enumerate([0, 0, 1, 1, 2, 2, 2, 2, 2]):
        np.testing.assert_array_equal(bases[t], given[k])


def test_replay_with_bases_that_do_not_fit():
    tree = {"mlp": {"kernel": jnp.ones((M, N))}, "attn": jnp.ones((M, N))}
    good = jnp.ones((2, M, R))
    tx = bracket(lro.bases.replay({"mlp": {"kernel": good}}))
    with pytest.raises(ValueError, match=r"attn: replay\(\) has no bases of this"):
        tx.init(tree)
    for bad in (good[0], good[:, :, :2], jnp.ones((2, N, R)), good[:0]):
        tx = bracket(lro.bases.replay({"mlp": {"kernel": bad}, "attn": good}))
        message = (
            f"mlp/kernel: replay() has bases of shape {bad.shape}; pass (K, {M}, {R})"
        )
        with pytest.raises(ValueError, match=re.escape(message)):
            tx.init(tree)
