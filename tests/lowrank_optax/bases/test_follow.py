"""Rules on their schedule: orthonormal bases, refreshed on time, and their keys."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from lowrank_optax.core.linalg import orthonormality_error
from tests.helpers import stages
from tests.helpers.rules import M, N, R, bases_of, bracket, draw, gaussian, run

RULES = {
    "dominant_svd": lambda: lro.dominant_svd(),
    "dominant_svd gram": lambda: lro.dominant_svd(decomposition="gram"),
    "dominant_svd randomized": lambda: lro.dominant_svd(
        decomposition="randomized", key=1
    ),
    "sara_sample": lambda: lro.sara_sample(key=1),
    "sara_sample gram": lambda: lro.sara_sample(key=1, decomposition="gram"),
    "grassmann_walk": lambda: lro.grassmann_walk(key=1, angle=0.3, walk_rank=None),
    "grassmann_walk of rank one": lambda: lro.grassmann_walk(key=1),
    "grassmann_jump": lambda: lro.grassmann_jump(key=1),
}
each_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


# --- orthonormality ---


@each_rule
def test_orthonormal_for_every_gradient(rule):
    tail = gaussian(M, M) * 10.0 ** -jnp.arange(M)  # condition 1e7 and worse
    kinds = [
        gaussian(M, N),
        jnp.zeros((M, N)),
        jnp.ones((M, N)),
        tail @ gaussian(M, N, seed=1),
        jnp.zeros((M, N)).at[2, 3].set(1.0),
        1e-30 * gaussian(M, N),
        1e30 * gaussian(M, N),
    ]
    # Each kind first, and each after the others.
    orders = [kinds[i:] + kinds[:i] for i in range(len(kinds))]
    bases = run(bracket(rule()), jnp.stack([jnp.stack(o) for o in orders], axis=1))
    assert bases.shape == (len(kinds), len(kinds), M, R)
    assert orthonormality_error(bases) < 1e-5


# --- when ---


@each_rule
def test_basis_and_key_change_at_0_t_2t_and_at_no_other_time(rule):
    tx = bracket(rule(), refresh_every=3)
    state, seen = tx.init({"w": jnp.zeros((M, N))}), []
    update = jax.jit(tx.update)
    for g in gaussian(8, M, N):
        before, state = state, update({"w": g}, state)[1]
        (_, old), (_, new) = (
            optax.tree.get_all_with_path(s, "rng_key")[0] for s in (before, state)
        )
        split = old is not None and bool(jnp.any(old != new))
        moved = bool(jnp.any(bases_of(before)["w"] != bases_of(state)["w"]))
        seen.append((moved, split))
    due = [True, False, False, True, False, False, True, False]
    draws = rule not in (RULES["dominant_svd"], RULES["dominant_svd gram"])
    assert seen == [(refresh, refresh and draws) for refresh in due]


def test_the_update_is_the_gradient_projected_onto_the_basis():
    g = {"w": gaussian(N, M)}
    tx = bracket(lro.dominant_svd())
    updates, state = jax.jit(tx.update)(g, tx.init(g))
    s = bases_of(state)["w"]
    # The tall matrix is turned: S S^T G^T, turned back. Rounding of float32 products.
    np.testing.assert_allclose(updates["w"], g["w"] @ s @ s.T, atol=1e-5)


@pytest.mark.parametrize(
    "rule",
    [
        lro.sara_sample,
        lro.grassmann_walk,
        lro.grassmann_jump,
        lambda key: lro.dominant_svd(decomposition="randomized", key=key),
    ],
    ids=["sara_sample", "walk", "jump", "randomized"],
)
@pytest.mark.parametrize(
    "key",
    [1.0, True, np.float32(2), jnp.zeros(3, jnp.int32), "raw"],
    ids=["float", "bool", "numpy float", "vector", "raw"],
)
def test_bad_keys(rule, key):
    if isinstance(key, str):
        key = jax.random.PRNGKey(0)
    with pytest.raises(
        ValueError, match=r"an int or a typed key from jax\.random\.key"
    ):
        bracket(rule(key)).init({"w": jnp.ones((M, N))})


@each_rule
def test_a_basis_rule_outside_low_rank(rule):
    tx = rule()
    g = {"w": jnp.ones((M, N))}
    with pytest.raises(ValueError, match=r"inside low_rank\(\)"):
        tx.update(g, tx.init(g))


@pytest.mark.parametrize("seed", [0, np.int32(7), jnp.uint32(7)])
def test_a_seed_is_its_typed_key(seed):
    g = {"w": gaussian(2, M, N)}
    by_seed = draw(bracket(lro.sara_sample(seed)), g)
    by_key = draw(bracket(lro.sara_sample(jax.random.key(int(seed)))), g)
    np.testing.assert_array_equal(by_seed["w"], by_key["w"])


@pytest.mark.parametrize(
    "rule",
    [lro.sara_sample, lro.grassmann_walk, lro.grassmann_jump],
    ids=["sara_sample", "walk", "jump"],
)
def test_who_shares_a_draw(rule):
    # Equal gradients everywhere, singular values all likely; 20 of 40 as a sample.
    layers = jnp.broadcast_to(jnp.eye(40, 41), (2, 40, 41))
    tree = {"a": layers, "b": {"c": layers}}
    draws = draw(bracket(rule(5), rank=20), tree, steps=3)
    other_seed = draw(bracket(rule(6), rank=20), {"a": layers}, steps=3)
    # Leaves, layers, seeds and the second and third refresh draw apart.
    apart = [x[1:] for x in (draws["a"], draws["b"]["c"], other_seed["a"])]
    for x, y in itertools.combinations(np.concatenate(apart).reshape(-1, 40, 20), 2):
        assert np.any(x != y)
    # Other leaves of the tree do not matter.
    others = {"A": jnp.ones((30, 30)), "a": layers}
    alone = draw(bracket(rule(5), rank=20), others, steps=3)
    np.testing.assert_array_equal(alone["a"], draws["a"])


STARTS = {
    "frozen": lambda: lro.bases.frozen(lro.dominant_svd()),
    "walk": lambda: lro.grassmann_walk(0, 0.1),
    "track": lambda: lro.bases.grassmann_track(0.0),
    "svd": lro.dominant_svd,
    "jump": lambda: lro.grassmann_jump(0),
    "lazy": lambda: lro.bases.lazy_refresh(lro.dominant_svd()),
    "lazy walk": lambda: lro.bases.lazy_refresh(lro.grassmann_walk(0, 0.1)),
    "adaptive": lambda: lro.bases.adaptive_refresh(lro.dominant_svd()),
    "4 bits": lambda: lro.bases.quantize_basis(lro.dominant_svd()),
}


@pytest.mark.parametrize("rule", STARTS)
def test_the_first_basis_is_that_of_the_first_gradient(rule: str) -> None:
    """Layers behind a projection that starts at zero have no gradient at step 0."""
    zero, g = jnp.zeros((2, stages.M, stages.N)), stages.normal(2, stages.M, stages.N)
    late = zero.at[0].set(
        stages.normal(stages.M, stages.N, seed=1)
    )  # the second layer begins a step later
    grads = [
        {"w": x, "other": stages.normal(stages.M, stages.N, seed=i)}
        for i, x in enumerate([zero, zero, late, g, g, g])
    ]
    tx = lro.low_rank(
        stages.chain_of(
            basis=STARTS[rule](),
            step=lro.rotate_moments(optax.scale_by_adam(), moments="first"),
        ),
        rank=3,
        refresh_every=100,
        dimension_numbers=lro.STACKED,
    )
    updates, _ = stages.run(tx, grads)

    def outside(x: Any, gradient: Any) -> float:
        """How much of x lies outside the gradient's three leading directions."""
        u = np.linalg.svd(np.asarray(gradient))[0][:, :3]
        return float(np.linalg.norm(x - u @ (u.T @ x)) / np.linalg.norm(x))

    loose = 0.2 if rule == "4 bits" else 1e-4
    for t in (2, 3, 4, 5):
        assert outside(updates[t]["w"][0], grads[2]["w"][0]) < loose
        if t > 2:
            assert outside(updates[t]["w"][1], grads[3]["w"][1]) < loose
        # What began at step 0 is not asked again.
        assert outside(updates[t]["other"], grads[0]["other"]) < loose
