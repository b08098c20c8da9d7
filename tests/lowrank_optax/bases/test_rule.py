"""What every basis rule does, whatever the gradient."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import settings

import lowrank_optax as lro
from lowrank_optax.core.linalg import orthonormality_error
from lowrank_optax.core.stage import Clock
from tests.helpers.rules import B1, M, N, R, Walk, frame_of, normal, same_bits, scanned

few = settings(derandomize=True, deadline=None, max_examples=20)


# ------------------------------------------------------------------ every rule

RULES: dict[str, Any] = {
    "coordinates": lambda key: lro.bases.coordinates(key),
    "ascending": lambda _: lro.bases.coordinates(order="ascending"),
    "sample_rows": lambda key: lro.bases.sample_rows(key),
    "gaussian": lambda key: lro.bases.gaussian(key),
    "gaussian stored": lambda key: lro.bases.gaussian(key, stored=True),
    "track": lambda _: lro.bases.grassmann_track(),
    "track by line search": lambda _: lro.bases.grassmann_track(None),
    "random_after": lambda key: lro.bases.random_after(2, key),
    "online_pca": lambda _: lro.bases.online_pca(),
    "power_iterate": lambda _: lro.bases.power_iterate(b1=B1),
    "correlation_aware": lambda _: lro.bases.correlation_aware(recompute_every=3),
    "frozen": lambda key: lro.bases.frozen(lro.sara_sample(key)),
    "lazy": lambda key: lro.bases.lazy_refresh(lro.sara_sample(key), window=1),
    "4 bits": lambda key: lro.bases.quantize_basis(lro.sara_sample(key)),
    "switch": lambda key: lro.bases.switch_basis(key),
}
DRAWN = {
    "switch",
    "coordinates",
    "sample_rows",
    "gaussian",
    "gaussian stored",
    "random_after",
    "frozen",
    "lazy",
    "4 bits",
}
LOOSE = {  # no promise of an orthonormal basis
    "gaussian",
    "gaussian stored",
    "online_pca",
    "correlation_aware",
    "4 bits",
}
each_rule = pytest.mark.parametrize("rule", RULES)
KINDS = [
    normal(M, N),
    np.zeros((M, N), np.float32),
    np.ones((M, N), np.float32),
    normal(M, 2) @ normal(2, N, seed=1),  # rank two
    (normal(M, M) * 10.0 ** -np.arange(M)).astype(np.float32) @ normal(M, N),
    np.eye(M, N, dtype=np.float32) * (np.arange(M) == 2)[:, None],  # one entry
    np.float32(1e-30) * normal(M, N),
    np.float32(1e30) * normal(M, N),
]
# Refreshes at every step, each kind first and each after the others, one order per
# layer; then at every third.
ORDERS = np.stack([KINDS[i:] + KINDS[:i] for i in range(len(KINDS))], axis=1)
GRADIENTS = np.concatenate([ORDERS, normal(6, *ORDERS.shape[1:])])
DUE = np.array([True] * len(KINDS) + [False, False, True] * 2)
KEYS = np.array([1, 1, 2])


@functools.cache
def walks(rule: str) -> Walk:
    """The same walk with each of the keys, in front."""

    @jax.jit
    def run(keys: Any, gradients: Any) -> Any:
        return jax.lax.map(
            lambda key: scanned(RULES[rule](key), gradients, jnp.asarray(DUE)), keys
        )

    return run(KEYS, GRADIENTS)


@each_rule
def test_any_gradient_gives_a_basis(rule: str) -> None:
    found = walks(rule)
    assert np.isfinite(found.rotation).all()
    assert np.isfinite(found.low).all()
    if np.issubdtype(found.basis.dtype, np.integer):
        assert found.basis.shape == (3, *GRADIENTS.shape[:2], R)
        assert (np.diff(found.basis) > 0).all()  # distinct, sorted rows
        assert found.basis.min() >= 0
        assert found.basis.max() < M
    elif rule not in LOOSE:
        # A few tens of float32 roundings, as what `orthonormalize` lets pass.
        assert orthonormality_error(found.basis) < 1e-5
    else:
        assert np.isfinite(found.basis).all()


@each_rule
def test_a_rule_says_whether_its_bases_are_orthonormal(rule: str) -> None:
    made, said = RULES[rule](1), []
    now = jnp.zeros([], jnp.int32)

    def update(g: Any, m: Any) -> Any:
        frame = frame_of(g).replace(momentum=m)
        clock = Clock(step=now, refresh=now == 0, cycle=now)
        out, _ = made.update(frame, made.init(frame), clock=clock)
        said.append(out.orthonormal)
        return out.basis

    jax.eval_shape(update, normal(M, N), jnp.zeros((R, N)))
    assert said == [rule not in LOOSE]


@each_rule
def test_the_key_decides_the_draw(rule: str) -> None:
    found = walks(rule)
    assert same_bits(found.basis[0], found.basis[1])
    assert same_bits(found.rotation[0], found.rotation[1])
    assert same_bits(found.low[0], found.low[1])
    for t in np.flatnonzero(DUE):
        if rule in DRAWN:
            # Not yet random; a zero gradient's basis is replaced at the next step.
            other = t < {"random_after": 2, "switch": 1}.get(rule, 0)
            assert same_bits(found.basis[0, t], found.basis[2, t]) == other
        else:
            assert same_bits(found.basis[0, t], found.basis[2, t])


@each_rule
def test_the_turn_is_that_of_the_bases(rule: str) -> None:
    """And the basis stands still, to the bit, between refreshes."""
    if rule == "online_pca":  # it moves at every step, and says no turn
        assert (np.diff(walks(rule).basis[0, 1:], axis=0) != 0).any((1, 2, 3)).all()
        return
    basis, turn = walks(rule).basis[0], walks(rule).rotation[0]
    if np.issubdtype(basis.dtype, np.integer):
        dense = np.swapaxes(np.eye(M)[basis], -1, -2)
    else:
        dense = np.float64(basis)
    for t in range(1, len(DUE)):
        if DUE[t]:
            expected = np.swapaxes(dense[t], -1, -2) @ dense[t - 1]
            # Float32 rounding of sums of M products of entries up to about 3.
            np.testing.assert_allclose(turn[t], expected, atol=1e-5)
        else:
            assert same_bits(basis[t], basis[t - 1])
            assert same_bits(turn[t], np.broadcast_to(np.eye(R), turn[t].shape))
