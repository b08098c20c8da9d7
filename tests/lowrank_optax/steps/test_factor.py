"""Moments stored as low-rank factors: what is exact, and what is factored."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import lowrank_optax as lro
from lowrank_optax.steps.factor import Factors, factors_of, product_of
from tests.helpers.battery import types
from tests.helpers.stages import normal

M, N, R = 5, 40, 2
PARAMS = {
    "wide": jnp.zeros((M, N)),
    "tall": jnp.zeros((2, N, M)),
    "thin": jnp.zeros((1, N)),  # its factors would need more
    "bias": jnp.zeros(N),
}


def factored(inner: Any = None, **options: Any) -> Any:
    inner = optax.scale_by_adam() if inner is None else inner
    return lro.steps.factor_moments(inner, R, key=0, **options)


def test_factors_are_the_leading_part_of_each_matrix() -> None:
    """By the released code's randomized SVD; of rank one, the matrix itself."""
    x = np.stack([normal(12, 30), np.outer(normal(12, seed=1), normal(30, seed=2))])
    key = jax.random.key(0)
    found = jax.jit(lambda x: product_of(factors_of(x, R, key)))(x)
    sketch = np.float64(jax.random.normal(key, (30, R)))
    q = np.linalg.qr(x[0] @ sketch)[0]
    q = np.linalg.qr(x[0] @ x[0].T @ q)[0]
    # Float32, through three products and two orthonormal bases.
    np.testing.assert_allclose(found[0], q @ q.T @ x[0], atol=2e-5)
    np.testing.assert_allclose(found[1], x[1], atol=1e-5)


def test_what_had_no_negative_number_gets_none() -> None:
    """The mean magnitude of the negative ones in their place, matrix by matrix."""
    left = jnp.array([[[1.0], [-2.0]]] * 2)
    right = jnp.array([[[1.0, 2.0, 0.0]]] * 2)
    m = product_of(Factors(left, right, jnp.array([True, False])))
    assert m[0].tolist() == [[1, 2, 0], [3, 3, 0]]
    assert m[1].tolist() == [[1, 2, 0], [-2, -4, 0]]


def test_what_is_factored_and_that_it_begins_as_the_inner_one_does() -> None:
    tx = factored(optax.scale_by_rss(initial_accumulator_value=0.1))
    state = jax.jit(tx.init)(PARAMS)
    left, (right,), (nonnegative,) = state.inner_state[0], *state[2:]
    shapes = {k: x.shape for k, x in PARAMS.items()}
    assert {k: x.shape for k, x in left.items()} == {
        **shapes,
        "wide": (M, R),
        "tall": (2, N, R),
    }
    assert {k for k, x in right.items() if x.dtype == bool} == {"thin", "bias"}
    for k in ("wide", "tall"):
        begun = Factors(left[k], right[k], nonnegative[k])
        assert begun.right.shape[-2] == R
        np.testing.assert_array_equal(product_of(begun), jnp.full(shapes[k], 0.1))


# Its update turns the factors' product, and factors that again.
@pytest.mark.parametrize("wrap", [lro.in_subspace, lro.rotate_moments])
def test_inside_a_subspace_a_step_keeps_the_form_of_the_state(wrap: Any) -> None:
    """By shapes alone, layer by layer; rank R of moments that are 4 x N."""
    step = wrap(factored(optax.scale_by_adam(mu_dtype=jnp.bfloat16)))
    stages = optax.chain(lro.dominant_svd(), lro.project(), step, lro.project_back())
    tx = lro.training.per_layer(lro.low_rank(stages, rank=4, refresh_every=2))
    params = {"w": jnp.zeros((3, M, N))}
    state = jax.eval_shape(tx.init, params)
    updates, after = jax.eval_shape(tx.update, params, state, params)
    assert types(after) == types(state)
    assert types(updates) == types(params)
    found = {(x.shape, x.dtype.name) for x in jax.tree.leaves(state)}
    assert {((3, 4, R), "bfloat16"), ((3, R, N), "float32")} <= found


def test_factors_are_sharded() -> None:
    mesh = Mesh(np.array(jax.devices()[:2]), ("fsdp",))
    params = {"w": jax.ShapeDtypeStruct((4, 8), jnp.float32)}
    shards = {"w": NamedSharding(mesh, P(None, "fsdp"))}
    tx = lro.recipes.mlorc(0.1, rank=R, key=0, dimension_numbers=None)
    found = lro.state_shardings(tx, params, shards)
    assert optax.tree.get(found, "right")[1]["w"].spec == P(None, "fsdp")
    mu = [x for _, x in optax.tree.get_all_with_path(found, "mu")]
    assert mu[0]["w"].spec == P("fsdp")


def test_mistakes() -> None:
    with pytest.raises(ValueError, match="rank must be at least 1, not 0"):
        lro.steps.factor_moments(optax.trace(0.9), 0, key=0)
    with pytest.raises(ValueError, match="key must be an int or a typed key"):
        lro.steps.factor_moments(optax.trace(0.9), 1, key=0.5)  # pyright: ignore
