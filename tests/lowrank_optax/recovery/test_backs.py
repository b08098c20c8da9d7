"""The ways back: what they give, what they limit, what they keep, what they refuse."""

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

M, N, R, LIMIT = 8, 12, 3, 1.01
rng = np.random.default_rng(0)
BASIS = np.linalg.qr(rng.normal(size=(M, R)))[0].astype(np.float32)
GRADIENT = rng.normal(size=(M, N)).astype(np.float32)


def bracket(back: Any, inner: Any = None, rule: Any = None) -> Any:
    """A fixed basis, `inner` in it, and a way back."""
    stages = optax.chain(
        rule or lro.bases.replay({"w": BASIS[None]}),
        lro.project(),
        lro.in_subspace(inner or optax.scale_by_adam()),
        back,
    )
    return lro.low_rank(
        stages, rank=R, refresh_every=1000, dimension_numbers=lro.STACKED
    )


def run(tx: Any, gradients: Any) -> Any:
    """Updates and states of a (K, ...) stack of gradients."""

    def step(state: Any, g: Any) -> Any:
        updates, state = tx.update({"w": g}, state)
        return state, (updates["w"], state)

    def scan(gs: Any) -> Any:
        return jax.lax.scan(step, tx.init({"w": gs[0]}), gs)[1]

    return jax.jit(scan)(jnp.asarray(gradients))


# ------------------------------------------------------------------ sign_residual


@pytest.mark.parametrize("step", ["sign", "sgd"])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_the_rest_takes_a_step_without_a_state(step: Any, scale: float) -> None:
    # Momentum inside, so that the two parts are told apart.
    gradients = np.stack([GRADIENT, -2 * GRADIENT, 0.5 * GRADIENT])
    back = lro.sign_residual(scale, step=step)
    found, _ = run(bracket(back, optax.trace(0.5)), gradients)
    s, moment = np.float64(BASIS), 0.0
    for g, update in zip(np.float64(gradients), found, strict=True):
        moment = 0.5 * moment + s.T @ g
        rest = g - s @ (s.T @ g)
        assert np.abs(rest).min() > 1e-5  # no sign here is decided by rounding
        rest = np.sign(rest) if step == "sign" else rest
        # Float32 sums of up to M products of numbers of a few.
        np.testing.assert_allclose(update, s @ moment + scale * rest, atol=5e-6)


def test_nothing_moves_without_a_gradient_and_rows_are_whole() -> None:
    rows = lro.bases.coordinates(order="ascending")
    for step in ("sign", "sgd"):
        tx = bracket(lro.sign_residual(7.0, step=step), optax.identity(), rows)
        found, _ = run(tx, np.stack([0 * GRADIENT, GRADIENT]))
        np.testing.assert_array_equal(found[0], 0)
        # Rows inside are the step's alone, to the bit; a residual there is 0 exactly.
        np.testing.assert_array_equal(found[1, :R], GRADIENT[:R])
        rest = GRADIENT[R:]
        rest = np.sign(rest) if step == "sign" else rest
        np.testing.assert_array_equal(found[1, R:], np.float32(7) * rest)


def test_which_steps_there_are() -> None:
    step: Any = "adam"
    with pytest.raises(ValueError, match='step=\'adam\': choose "sign" or "sgd"'):
        lro.sign_residual(step=step)


# ------------------------------------------------------------------ scaling

SCALED = {
    "channels": lro.scale_gradient,
    "tensor": functools.partial(lro.scale_gradient, per="matrix", scale=128.0),
}
each = pytest.mark.parametrize("name", SCALED)
each_variant = pytest.mark.parametrize("variant", ["paper", "published"])


def norm_of(state: Any) -> Any:
    return np.asarray(optax.tree.get(state, "norm")["w"])


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


# ------------------------------------------------------------------ error_feedback


def fed_back(rule: Any, step: Any, b1: float = 0.0, back: Any = None) -> Any:
    stages = optax.chain(
        lro.error_feedback(optax.chain(rule, lro.project()), b1=b1),
        step,
        back or lro.project_back(),
    )
    return lro.low_rank(stages, rank=R, refresh_every=1)


@settings(derandomize=True, deadline=None, max_examples=20)
@given(
    seed=st.integers(0, 2**31),
    log_sizes=st.lists(st.floats(-3, 3), min_size=6, max_size=6),
)
def test_what_is_lost_is_kept(seed: int, log_sizes: list[float]) -> None:
    """sum of S_t G~_t up to T, and E_T, are the sum of all gradients, at every T."""
    random = np.random.default_rng(seed)
    bases = np.linalg.qr(random.normal(size=(6, M, R)))[0]
    sizes = 10.0 ** np.reshape(log_sizes, (6, 1, 1))
    gradients = sizes * random.normal(size=(6, M, N))
    with jax.enable_x64(True):
        updates, errors = jax.device_get(_conserved(bases, gradients))
    given_in = np.cumsum(gradients, axis=0)
    came_out = np.cumsum(updates, axis=0) + errors
    # Float64 rounding of sums of six times M products of numbers of a few.
    rounding = 1e-12 * sizes.max()
    np.testing.assert_allclose(came_out, given_in, rtol=0, atol=rounding)
    for s, e in zip(bases, errors, strict=True):  # and E has no part in the last basis
        assert np.abs(s.T @ e).max() < rounding


@jax.jit
def _conserved(bases: Any, gradients: Any) -> Any:
    tx = fed_back(lro.bases.replay({"w": bases}), lro.in_subspace(optax.identity()))
    updates, state = run(tx, gradients)
    return updates, optax.tree.get(state, "error")["w"]


def test_a_basis_that_covers_the_error_gives_all_of_it_back() -> None:
    rows = lro.bases.coordinates(order="ascending")
    gradients = np.stack([GRADIENT, 0 * GRADIENT, 0 * GRADIENT, 0 * GRADIENT])
    tx = fed_back(rows, lro.in_subspace(optax.identity()))
    found, state = run(tx, gradients)
    # Blocks of rows 0-2, 3-5, 5-7: gathers and scatters, exact. Row 5 is paid once.
    paid = np.asarray(found)
    np.testing.assert_array_equal(paid[0, :3], GRADIENT[:3])
    np.testing.assert_array_equal(paid[1, 3:6], GRADIENT[3:6])
    np.testing.assert_array_equal(paid[2, 6:], GRADIENT[6:])
    np.testing.assert_array_equal(paid.sum(0), GRADIENT)
    np.testing.assert_array_equal(optax.tree.get(state, "error")["w"][2:], 0)


def test_what_the_moment_loses_by_turning_is_fed_back() -> None:
    """With b1 > 0: the momentum that is still to come counts as given.

    M_t = b1 C M_{t-1} + (1 - b1) S^T (G + E): a gradient pays (1 - b1) now, and b1 /
    (1 - b1) S M is what the moment will still pay, were the basis to stay.
    """
    b1 = 0.75
    random = np.random.default_rng(3)
    bases = np.linalg.qr(random.normal(size=(6, M, R)))[0]
    gradients = random.normal(size=(6, M, N))
    with jax.enable_x64(True):
        step = lro.rotate_moments(optax.ema(b1, debias=False))
        tx = fed_back(lro.bases.replay({"w": bases}), step, b1=b1)
        updates, state = jax.device_get(run(tx, gradients))
    errors = optax.tree.get(state, "error")["w"]
    moments = optax.tree.get(state, "ema")["w"]
    to_come = b1 / (1 - b1) * bases @ moments
    total = np.cumsum(updates, axis=0) + to_come + errors
    # Float64 rounding of sums of six.
    np.testing.assert_allclose(total, np.cumsum(gradients, axis=0), atol=1e-13)


def test_a_skipped_step_keeps_the_error() -> None:
    tx = fed_back(lro.dominant_svd(), lro.in_subspace(optax.identity()))
    bad = GRADIENT.copy()
    bad[0, 0] = np.nan
    _, state = run(tx, np.stack([GRADIENT, bad]))
    errors = optax.tree.get(state, "error")["w"]
    assert np.abs(errors[0]).max() > 0.1
    np.testing.assert_array_equal(errors[1], errors[0])


def test_a_leaf_of_full_rank_has_no_error() -> None:
    tx = fed_back(lro.dominant_svd(), lro.in_subspace(optax.identity()))
    g = {"w": GRADIENT, "b": np.ones(4, np.float32)}
    state = tx.init(g)

    def nothing_is_kept() -> None:
        error = optax.tree.get(state, "error")["b"]
        assert (error.shape, error.dtype, bool(error)) == ((), jnp.bool_, False)

    nothing_is_kept()
    updates, state = tx.update(g, state)
    np.testing.assert_array_equal(updates["b"], 1)
    nothing_is_kept()


FEEDING: dict[str, Any] = {
    "recover_residual": lro.recover_residual,
    "sign_residual": lro.sign_residual,
    "scale_gradient": lro.scale_gradient,
    "scale_gradient/matrix": functools.partial(lro.scale_gradient, per="matrix"),
}


@pytest.mark.parametrize("name", FEEDING)
def test_the_residual_is_given_back_once(name: str) -> None:
    g = {"w": GRADIENT}
    step = lro.in_subspace(optax.scale_by_adam())
    tx = fed_back(lro.dominant_svd(), step, back=FEEDING[name]())
    stage = name.split("/")[0]
    message = rf"w: {stage}\(\) does not work here: error_feedback\(\) adds the resid"
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(tx.update, g, tx.init(g))


def refused(stages: Any, g: Any) -> str:
    chain = optax.chain(
        stages,
        lro.rotate_moments(optax.scale_by_adam(), moments="first"),
        lro.project_back(),
    )
    tx = lro.low_rank(chain, rank=R, refresh_every=1)
    with pytest.raises(ValueError, match=r"^w: ") as caught:
        jax.eval_shape(tx.update, g, tx.init(g))
    return str(caught.value)


@pytest.mark.parametrize(
    "rule",
    [
        lro.bases.gaussian(0),
        lro.bases.gaussian(0, stored=True),
        lro.bases.online_pca(),
        lro.bases.correlation_aware(),
        lro.bases.quantize_basis(lro.dominant_svd()),
    ],
    ids=["gaussian", "stored", "online_pca", "correlation_aware", "4 bits"],
)
def test_a_basis_that_is_not_orthonormal_is_refused(rule: Any) -> None:
    chain = optax.chain(rule, lro.project())
    message = refused(lro.error_feedback(chain), {"w": GRADIENT})
    assert "error_feedback()" in message
    assert "not orthonormal" in message or "rule that keeps its basis" in message


def test_feedback_of_feedback_and_stages_that_are_missing() -> None:
    g = {"w": GRADIENT}
    once = lro.error_feedback(optax.chain(lro.dominant_svd(), lro.project()))
    assert "error_feedback()" in refused(lro.error_feedback(once), g)
    assert "put project() before" in refused(lro.error_feedback(lro.dominant_svd()), g)
    assert "basis" in refused(lro.error_feedback(lro.project()), g)


@pytest.mark.parametrize(
    "rule",
    [
        lro.bases.frozen(lro.dominant_svd()),
        lro.bases.coordinates(0),
        lro.bases.grassmann_track(None),
        lro.grassmann_walk(0),
        lro.bases.power_iterate(),
    ],
    ids=["frozen", "coordinates", "track", "walk", "power_iterate"],
)
def test_rules_it_goes_around(rule: Any) -> None:
    g = {"w": GRADIENT, "b": np.ones(4, np.float32)}
    tx = fed_back(rule, lro.rotate_moments(optax.scale_by_adam()), b1=0.9)
    updates, state = jax.eval_shape(tx.update, g, tx.init(g))
    assert updates["w"].shape == (M, N)
    # A carry of scan: the state keeps its structure, shapes and dtypes.
    before = jax.eval_shape(tx.init, g)
    assert jax.tree.structure(state) == jax.tree.structure(before)
    for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(before), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
