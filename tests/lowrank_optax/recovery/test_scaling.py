"""Gradients scaled by the step in the subspace: by channel, and as a whole."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lowrank_optax as lro
from tests.helpers.ways_back import (
    BASIS,
    GRADIENT,
    LIMIT,
    M,
    N,
    R,
    bracket,
    norm_of,
    rng,
    run,
)

SCALED = {
    "channels": lro.scale_gradient,
    "tensor": functools.partial(lro.scale_gradient, per="matrix", scale=128.0),
}


each = pytest.mark.parametrize("name", SCALED)


each_variant = pytest.mark.parametrize("variant", ["paper", "published"])


@each
def test_the_identity_gives_the_gradient_itself(name: str) -> None:
    # phi = 1 wherever S^T G is not zero, for any basis, Gaussian ones too.
    tx = bracket(SCALED[name](scale=4.0), optax.identity(), lro.bases.gaussian(0))
    found, _ = run(tx, GRADIENT[None])
    # The root of the scale; a rounding of two norms of the same numbers.
    np.testing.assert_allclose(found[0], 2 * GRADIENT, rtol=1e-6)


@each
def test_the_step_keeps_directions_and_takes_the_sizes_of_adams(name: str) -> None:
    gradients = np.geomspace(0.1, 10, N) * rng.normal(size=(1, M, N))
    (found,), _ = run(bracket(SCALED[name](scale=1.0)), gradients.astype(np.float32))
    g, low = gradients[0], np.float64(BASIS).T @ gradients[0]
    low_step = np.sign(low)  # a first step of Adam
    axis = 0 if name == "channels" else None
    phi = np.linalg.norm(low_step, axis=axis) / np.linalg.norm(low, axis=axis)
    # Float32 norms of a few dozen numbers.
    np.testing.assert_allclose(found, g * phi, rtol=1e-5)


@settings(derandomize=True, deadline=None, max_examples=25)
@given(
    sizes=st.lists(
        st.one_of(st.just(0.0), st.floats(1e-6, 1e6)), min_size=10, max_size=10
    ),
    limit=st.sampled_from([1.0, 1.01, 2.0]),
    channels=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_the_step_never_grows_faster_than_its_limit(
    sizes: list[float], limit: float, channels: bool, seed: int
) -> None:
    g = np.random.default_rng(seed).normal(size=(10, M, N))
    g *= np.reshape(sizes, (10, 1, 1))
    found, norms = _limited(g.astype(np.float32), limit)[
        "channels" if channels else "tensor"
    ]
    last = None
    for size, x, update, stored in zip(sizes, g, np.float64(found), norms, strict=True):
        assert np.isfinite(update).all()
        norm = np.linalg.norm(update)
        if size == 0:  # no step, and the limit of the next one is still the last step's
            assert norm == 0
            assert stored == (-1 if last is None else last)
            continue
        # The number kept is the norm of what came out: float32 sums of 96 squares.
        np.testing.assert_allclose(norm, stored, rtol=1e-5)
        if last is None:
            # No limit at first: with the identity, the gradient itself.
            np.testing.assert_allclose(norm, np.linalg.norm(x), rtol=1e-5)
        else:
            assert stored <= limit * last * (1 + 1e-6)  # float32 rounding
        last = stored


@jax.jit
def _limited(gradients: Any, limit: Any) -> Any:
    out = {}
    for name, back in SCALED.items():
        tx = bracket(back(limit, scale=1.0), optax.identity())
        updates, state = run(tx, gradients)
        out[name] = updates, optax.tree.get(state, "norm")["w"]
    return out


@each
def test_the_first_step_is_free_and_the_next_ones_are_not(name: str) -> None:
    sizes = np.array([1, 100, 100, 1, 100], np.float32)[:, None, None]
    tx = bracket(SCALED[name](LIMIT, scale=9.0), optax.identity())
    found, state = run(tx, sizes * GRADIENT)
    free = np.linalg.norm(GRADIENT)
    expected = free * np.array([1, LIMIT, LIMIT**2, 1, LIMIT])
    np.testing.assert_allclose(norm_of(state), expected, rtol=1e-5)  # float32 sums
    # The scale multiplies what was limited, and is no part of the stored norm.
    whole = np.linalg.norm(np.float64(found), axis=(1, 2))
    np.testing.assert_allclose(whole, 3 * expected, rtol=1e-5)


@each
def test_the_published_limiter_starts_again_from_1e_8(name: str) -> None:
    sizes = np.array([1, 0, 1, 1], np.float32)[:, None, None]
    tx = bracket(SCALED[name](LIMIT, variant="published"), optax.identity())
    _, state = run(tx, sizes * GRADIENT)
    bound = LIMIT * 1e-8
    # Float32 rounding of a few products.
    expected = [0, bound, LIMIT * (bound + 1e-8)]
    np.testing.assert_allclose(norm_of(state)[1:], expected, rtol=1e-5)


ODD = {
    "zero": 0 * GRADIENT,
    "zero columns": GRADIENT * (np.arange(N) % 2),
    "outside": GRADIENT - BASIS @ (BASIS.T @ GRADIENT),
    "tiny": np.float32(1e-30) * GRADIENT,
}


@each
@each_variant
@pytest.mark.parametrize(
    "inner", [optax.scale_by_adam, lambda: optax.trace(0.9)], ids=["adam", "trace"]
)
def test_odd_gradients_give_no_nan(name: str, variant: Any, inner: Any) -> None:
    """Each kind first, and each after an ordinary gradient and before another."""
    kinds = np.stack(list(ODD.values())).astype(np.float32)
    usual = np.broadcast_to(GRADIENT, kinds.shape)
    rule = lro.bases.replay({"w": np.broadcast_to(BASIS, (1, len(ODD), M, R))})
    tx = bracket(SCALED[name](variant=variant), inner(), rule)
    updates, state = run(tx, np.stack([kinds, usual, kinds, usual]))
    assert np.isfinite(updates).all()
    norms = norm_of(state)
    assert np.isfinite(norms).all()
    assert state.skipped[-1] == 0
    np.testing.assert_array_equal(updates[[0, 2], list(ODD).index("zero")], 0)
    odd = updates[[0, 2], list(ODD).index("zero columns")]
    np.testing.assert_array_equal(odd[..., ::2], 0)
    assert (odd[..., 1::2] != 0).all()


HUGE = {
    "squares overflow": np.float32(1e30) * GRADIENT,
    "one column overflows": GRADIENT * np.where(np.arange(N) == 3, 1e30, 1),
}


@each
@each_variant
@pytest.mark.parametrize("kind", HUGE)
@pytest.mark.parametrize(
    "inner", [optax.scale_by_adam, lambda: optax.trace(0.9)], ids=["adam", "trace"]
)
def test_a_gradient_whose_squares_overflow_is_skipped(
    name: str, variant: Any, kind: str, inner: Any
) -> None:
    """First, and between others, which step as if it had not been."""
    tx = bracket(SCALED[name](variant=variant), inner())
    huge, gradients = HUGE[kind].astype(np.float32), [GRADIENT, 2 * GRADIENT]
    steps = np.stack([huge, gradients[0], huge, gradients[1]])
    updates, state = run(tx, steps)
    usual, usual_state = run(tx, np.stack(gradients))
    np.testing.assert_array_equal(state.skipped, [1, 1, 2, 2])
    np.testing.assert_array_equal(state.count, [0, 1, 1, 2])
    np.testing.assert_array_equal(updates[np.array([0, 2])], 0)
    np.testing.assert_array_equal(updates[np.array([1, 3])], usual)
    first, second = norm_of(usual_state)
    np.testing.assert_array_equal(norm_of(state), [-1, first, first, second])


@each
@each_variant
def test_an_overflow_of_the_step_leaves_out_that_step_alone(
    name: str, variant: Any
) -> None:
    """The gradient's squares are finite, those of a layer's step are not; the limit
    waits for the next, and the other layer goes on."""
    sizes = np.ones((4, 2, 1, 1), np.float32)
    sizes[[0, 2], 0] = 1e15
    square = optax.stateless(lambda us, _: jax.tree.map(lambda x: x * jnp.abs(x), us))
    rule = lro.bases.replay({"w": np.broadcast_to(BASIS, (1, 2, M, R))})
    tx = bracket(SCALED[name](LIMIT, variant=variant), square, rule)
    updates, state = run(tx, sizes * GRADIENT)
    assert state.skipped[-1] == 0
    np.testing.assert_array_equal(updates[np.array([0, 2]), 0], 0)
    assert (np.abs(updates[np.array([1, 3])]) > 0).all()
    assert (np.abs(updates[:, 1]) > 0).all()
    lost, other = norm_of(state).T
    assert lost[0] == -1
    assert lost[1] > 0
    assert lost[2] == lost[1]
    np.testing.assert_allclose(other, other[0], rtol=1e-6)  # one gradient, no growth
    np.testing.assert_allclose(lost[[1, 3]], other[0], rtol=1e-6)


@each
def test_layers_are_limited_one_by_one(name: str) -> None:
    sizes = np.array([[1, 1], [1, 50], [1, 50]], np.float32)[..., None, None]
    rule = lro.bases.replay({"w": np.stack([BASIS, BASIS])[None]})
    tx = bracket(SCALED[name](LIMIT), optax.identity(), rule)
    _, state = run(tx, sizes * GRADIENT)
    free = np.linalg.norm(GRADIENT)
    expected = free * np.array([[1, 1], [1, LIMIT], [1, LIMIT**2]])
    np.testing.assert_allclose(norm_of(state), expected, rtol=1e-5)  # float32 sums


@each
def test_they_need_their_stages(name: str) -> None:
    back, g = SCALED[name](), {"w": GRADIENT}
    for stages, message in (
        ([lro.bases.gaussian(0), back], r"w: .*put project\(\) before"),
        ([lro.bases.gaussian(0), lro.project(), back], r"w: .*put in_subspace\(\) or"),
    ):
        tx = lro.low_rank(optax.chain(*stages), rank=R, refresh_every=1)
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(tx.update, g, tx.init(g))
    variant: Any = "torch"
    with pytest.raises(ValueError, match="variant='torch': choose"):
        SCALED[name](variant=variant)
    per: Any = "row"
    with pytest.raises(ValueError, match="per='row': choose \"column\" or"):
        lro.scale_gradient(per=per)
